"""Packed data files: gzip, bzip2, xz and zstd, unpacked as they are read, up to a limit."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from ..errors import DataError, first_line

PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
UNPACKED_LIMIT = 1 << 30
"""A packed file is unpacked up to this many bytes."""


class Capped(io.RawIOBase):
    """What a packed file holds, no more than `UNPACKED_LIMIT` of it whatever the file claims."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path, self.stream, self.size = path, stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            found = self.stream.read(len(buffer))
        except EOFError as error:
            raise DataError(f"the packed file {self.path} is cut off") from error
        except (OSError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise DataError(
                f"the packed file {self.path} is damaged", found=first_line(error)
            ) from error
        self.size += len(found)
        if self.size > UNPACKED_LIMIT:
            raise DataError(
                f"{self.path} unpacks to more than {UNPACKED_LIMIT >> 30} GiB",
                ways_out=["unpack it yourself, if it is what you think it is"],
            )
        buffer[: len(found)] = found
        return len(found)


def unpacker(head: bytes) -> Callable[[IO[bytes]], Any] | None:
    """What unpacks a file that begins so."""
    if head[:2] == b"\x1f\x8b":
        return lambda stream: gzip.GzipFile(fileobj=stream)
    if head[:3] == b"BZh":
        return bz2.BZ2File
    if head == b"\xfd7zX":
        return lzma.LZMAFile
    if head == b"\x28\xb5\x2f\xfd":
        return _zstd
    return None


def _zstd(stream: IO[bytes]) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream), "zstd")

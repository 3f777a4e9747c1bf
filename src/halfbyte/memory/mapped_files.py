"""Files mapped into memory: scratch files that are written, and weights that are only read.

Pages take memory while they are used, and what they hold is never lost with them. Windows takes no
advice on mapped pages: there it works, and the system decides what stays.
"""

import contextlib
import mmap
import os
import re
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..errors import ModelError, StorageError, is_exhaustion
from ..files.atomic import ways_around

PAGE, MIB = mmap.PAGESIZE, 1 << 20
_CAN_ADVISE = hasattr(mmap.mmap, "madvise") and hasattr(mmap, "MADV_DONTNEED")
READ_STEP = 128 << 10
"""Bytes asked for at once: the kernel reads no more ahead for one request, whatever it is asked
for."""


_ESCAPED = re.compile(r"\\([0-7]{3})")
"""How /proc/mounts writes spaces, tabs, line ends and backslashes of a path."""


def scratch_directory() -> Path:
    """Where files without names go if nobody says: a disk rather than memory that looks like
    one."""
    for place in (Path("/var/tmp"), Path(tempfile.gettempdir())):
        if place.is_dir() and os.access(place, os.W_OK):
            return place
    return Path.cwd()


def lies_in_memory(directory: Path) -> bool:
    """Whether a directory's files are memory themselves (tmpfs), as far as the system says."""
    longest, kind = 0, ""
    with contextlib.suppress(OSError):
        real = os.path.realpath(directory)
        for line in os.fsdecode(Path("/proc/mounts").read_bytes()).splitlines():
            _, place, this, *_ = line.split(" ")
            place = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), place)
            if len(place) >= longest and os.path.commonpath([place, real]) == place:
                longest, kind = len(place), this
    return kind in ("tmpfs", "ramfs")


def _pages(start: int, stop: int) -> tuple[int, int]:
    """(start, length) of the whole pages around some bytes."""
    first = start // PAGE * PAGE
    return first, -(-stop // PAGE) * PAGE - first


def resident_bytes(tensor: Tensor, size: int) -> int:
    """Bytes of the mapping that a tensor begins which this process has in memory; 0 where the
    system does not say."""
    address, inside = tensor.data_ptr(), False
    with contextlib.suppress(OSError), Path("/proc/self/smaps").open() as lines:
        for line in lines:
            head = line.split(" ", 1)[0]
            if not head.endswith(":"):
                first, _, last = head.partition("-")
                inside = int(first, 16) <= address < int(last, 16)
            elif inside and head == "Rss:":
                return min(int(line.split()[1]) * 1024, size)
    return 0


class ScratchFile:
    """Bytes of this process alone, in a file without a name, mapped: nothing is left of them when
    it ends.

    Args:
        size: bytes.
        directory: on the disk they lie on.

    Raises:
        StorageError: the disk has no room for them (said now: a write to a mapped file can report
            nothing).
    """

    def __init__(self, size: int, directory: Path) -> None:
        self.size = -(-max(size, 1) // PAGE) * PAGE
        directory = scratch_directory() if lies_in_memory(directory) else directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.size)
                else:
                    for _ in range(0, self.size, MIB):
                        file.write(bytes(MIB))
                    file.truncate(self.size)
                    file.flush()
                self._map = mmap.mmap(file.fileno(), self.size)
        except OSError as error:
            if is_exhaustion(error):
                raise MemoryError(f"no memory to map {self.size} bytes: {error.strerror}") from None
            raise StorageError(
                f"cannot lay {self.size / 2**20:,.0f} MiB aside in {directory}: {error.strerror}",
                ways_out=ways_around(error, "choose another --output_dir"),
            ) from error

    def tensor(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """The elements from byte ``start`` on, [count]; zero until they are written."""
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)

    def range(self, tensor: Tensor) -> tuple[int, int] | tuple[()]:
        """The first byte and the last (exclusive) of a tensor that lies here; nothing of any
        other."""
        start = tensor.data_ptr() - self.tensor(0, 1, torch.uint8).data_ptr()
        return (start, start + tensor.nbytes) if 0 <= start < self.size else ()

    def will_need(self, start: int = 0, stop: int = 0) -> None:
        """Have the system read these bytes while something else is done."""
        if _CAN_ADVISE:
            first, size = _pages(start, min(stop, self.size))
            for at in range(first, first + size, READ_STEP):
                self._map.madvise(mmap.MADV_WILLNEED, at, min(READ_STEP, first + size - at))

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Take no memory for these bytes any more; they keep their values, in the file."""
        if _CAN_ADVISE:
            first, size = _pages(start, self.size if stop is None else min(stop, self.size))
            self._map.madvise(mmap.MADV_DONTNEED, first, size)

    def resident_bytes(self) -> int:
        """Bytes that take memory now."""
        return resident_bytes(self.tensor(0, 1, torch.uint8), self.size)


# --- what is only read ----------------------------------------------------------------------------


class ReadOnlyMmap:
    """A file, mapped to be read only. Shortened while its bytes are read it would end the process;
    `refuse_cut` asks before."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self._descriptor = os.open(file, os.O_RDONLY)
            self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise StorageError(
                f"cannot map {file}: {error}",
                ways_out=[
                    "keep quantized bases on another file system: HALFBYTE_CACHE",
                    "or do without: --weight_streaming never",
                ],
            ) from error

    def tensor(self, start: int, nbytes: int) -> Tensor:
        """These bytes, uint8 [nbytes]. Writing to them ends the process."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to is meant
            return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=start)

    def refuse_cut(self) -> None:
        """Raise ModelError if the file has become shorter than it was mapped."""
        if (now := os.fstat(self._descriptor).st_size) < len(self._map):
            raise ModelError(
                f"{self.file} was cut while its weights were in use",
                found=f"{now:,} bytes",
                expected=f"{len(self._map):,}",
                ways_out=[
                    "bring the file back (it is written anew where it is missing), and repeat the "
                    "command with --resume_from_checkpoint auto"
                ],
            )

    def read_ahead(self, start: int, nbytes: int) -> None:
        """Have the system read these bytes; returns when it has been asked for all of them."""
        if hasattr(os, "posix_fadvise"):
            for at in range(start, start + nbytes, READ_STEP):
                os.posix_fadvise(
                    self._descriptor,
                    at,
                    min(READ_STEP, start + nbytes - at),
                    os.POSIX_FADV_WILLNEED,
                )

    def release(self, start: int, nbytes: int) -> None:
        """Take no memory of this process for these bytes (the system may keep them while it has
        room)."""
        if _CAN_ADVISE:
            first, size = _pages(start, start + nbytes)
            self._map.madvise(mmap.MADV_DONTNEED, first, min(size, len(self._map) - first))

    def __del__(self) -> None:
        try:  # noqa: SIM105 - at exit modules may be gone
            os.close(self._descriptor)
        except (AttributeError, OSError, TypeError):
            pass

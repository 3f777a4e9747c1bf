"""safetensors files read and written one tensor at a time, every number of a header checked.

We read the weights with ``pread`` after checking every header ourselves: the format protects
memory, not integrity, and a file truncated under an open memory map ends Python with SIGBUS.
"""

import contextlib
import json
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from ..errors import ModelError, StorageError
from .atomic import _write_then_rename, read_json, sync, ways_around
from .entries import Entry as Entry
from .entries import join_blocks, join_scales
from .entries import read_tensor as read_tensor
from .hub import INDEX as INDEX
from .hub import SINGLE as SINGLE

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
HEADER_LIMIT = 25_000_000
"""Longest header read, bytes. The format allows 100 MB, which takes half a gigabyte to parse; real
ones have five."""


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, every number checked against the file.

    Raises:
        ModelError: the header is damaged, a tensor lies outside the file, or tensors overlap.
    """

    def refuse(why: str, **more: str) -> ModelError:
        return ModelError(
            f"{path} is not an intact safetensors file: {why}",
            ways_out=["download or copy the file again"],
            **more,
        )

    try:
        size = path.stat().st_size
        if not path.is_file():
            raise refuse("it is not a regular file")
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise refuse(f"it holds {size} bytes, fewer than its length field")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(HEADER_LIMIT, size - 8):
                raise refuse(f"its header of {length} bytes does not fit in a file of {size}")
            header = json.loads(file.read(length), object_pairs_hook=_unique_keys)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise refuse(f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise refuse("its header is not a JSON object")
    base = 8 + length
    entries: dict[str, Entry] = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = DTYPES[info["dtype"]], tuple(info["shape"])
            begin, end = info["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise refuse(f"tensor {name!r} has a damaged entry", found=str(info)[:200]) from error
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise refuse(
                f"tensor {name!r} has a shape or offset that is no size", found=str(info)[:200]
            )
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise refuse(
                f"tensor {name!r} takes {end - begin} bytes but its shape {list(shape)} says "
                "otherwise"
            )
        if base + end > size:
            raise refuse(
                f"it is truncated: tensor {name!r} ends at byte {base + end} of a file of {size}"
            )
        entries[name] = Entry(path, dtype, shape, base + begin, end - begin)
    position = base
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if entry.start != position:
            raise refuse(
                f"tensor {name!r} starts at byte {entry.start}, expected {position}: a gap or an "
                "overlap"
            )
        position += entry.nbytes
    if position != size:
        raise refuse(f"{size - position} bytes follow the last tensor")
    return entries


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name appears twice")
    return dict(pairs)


DEQUANTIZED = ("fp8", "compressed-tensors")
"""Methods of quantization whose weights are read as what they stand for, if they are FP8."""
HELD = "mxfp4"
"""The method whose weights are held in the 4 bits they are stored in."""


class Checkpoint:
    """The weights of a model directory: names to entries, and `read` for one tensor at a time.

    Raises:
        ModelError: no safetensors, a shard missing, or the index and the shards disagree.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = self._files()
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            for name, entry in read_header(file).items():
                if name in self.entries:
                    raise ModelError(
                        f"tensor {name!r} is stored twice",
                        where=f"{self.entries[name].file.name} and {file.name}",
                    )
                self.entries[name] = entry
        self._check_index()
        self._join_scales()

    def _files(self) -> list[Path]:
        index = self.directory / INDEX
        # as transformers reads a directory that holds both
        if index.is_file() and not (self.directory / SINGLE).is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                isinstance(f, str) for f in weight_map.values()
            ):
                raise ModelError(f"{index} has no weight_map of names to files")
            names = sorted(set(weight_map.values()))
            if foreign := [
                name for name in names if not re.fullmatch(r"\w[\w.-]{0,200}\.safetensors", name)
            ]:
                raise ModelError(
                    f"{index} names something else than safetensors files of its directory",
                    found=", ".join(repr(name[:80]) for name in foreign[:3]),
                )
            missing = [name for name in names if not (self.directory / name).is_file()]
            if missing:
                raise ModelError(
                    f"{len(missing)} of {len(names)} shards are missing in {self.directory}",
                    found=", ".join(missing[:5]),
                    ways_out=["finish the download"],
                )
            return [self.directory / name for name in names]
        if (self.directory / SINGLE).is_file():
            return [self.directory / SINGLE]
        pickled = sorted(f.name for f in self.directory.glob("*.bin")) + sorted(
            f.name for f in self.directory.glob("*.pt*")
        )
        if pickled:
            raise ModelError(
                f"{self.directory} holds pickled weights only ({pickled[0]}), which can run code "
                "when opened",
                ways_out=[
                    "use a safetensors version of the model",
                    "or convert it once on a machine you can lose",
                ],
            )
        raise ModelError(
            f"{self.directory} holds no weights", expected=f"{SINGLE} or {INDEX} with its shards"
        )

    def _check_index(self) -> None:
        index = self.directory / INDEX
        if not index.is_file() or (self.directory / SINGLE).is_file():
            return
        weight_map = read_json(index)["weight_map"]
        absent = [name for name, file in weight_map.items() if self._file_of(name) != file]
        if absent:
            raise ModelError(
                f"{index} and the shards disagree on {len(absent)} tensors",
                found=", ".join(sorted(absent)[:5]),
            )

    def _join_scales(self) -> None:
        """Have weights that are stored in FP8 or MXFP4 read as what they stand for, in the dtype
        that config.json names."""
        file = self.directory / "config.json"
        said = read_json(file) if file.is_file() else {}
        quantization = said.get("quantization_config")
        quantization = quantization if isinstance(quantization, dict) else {}
        method = quantization.get("quant_method")
        if method not in (*DEQUANTIZED, HELD):
            return
        text = said.get("text_config")
        inner = text if isinstance(text, dict) else {}
        named = [each.get(key) for each in (said, inner) for key in ("dtype", "torch_dtype")]
        dtype = {"float32": torch.float32, "float16": torch.float16}
        chosen = [dtype[name] for name in named if isinstance(name, str) and name in dtype]
        read_as = chosen[0] if chosen else torch.bfloat16
        if method == HELD:
            join_blocks(self.entries, read_as)
        else:
            join_scales(self.entries, quantization, read_as)

    def _file_of(self, name: str) -> str | None:
        entry = self.entries.get(name)
        return None if entry is None else entry.file.name

    def __iter__(self) -> Iterator[str]:
        """Names in the order they lie on disk."""
        return iter(
            sorted(
                self.entries,
                key=lambda name: (self.entries[name].file.name, self.entries[name].start),
            )
        )

    def read(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """One tensor, in memory of its own or in ``into`` (`read_tensor`)."""
        return read_tensor(self.entries[name], name, into)


def write_safetensors(
    path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Tensors to one file, as transformers and PEFT write it (metadata ``format: pt``)."""
    metadata = {"format": "pt", **(metadata or {})}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    _write_then_rename(
        path, lambda temporary: safetensors.torch.save_file(contiguous, temporary, metadata)
    )


class TensorFile:
    """A safetensors file of which one tensor at a time is in memory.

    Args:
        known: dtype and shape of tensors.
        late: of uint8 vectors whose length is not known yet, a length they do not exceed. Each is
            written once, in any order; the file is there under its name when the block ends well.

    Raises:
        StorageError: the disk has no room, or said no; nothing is left of it then.
    """

    def __init__(
        self,
        path: Path,
        known: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        late: dict[str, int],
    ) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._places: dict[str, tuple[str, list[int], int, int]] = {}
        names = {dtype: name for name, dtype in DTYPES.items()}
        end = 0
        # the widest first, so that each lies at a multiple of its width
        for name, (dtype, shape) in sorted(known.items(), key=lambda item: -item[1][0].itemsize):
            size = math.prod(shape) * dtype.itemsize
            self._places[name] = (names[dtype], list(shape), end, end + size)
            end += size
        self._end = end
        longest = {name: ("U8", [most], 10**15, 10**15) for name, most in late.items()}
        self._room = -(-len(self._header({**self._places, **longest})) // 8) * 8
        self._late = dict(late)
        self._unwritten = {*known, *late}

    @staticmethod
    def _header(places: dict[str, tuple[str, list[int], int, int]]) -> bytes:
        entries = {
            name: {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}
            for name, (dtype, shape, first, last) in places.items()
        }
        return json.dumps(
            {"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")
        ).encode()

    @property
    def written(self) -> int:
        """Bytes of tensors."""
        return self._end

    def __enter__(self) -> "TensorFile":
        with self._refusing():
            binary = getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(
                self._temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | binary, 0o644
            )
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(
                        self._descriptor, 0, 8 + self._room + self._end + sum(self._late.values())
                    )
            except OSError:
                os.close(self._descriptor)
                raise
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """One of the tensors."""
        if name in self._late:
            del self._late[name]
            self._places[name] = ("U8", list(tensor.shape), self._end, self._end + tensor.nbytes)
            self._end += tensor.nbytes
        self._unwritten.discard(name)
        _, shape, first, last = self._places[name]
        if list(tensor.shape) != shape or tensor.nbytes != last - first:
            raise ValueError(f"{name} is {list(tensor.shape)}, announced was {shape}")
        view = memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
        with self._refusing():
            while view:
                first_byte = 8 + self._room + last - len(view)
                os.lseek(self._descriptor, first_byte, os.SEEK_SET)
                view = view[os.write(self._descriptor, view[: 1 << 30]) :]

    def __exit__(self, kind: Any, *error: Any) -> None:
        try:
            if kind is None and self._unwritten:
                raise ValueError(
                    f"announced and not written: {', '.join(sorted(self._unwritten)[:5])}"
                )
            if kind is None:
                with self._refusing():
                    header = self._header(self._places).ljust(self._room)
                    os.lseek(self._descriptor, 0, os.SEEK_SET)
                    os.write(self._descriptor, struct.pack("<Q", self._room) + header)
                    os.ftruncate(self._descriptor, 8 + self._room + self._end)
                    os.fsync(self._descriptor)
        except BaseException:
            os.close(self._descriptor)
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            raise
        os.close(self._descriptor)
        if kind is None:
            with self._refusing():
                self._temporary.replace(self.path)
                sync(self.path.parent)
        else:
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)
            raise StorageError(
                f"cannot write {self.path}: {error.strerror}",
                ways_out=ways_around(error, "choose another place"),
            ) from error

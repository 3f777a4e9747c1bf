"""Where the tensors of a checkpoint lie, and how one is read; of FP8 weights with their scales, as
what they stand for."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, StorageError


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: file, dtype, shape, first byte and length in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def stored_bytes(self) -> int:
        return self.nbytes


@dataclass(frozen=True)
class ScaledEntry(Entry):
    """A weight that is stored as FP8 values and scales, to be read as their products. ``dtype``,
    ``shape`` and ``nbytes`` are those of what is read.

    Attributes:
        values: FP8 [out, in].
        scales: one, or one a row, or one a block: [ceil(out / rows), ceil(in / columns)].
        block: (rows, columns) of a block.
    """

    values: Entry
    scales: Entry
    block: tuple[int, int]

    @property
    def stored_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dequantized(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """The products, computed in fp32 and rounded once."""
        values = read_tensor(self.values, name)
        scales = _scales(read_tensor(self.scales, name))
        grid = scales.view(1, 1) if scales.numel() == 1 else scales.view(len(scales), -1)
        rows, columns = self._block(grid)
        whole = None if into is None else into[: self.nbytes].view(self.dtype).view(self.shape)
        found = torch.empty(self.shape, dtype=self.dtype) if whole is None else whole
        for place, line in enumerate(grid):  # a row of blocks at a time
            part = values[place * rows : (place + 1) * rows].float()
            found[place * rows : (place + 1) * rows] = (
                part * line.repeat_interleave(columns)[: part.shape[1]]
            )
        return found

    def _block(self, grid: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of a block, by how many scales there are."""
        out, width = self.shape
        if grid.shape == (1, 1):
            return out, width
        return (1, width) if grid.shape == (out, 1) else self.block


@dataclass(frozen=True)
class TransposedEntry(Entry):
    """A matrix that is to be read the other way round. ``shape`` is that of what is read.

    Attributes:
        stored: what lies in the file.
    """

    stored: Entry

    @classmethod
    def of(cls, entry: Entry) -> "TransposedEntry":
        shape = tuple(reversed(entry.shape))
        return cls(entry.file, entry.dtype, shape, entry.start, entry.nbytes, entry)

    def turned(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        found = read_tensor(self.stored, name).t()
        if into is None:
            return found.contiguous()
        return into[: self.nbytes].view(self.dtype).view(self.shape).copy_(found)


def _scales(stored: torch.Tensor) -> torch.Tensor:
    """In fp32; bytes are exponents (E8M0), 2^(b - 127)."""
    if stored.dtype == torch.uint8:
        stored = stored.view(torch.float8_e8m0fnu)
    return stored.float()


SCALES = ("weight_scale_inv", "weight_scale")
"""What the scales of a weight are called beside it: what it is multiplied by."""
OF_ACTIVATIONS = ("activation_scale", "input_scale", "output_scale", "k_scale", "v_scale")
"""Scales that other tools quantize activations with, which are not quantized here."""
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def join_scales(
    entries: dict[str, Entry], quantization: dict[str, Any], dtype: torch.dtype
) -> None:
    """Put each FP8 weight together with its scales, in place.

    Args:
        entries: of a checkpoint, by name.
        quantization: the ``quantization_config`` of its config.json.
        dtype: what the products are rounded to.

    Raises:
        ModelError: scales that do not belong to their weight; all in one message.
    """
    block = _block_size(quantization)
    problems = []
    for name in [name for name, entry in entries.items() if entry.dtype in FP8]:
        path = name.removesuffix("weight")
        scales = [path + scale for scale in SCALES if path != name and path + scale in entries]
        values = entries[name]
        if len(scales) != 1 or len(values.shape) != 2:
            problems.append(
                f"{name}: FP8 {list(values.shape)} with {len(scales)} tensors of scales"
            )
            continue
        scale = entries.pop(scales[0])
        size = math.prod(values.shape) * dtype.itemsize
        joined = ScaledEntry(
            values.file, dtype, values.shape, values.start, size, values, scale, block
        )
        out, width = values.shape
        grid = (-(-out // joined.block[0]), -(-width // joined.block[1]))
        count = math.prod(scale.shape)
        if not scale.dtype.is_floating_point and scale.dtype != torch.uint8:
            problems.append(f"{scales[0]}: scales of {scale.dtype}")
        if count != 1 and scale.shape not in ((out,), (out, 1), grid):
            problems.append(f"{scales[0]}: {list(scale.shape)} for a weight of {out} x {width}")
        entries[name] = joined
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ModelError(
            "FP8 weights and their scales do not belong together",
            found="; ".join(problems[:8]) + more,
            ways_out=["download the files again", "or use a 16-bit version of the model"],
        )
    for name in [n for n in entries if n.rpartition(".")[2] in OF_ACTIVATIONS]:
        del entries[name]


def _block_size(quantization: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block of weights that share a scale.

    Raises:
        ModelError: no two sizes.
    """
    said = quantization.get("weight_block_size") or (128, 128)
    sizes = [n for n in said if type(n) is int and n > 0] if isinstance(said, list | tuple) else []
    if len(sizes) != 2 or len(said) != 2:
        raise ModelError(
            "config.json has a value no model has",
            found=f"weight_block_size = {said!r}"[:200],
            expected="two sizes, such as [128, 128]",
        )
    return sizes[0], sizes[1]


def read_tensor(entry: Entry, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
    """The tensor at an entry, by ``pread`` into fresh memory.

    Args:
        into: uint8, at least as large: the tensor is read into it instead, and valid until its next
            use.

    Raises:
        ModelError: the file ends early.
        StorageError: the system cannot read it.
    """
    if isinstance(entry, ScaledEntry):
        return entry.dequantized(name, into)
    if isinstance(entry, TransposedEntry):
        return entry.turned(name, into)
    raw = torch.empty(entry.nbytes, dtype=torch.uint8) if into is None else into[: entry.nbytes]
    view, done = memoryview(raw.numpy()), 0  # pyright: ignore[reportArgumentType]
    try:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            while done < entry.nbytes:
                count = file.readinto(view[done : done + (1 << 30)])
                if not count:
                    raise ModelError(
                        f"{entry.file} ended inside tensor {name!r}",
                        ways_out=["copy the file again"],
                    )
                done += count
    except OSError as error:
        raise StorageError(
            f"cannot read tensor {name!r} of {entry.file}: {error.strerror}"
        ) from error
    return (
        raw.view(entry.dtype).view(entry.shape)
        if entry.nbytes
        else torch.empty(entry.shape, dtype=entry.dtype)
    )

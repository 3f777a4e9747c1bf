"""Where the tensors of a checkpoint lie, and how one is read; of FP8 weights with their scales, and
of MXFP4 blocks, as what they stand for."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..codebooks import MXFP4_BLOCK, MXFP4_LEVELS
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
    def is_turned(self) -> bool:
        """Whether 16-bit files hold the matrix the other way round than it is read."""
        return False

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

    @property
    def is_turned(self) -> bool:
        return True

    @classmethod
    def of(cls, entry: Entry) -> "TransposedEntry":
        shape = tuple(reversed(entry.shape))
        return cls(entry.file, entry.dtype, shape, entry.start, entry.nbytes, entry)

    def turned(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        found = read_tensor(self.stored, name).t()
        if into is None:
            return found.contiguous()
        return into[: self.nbytes].view(self.dtype).view(self.shape).copy_(found)


@dataclass(frozen=True)
class MXFP4Entry(Entry):
    """Weights in MXFP4 (OCP Microscaling Formats 1.0): 4-bit floats, of which 32 along a row share
    a power of two; one matrix, or those of all experts of a layer. ``dtype``, ``shape`` and
    ``nbytes`` are those of what they stand for.

    Attributes:
        codes: uint8 [..., out, in / 32, 16], the lower half of a byte first.
        exponents: uint8 [..., out, in / 32]: 2^(b - 127).
        as_in_out: whether 16-bit files hold such a matrix as [in, out].
    """

    codes: Entry
    exponents: Entry
    as_in_out: bool = False

    @property
    def is_turned(self) -> bool:
        return self.as_in_out

    @classmethod
    def of(cls, codes: Entry, exponents: Entry, dtype: torch.dtype) -> "MXFP4Entry":
        shape = (*exponents.shape[:-1], exponents.shape[-1] * MXFP4_BLOCK)
        size = math.prod(shape) * dtype.itemsize
        return cls(codes.file, dtype, shape, codes.start, size, codes, exponents)

    @property
    def stored_bytes(self) -> int:
        return self.codes.nbytes + self.exponents.nbytes

    def matrix(self, first: int, rows: int, as_in_out: bool) -> "MXFP4Entry":
        """Some rows of all there are, counted through all experts, as a matrix."""
        every = math.prod(self.shape[:-1])

        def part(entry: Entry) -> Entry:
            size = entry.nbytes // every
            shape = (rows, *entry.shape[len(self.shape) - 1 :])
            start = entry.start + first * size
            return replace(entry, shape=shape, start=start, nbytes=rows * size)

        found = MXFP4Entry.of(part(self.codes), part(self.exponents), self.dtype)
        return replace(found, as_in_out=as_in_out)

    def read(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and exponents as they are stored.

        Raises:
            ModelError: an exponent that stands for no number.
        """
        codes, exponents = read_tensor(self.codes, name), read_tensor(self.exponents, name)
        if exponents.numel() and int(exponents.max()) == _NO_NUMBER:
            raise ModelError(
                f"the weight {name} is not finite",
                where=str(self.file),
                found=f"{int((exponents == _NO_NUMBER).sum())} blocks whose scale is no number",
                ways_out=["download the file again"],
            )
        return codes, exponents

    def dequantized(self, name: str, into: torch.Tensor | None = None) -> torch.Tensor:
        """The products, computed in fp32 and rounded once (where they are not exact)."""
        codes, exponents = self.read(name)
        whole = None if into is None else into[: self.nbytes].view(self.dtype).view(self.shape)
        found = torch.empty(self.shape, dtype=self.dtype) if whole is None else whole
        levels = torch.tensor(MXFP4_LEVELS)
        byte = torch.arange(256)
        pairs = torch.stack((levels[byte & 15], levels[byte >> 4]), 1)
        blocks = codes.view(-1, MXFP4_BLOCK // 2)
        scales = _scales(exponents).view(-1, 1)
        lines = found.view(-1, MXFP4_BLOCK)
        for start in range(0, len(blocks), _AT_ONCE):
            part = slice(start, start + _AT_ONCE)
            lines[part] = pairs[blocks[part].int()].view(-1, MXFP4_BLOCK) * scales[part]
        return found


_NO_NUMBER = 255
"""The exponent that stands for no number (E8M0)."""
_AT_ONCE = 1 << 15
"""Blocks that are dequantized at a time."""


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
        _refuse("FP8 weights and their scales do not belong together", problems)
    for name in [n for n in entries if n.rpartition(".")[2] in OF_ACTIVATIONS]:
        del entries[name]


BLOCKS, EXPONENTS = "_blocks", "_scales"
"""How the names of the two tensors of a weight in MXFP4 end."""


def join_blocks(entries: dict[str, Entry], dtype: torch.dtype) -> None:
    """Put the blocks of each weight in MXFP4 together with their exponents, in place, under the
    name it has in 16 bits.

    Args:
        entries: of a checkpoint, by name.
        dtype: of what they stand for.

    Raises:
        ModelError: blocks and exponents that do not belong together; all in one message.
    """
    problems = []
    for name in [name for name in entries if name.endswith(BLOCKS)]:
        weight = name.removesuffix(BLOCKS)
        codes, exponents = entries[name], entries.get(weight + EXPONENTS)
        if exponents is None or weight in entries:
            missing = f"{weight}{EXPONENTS} is missing" if exponents is None else "in 16 bits, too"
            problems.append(f"{name}: {missing}")
        elif codes.shape != (*exponents.shape, MXFP4_BLOCK // 2) or len(codes.shape) < 3:
            problems.append(f"{name}: {list(codes.shape)}, exponents {list(exponents.shape)}")
        elif {codes.dtype, exponents.dtype} != {torch.uint8}:
            problems.append(f"{name}: {codes.dtype}, exponents {exponents.dtype}")
        else:
            del entries[name], entries[weight + EXPONENTS]
            entries[weight] = MXFP4Entry.of(codes, exponents, dtype)
    if problems:
        _refuse("MXFP4 blocks and their scales do not belong together", problems)


def _refuse(what: str, problems: list[str]) -> None:
    more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
    raise ModelError(
        what,
        found="; ".join(problems[:8]) + more,
        ways_out=["download the files again", "or use a 16-bit version of the model"],
    )


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
    if isinstance(entry, ScaledEntry | MXFP4Entry):
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

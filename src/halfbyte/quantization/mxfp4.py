"""Weights in MXFP4 held as they are stored, in an `NF4Tensor`.

Its levels are MXFP4's, and its scales are codes of a table of powers of two, so every operation on
4 bits computes with what they stand for.

Codes and exponents are the file's bytes; only the halves of a byte change places, and each 256
exponents get the 4 bytes of a nested scale that is one: 4.254 bits a weight.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..codebooks import MXFP4, MXFP4_BLOCK, MXFP4_LEVELS
from ..files.entries import Entry, MXFP4Entry
from .tensor import NESTED_BLOCK_SIZE, NF4Tensor


def is_held(entry: Entry) -> bool:
    """Whether what lies at an entry is held in the 4 bits it is stored in."""
    return isinstance(entry, MXFP4Entry)


@cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels, and what an exponent stands for (E8M0)."""
    powers = [2.0 ** (code - 127) for code in range(255)] + [float("nan")]
    return (
        torch.tensor(MXFP4_LEVELS, dtype=torch.float32, device=device),
        torch.tensor(powers, dtype=torch.float32, device=device),
    )


def read_held(entry: Entry, name: str) -> NF4Tensor:
    """The matrix at an entry in MXFP4, bit for bit.

    Raises:
        ModelError: a scale that is no number, or the file ends early.
    """
    assert isinstance(entry, MXFP4Entry)
    codes, exponents = entry.read(name)
    packed = ((codes << 4) | (codes >> 4)).view(-1)
    return _held(packed, exponents.view(-1), entry.shape, entry.dtype)


def empty_held(shape: tuple[int, ...], dtype: torch.dtype) -> NF4Tensor:
    """What `read_held` makes of a matrix of this shape, without memory (on ``meta``)."""
    count = torch.Size(shape).numel()
    meta: dict[str, Any] = {"dtype": torch.uint8, "device": "meta"}
    packed, exponents = torch.empty(count // 2, **meta), torch.empty(count // MXFP4_BLOCK, **meta)
    return _held(packed, exponents, shape, dtype)


def _held(
    packed: Tensor, exponents: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> NF4Tensor:
    levels, powers = _tables(packed.device)
    groups = -(-len(exponents) // NESTED_BLOCK_SIZE)
    parts = ops.FourBit(
        packed,
        exponents,
        levels,
        torch.ones(groups, device=packed.device),
        powers,
        torch.zeros((), device=packed.device),
        MXFP4_BLOCK,
        NESTED_BLOCK_SIZE,
    )
    return NF4Tensor(parts, torch.Size(shape), dtype, MXFP4)

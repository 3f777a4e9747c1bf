"""The `torch.library` namespace ``halfbyte`` and the chunk size plain-PyTorch passes work in."""

from collections.abc import Callable

import torch
from torch import Tensor

LIBRARY = torch.library.Library("halfbyte", "DEF")

CHUNK = 1 << 18
"""Weights handled at once by a plain-PyTorch pass: its buffers stay in the second-level cache (fp32: 1 MiB)."""


def define(schema: str, meaning: Callable, shapes: Callable) -> None:
    """Declare an operation: its schema, its plain-PyTorch meaning (all devices), its result on ``meta`` tensors."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, meaning, "CompositeExplicitAutograd")
    LIBRARY.impl(name, shapes, "Meta")


def as_wide(t: Tensor) -> Tensor:
    """The tensor in the width passes compute in: fp32, or fp64 where it is (the tests' reference)."""
    return t if t.dtype == torch.float64 else t.float()

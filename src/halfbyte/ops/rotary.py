"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864) on halves, as Llama lays them
out."""

import torch
from torch import Tensor

from . import cpu, cpu_calls, gpu, gpu_calls
from .fourbit import FLOATS
from .library import as_wide, define


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """Each head's halves (a, b) become (a cos1 - b sin1, b cos2 + a sin2), rounded once.

    Args:
        x: [T, heads, d], fp32, bf16 or fp16, d even.
        cos, sin: [T, d], of the same dtype; 1 and 2 are their halves.
        back: the transposed map, (a cos1 + b sin2, b cos2 - a sin1): the gradient.
    """
    if x.dtype not in FLOATS or not x.dtype == cos.dtype == sin.dtype:
        raise TypeError(
            f"rotate takes fp32, bf16 or fp16 of one kind, got {x.dtype}, {cos.dtype} and "
            f"{sin.dtype}"
        )
    if (
        x.dim() != 3
        or x.shape[2] % 2
        or cos.shape != (x.shape[0], x.shape[2])
        or sin.shape != cos.shape
    ):
        raise ValueError(
            f"cos {list(cos.shape)} and sin {list(sin.shape)} do not fit x {list(x.shape)}"
        )
    return torch.ops.halfbyte.rotate(x, cos, sin, back)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    a, b = as_wide(x).chunk(2, 2)
    (c1, c2), (s1, s2) = (as_wide(t).unsqueeze(1).chunk(2, 2) for t in (cos, sin))
    halves = (a * c1 + b * s2, b * c2 - a * s1) if back else (a * c1 - b * s1, b * c2 + a * s2)
    return torch.cat(halves, 2).to(x.dtype)


def _rotate_fake(x: Tensor, *args) -> Tensor:
    return x.new_empty(x.shape)


define("rotate(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor", _rotate, _rotate_fake)
cpu.register("rotate", _rotate, cpu_calls._rotate)


def _case(device: torch.device) -> tuple:
    x, cos, sin = (
        gpu.sample(device, *shape, seed=i) for i, shape in enumerate([(5, 3, 24), (5, 24), (5, 24)])
    )
    return x, cos, sin, False


gpu.register("rotate", _rotate, gpu_calls.rotate, _case)

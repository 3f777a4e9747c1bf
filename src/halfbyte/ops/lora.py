"""The skinny products of LoRA (Hu et al. 2021, arXiv:2106.09685): x through A, and the gradients of
A and B.

They do few operations for each byte they read, so each is one pass over x or dy, in which dropped
elements become zero.
"""

import torch
from torch import Tensor

from . import cpu, cpu_calls
from .dropout import NO_DROPOUT, Dropout, dropped, plan_dropping
from .fourbit import FLOATS
from .library import define


def lora_input(x: Tensor, a: Tensor, dropout: Dropout = NO_DROPOUT) -> Tensor:
    """u = drop(x) A^T, [..., r] in the dtype of x.

    Args:
        x: [..., in_features], fp32, bf16 or fp16.
        a: [r, in_features], rounded to the dtype of x.
        dropout: which elements of x count as zero; the factor 1 / (1 - p) is the caller's.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"LoRA computes in fp32, bf16 or fp16; the input is {x.dtype}")
    if a.dim() != 2 or a.shape[1] != x.shape[-1]:
        raise ValueError(f"A must be [r, {x.shape[-1]}], got {list(a.shape)}")
    return torch.ops.halfbyte.lora_input(x, a, list(dropout))


def lora_grads(
    dy: Tensor, x: Tensor, u: Tensor, b: Tensor, scale: float, dropout: Dropout = NO_DROPOUT
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y = u (s B)^T with u = drop(x) A^T.

    Args:
        dy: [..., out_features].
        x: [..., in_features].
        u: [..., r], from `lora_input`.
        b: [out_features, r]: s B, rounded to the dtype of dy.
        scale: s.
        dropout: the forward pass's.

    Returns:
        du [..., r] = dy (s B), of the dtype of dy; dA fp32 [r, in_features] = du^T drop(x); dB fp32
            [out_features, r] = s dy^T u.
    """
    if not dy.dtype == x.dtype == u.dtype or dy.dtype not in FLOATS:
        raise TypeError(f"dy, x and u must have one dtype, got {dy.dtype}, {x.dtype} and {u.dtype}")
    if not dy.shape[:-1] == x.shape[:-1] == u.shape[:-1]:
        raise ValueError(
            f"dy {list(dy.shape)}, x {list(x.shape)} and u {list(u.shape)} are not of the same "
            "tokens"
        )
    if b.shape != (dy.shape[-1], u.shape[-1]):
        raise ValueError(f"B must be [{dy.shape[-1]}, {u.shape[-1]}], got {list(b.shape)}")
    return torch.ops.halfbyte.lora_grads(dy, x, u, b, scale, list(dropout))


def _lora_input(x: Tensor, a: Tensor, dropout: list[int]) -> Tensor:
    return torch.nn.functional.linear(dropped(x, Dropout(*dropout)), a.to(x.dtype))


def _lora_input_fake(x: Tensor, a: Tensor, dropout: list[int]) -> Tensor:
    if dropout[0] and not cpu.serves(x):
        plan_dropping(x)
    return x.new_empty((*x.shape[:-1], a.shape[0]))


def _lora_grads(
    dy: Tensor, x: Tensor, u: Tensor, b: Tensor, scale: float, dropout: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    flat_dy, flat_u = dy.reshape(-1, dy.shape[-1]), u.reshape(-1, u.shape[-1])
    du = flat_dy @ b.to(dy.dtype)
    da = du.t() @ dropped(x, Dropout(*dropout)).reshape(-1, x.shape[-1])
    db = flat_dy.t() @ flat_u
    return du.view(u.shape), da.float(), db.float().mul_(scale)


def _lora_grads_fake(
    dy: Tensor, x: Tensor, u: Tensor, b: Tensor, scale: float, dropout: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    if dropout[0] and not cpu.serves(x):
        plan_dropping(x)
    rank = u.shape[-1]
    fp32 = torch.float32
    return (
        u.new_empty(u.shape),
        x.new_empty((rank, x.shape[-1]), dtype=fp32),
        dy.new_empty(b.shape, dtype=fp32),
    )


define("lora_input(Tensor x, Tensor a, int[] dropout) -> Tensor", _lora_input, _lora_input_fake)
define(
    "lora_grads(Tensor dy, Tensor x, Tensor u, Tensor b, float scale, int[] dropout) -> (Tensor, "
    "Tensor, Tensor)",
    _lora_grads,
    _lora_grads_fake,
)
cpu.register("lora_input", _lora_input, cpu_calls._lora_input)
cpu.register("lora_grads", _lora_grads, cpu_calls._lora_grads)

"""Causal attention of rows of tokens laid end to end, each row seeing only itself.

Only the output and the logarithm of each softmax's denominator are kept for the backward pass,
which computes the scores again (Dao et al. 2022, arXiv:2205.14135): memory grows with the number of
tokens, not with its square.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ledger import Part
from . import cpu, cpu_calls, gpu, gpu_calls
from .fourbit import FLOATS
from .library import as_wide, define, device_type, record_workspace


class AttentionParams(NamedTuple):
    """What a model does to its scores."""

    scale: float
    """Scores are multiplied by it; positive."""
    window: int = 0
    """Tokens a query sees at most, itself included; 0: all before it."""
    softcap: float = 0.0
    """Scores become c tanh(score / c); 0: they stay."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, params: AttentionParams
) -> tuple[Tensor, Tensor]:
    """softmax(scores) v within each row.

    Args:
        q: [T, heads, d];
        k, v: [T, kv_heads, d], heads a multiple of kv_heads; fp32, bf16 or fp16, with d contiguous.
        cu_seqlens: int32 [rows + 1] on the CPU, from 0 to T.

    Returns:
        out [T, heads, d] like q; lse fp32 [heads, T], the logarithms of the softmax's denominators.
    """
    _check(q, k, v, cu_seqlens)
    return torch.ops.halfbyte.attention(q, k, v, cu_seqlens, *params)


def attention_grad(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    params: AttentionParams,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attention` with respect to q, k and v. out, lse: its results."""
    _check(q, k, v, cu_seqlens)
    if dout.shape != q.shape or out.shape != q.shape or lse.shape != (q.shape[1], q.shape[0]):
        raise ValueError(
            f"gradient {list(dout.shape)}, out {list(out.shape)} or lse {list(lse.shape)} do not "
            "fit q"
        )
    return torch.ops.halfbyte.attention_grad(dout, q, k, v, cu_seqlens, out, lse, *params)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    if q.dtype not in FLOATS or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"attention takes fp32, bf16 or fp16 of one kind, got {q.dtype}, {k.dtype} and "
            f"{v.dtype}"
        )
    tokens, heads, dim = q.shape
    if (
        k.shape != v.shape
        or k.shape[0] != tokens
        or k.shape[2] != dim
        or not k.shape[1]
        or heads % k.shape[1]
    ):
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)} do not belong together"
        )
    if (
        cu_seqlens.dtype != torch.int32
        or cu_seqlens.dim() != 1
        or cu_seqlens.device.type not in ("cpu", "meta")
    ):
        raise ValueError(
            f"cu_seqlens must be int32 [rows + 1] on the CPU, got {cu_seqlens.dtype} on "
            f"{cu_seqlens.device}"
        )


def _seen(length: int, window: int, device: torch.device) -> Tensor:
    """bool [length, length]: True where a query (row) sees a key (column)."""
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return mask.triu(1 - min(window, length)) if window else mask


def _scores(
    q: Tensor, k: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """Scores [heads, L, L] in the dtype of q before and after the mask (fp64 stays: the tests'
    reference)."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    return scores, scores.masked_fill(~_seen(q.shape[0], window, q.device), float("-inf"))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    lengths, groups = cu_seqlens.diff().tolist(), q.shape[1] // k.shape[1]
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), []
    pieces = zip(*(t.split(lengths) for t in (q, k, v, out)), strict=True)
    for one_q, one_k, one_v, one_out in pieces:
        wide_k, wide_v = (as_wide(t).repeat_interleave(groups, 1) for t in (one_k, one_v))
        _, scores = _scores(as_wide(one_q), wide_k, scale, window, softcap)
        lse.append(scores.logsumexp(2))
        one_out.copy_(torch.einsum("hqk,khd->qhd", (scores - lse[-1].unsqueeze(2)).exp(), wide_v))
    return out, torch.cat(lse, 1) if lse else q.new_zeros((q.shape[1], 0), dtype=torch.float32)


def _attention_grad(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths, groups = cu_seqlens.diff().tolist(), q.shape[1] // k.shape[1]
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)]
    pieces = zip(
        *(t.split(lengths) for t in (dout, q, k, v, out, *grads)),
        lse.split(lengths, 1),
        strict=True,
    )
    for one_dout, one_q, one_k, one_v, one_out, dq, dk, dv, one_lse in pieces:
        wide_q, g = as_wide(one_q), as_wide(one_dout)
        wide_k, wide_v = (as_wide(t).repeat_interleave(groups, 1) for t in (one_k, one_v))
        free, scores = _scores(wide_q, wide_k, scale, window, softcap)
        p = (scores - one_lse.unsqueeze(2)).exp()
        delta = (g * as_wide(one_out)).sum(2).t()
        ds = p * (torch.einsum("qhd,khd->hqk", g, wide_v) - delta.unsqueeze(2)) * scale
        if softcap:
            ds = ds * (1 - (free / softcap).square())
        dq.copy_(torch.einsum("hqk,khd->qhd", ds, wide_k))
        for to, weights, values in ((dk, ds, wide_q), (dv, p, g)):
            each = torch.einsum("hqk,qhd->khd", weights, values)
            to.copy_(each.unflatten(1, (k.shape[1], groups)).sum(2))
    return grads[0], grads[1], grads[2]


def _fake(q: Tensor, *args) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


def _grad_fake(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *args
) -> tuple[Tensor, Tensor, Tensor]:
    if device_type(q) == "cuda":
        # flash attention sums dq in fp32 and what is left of each softmax, with room behind each
        # row, and gives dk and dv for every head of q
        tokens, heads, width = q.shape
        padded = tokens + 128 * (args[0].numel() - 1)
        record_workspace(
            Part.LIVE_LAYER,
            4 * padded * heads * (width + 1) + (2 * q.nbytes if heads != k.shape[1] else 0),
        )
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_PARAMS = "float scale, int window, float softcap"
define(
    f"attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, {_PARAMS}) -> (Tensor, Tensor)",
    _attention,
    _fake,
)
define(
    "attention_grad(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor out, "
    f"Tensor lse, {_PARAMS}) -> (Tensor, Tensor, Tensor)",
    _attention_grad,
    _grad_fake,
)
cpu.register("attention", _attention, cpu_calls._attention)
cpu.register("attention_grad", _attention_grad, cpu_calls._attention_grad)


# the small cases by which a GPU is judged


def _case(device: torch.device) -> tuple:
    q, k, v = (
        gpu.sample(device, 21, heads, 16, seed=seed) for seed, heads in ((0, 4), (1, 2), (2, 2))
    )
    return q, k, v, torch.tensor([0, 5, 6, 21], dtype=torch.int32), 0.25, 7, 0.0


def _usual_case(device: torch.device) -> tuple:
    *tensors, scale, _, softcap = _case(device)
    return *tensors, scale, 0, softcap


def _grad_of(case: gpu.Case) -> gpu.Case:
    def with_gradient(device: torch.device) -> tuple:
        q, *others = case(device)
        return (
            gpu.sample(device, *q.shape, seed=3),
            q,
            *others[:3],
            *_attention(q, *others),
            *others[3:],
        )

    return with_gradient


gpu.register("attention", _attention, gpu_calls.attention, _case, _usual_case)
gpu.register(
    "attention_grad",
    _attention_grad,
    gpu_calls.attention_grad,
    _grad_of(_case),
    _grad_of(_usual_case),
)

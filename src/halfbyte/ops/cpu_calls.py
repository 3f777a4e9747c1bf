"""Each operation as a call of the C++ library: pointers, sizes and results of its own memory."""

import math
from ctypes import c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from .arena import ARENA
from .cpu_library import _BYTES, _DTYPES, _FP32, _Attention, _Dropout, _FourBit, _pointer, call


def _weight(parts: Any, numel: int) -> tuple[_FourBit, list[Any]]:
    """The structure, and what must live as long as it does."""
    packed, absmax, quant_map, nested_absmax, nested_map, offset, block_size, nested_block_size = (
        parts
    )
    tensors = [
        None if t is None else t.contiguous()
        for t in (packed, absmax, quant_map, nested_absmax, nested_map)
    ]
    tensors.append(offset)
    pointers = [_pointer(t) for t in tensors]
    if nested_absmax is not None and not nested_absmax.numel():
        # an empty tensor has no address; that it is nested still has to be said
        pointers[3] = pointers[2]
    counts = (
        numel,
        packed.numel(),
        absmax.numel(),
        0 if nested_absmax is None else nested_absmax.numel(),
    )
    return _FourBit(*pointers, *counts, block_size, nested_block_size), tensors


def _quantize(
    library: Any, weight: Tensor, quant_map: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    flat, n = weight.contiguous(), weight.numel()
    quant_map = quant_map.contiguous()
    packed, absmax = torch.empty((n + 1) // 2, **_BYTES), torch.empty(-(-n // block_size), **_FP32)
    call(
        library,
        "hb_quantize",
        flat.data_ptr(),
        _DTYPES[flat.dtype],
        n,
        quant_map.data_ptr(),
        block_size,
        packed.data_ptr(),
        packed.numel(),
        absmax.data_ptr(),
        absmax.numel(),
        torch.get_num_threads(),
    )
    return packed, absmax


def _quantize_absmax(
    library: Any, absmax: Tensor, nested_quant_map: Tensor, nested_block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    absmax, table, blocks = absmax.contiguous(), nested_quant_map.contiguous(), absmax.numel()
    codes, nested_absmax = (
        torch.empty(blocks, **_BYTES),
        torch.empty(-(-blocks // nested_block_size), **_FP32),
    )
    offset = torch.empty((), **_FP32)
    call(
        library,
        "hb_quantize_absmax",
        absmax.data_ptr(),
        blocks,
        table.data_ptr(),
        nested_block_size,
        codes.data_ptr(),
        nested_absmax.data_ptr(),
        nested_absmax.numel(),
        offset.data_ptr(),
        torch.get_num_threads(),
    )
    return codes, nested_absmax, offset


def _dequantize(library: Any, *args: Any) -> None:
    *parts, out = args
    weight, _alive = _weight(parts, out.numel())
    call(
        library,
        "hb_dequantize",
        weight,
        out.data_ptr(),
        _DTYPES[out.dtype],
        out.numel(),
        torch.get_num_threads(),
    )


def _dropout(dropout: list[int]) -> _Dropout | None:
    return _numbers(dropout) if dropout[0] else None


def _numbers(dropout: list[int]) -> _Dropout:
    threshold, seed, step, micro_batch, layer, first = dropout
    return _Dropout(seed & 0x7FFFFFFFFFFFFFFF, first, step, micro_batch, layer, threshold)


def _dropout_mask(library: Any, out: Tensor, dropout: list[int]) -> None:
    call(
        library,
        "hb_dropout_mask",
        out.data_ptr(),
        out.numel(),
        _numbers(dropout),
        torch.get_num_threads(),
    )


def _lora_input(library: Any, x: Tensor, a: Tensor, dropout: list[int]) -> Tensor:
    x, a = x.contiguous(), a.to(x.dtype).contiguous()
    rank, width = a.shape
    u = ARENA.empty((*x.shape[:-1], rank), x.dtype)
    sizes = (math.prod(x.shape[:-1]), width)
    pointers = (x.data_ptr(), *sizes, a.data_ptr(), rank, _dropout(dropout), u.data_ptr())
    call(library, "hb_lora_input", *pointers, _DTYPES[x.dtype], torch.get_num_threads())
    return u


def _lora_grads(
    library: Any, dy: Tensor, x: Tensor, u: Tensor, b: Tensor, scale: float, dropout: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x, u, b = dy.contiguous(), x.contiguous(), u.contiguous(), b.to(dy.dtype).contiguous()
    rank = u.shape[-1]
    du = ARENA.empty(u.shape, u.dtype)
    da, db = ARENA.empty((rank, x.shape[-1]), torch.float32), ARENA.empty(b.shape, torch.float32)
    call(
        library,
        "hb_lora_grads",
        *(t.data_ptr() for t in (dy, x, u, b)),
        math.prod(x.shape[:-1]),
        x.shape[-1],
        dy.shape[-1],
        rank,
        scale,
        _dropout(dropout),
        *(t.data_ptr() for t in (du, da, db)),
        _DTYPES[dy.dtype],
        torch.get_num_threads(),
    )
    return du, da, db


def _linear(library: Any, x: Tensor, *args: Any) -> Tensor:
    *parts, out_features, bias, u, b = args
    return _product(
        library, "hb_linear", x, parts, x.shape[-1] * out_features, out_features, bias, u, b
    )


def _input_grad(library: Any, grad: Tensor, *args: Any) -> Tensor:
    *parts, in_features, du, a, dropout = args
    numel = grad.shape[-1] * in_features
    return _product(
        library,
        "hb_linear_input_grad",
        grad,
        parts,
        numel,
        in_features,
        None,
        du,
        a,
        _dropout(dropout),
    )


def _product(
    library: Any,
    name: str,
    x: Tensor,
    parts: Any,
    numel: int,
    columns: int,
    bias: Tensor | None,
    u: Tensor | None,
    low_rank: Tensor | None,
    dropout: _Dropout | None = None,
) -> Tensor:
    x = x.contiguous()
    extras = [None if t is None else t.to(x.dtype).contiguous() for t in (bias, u, low_rank)]
    out = ARENA.empty((*x.shape[:-1], columns), x.dtype)
    weight, _alive = _weight(parts, numel)
    tokens = math.prod(x.shape[:-1])
    backward = name == "hb_linear_input_grad"
    call(
        library,
        name,
        x.data_ptr(),
        tokens,
        x.shape[-1],
        columns,
        weight,
        *([] if backward else [_pointer(extras[0])]),
        _pointer(extras[1]),
        _pointer(extras[2]),
        0 if u is None else u.shape[-1],
        *([dropout] if backward else []),
        out.data_ptr(),
        _DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    return out


def _rms_norm(
    library: Any, x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    x, weight = x.contiguous(), weight.contiguous()
    y, inverse = ARENA.empty(x.shape, x.dtype), ARENA.empty(x.shape[:-1], torch.float32)
    sizes = (inverse.numel(), x.shape[-1])
    pointers = (
        x.data_ptr(),
        weight.data_ptr(),
        *sizes,
        eps,
        offset,
        cast_first,
        y.data_ptr(),
        inverse.data_ptr(),
    )
    call(library, "hb_rms_norm", *pointers, _DTYPES[x.dtype], torch.get_num_threads())
    return y, inverse


def _rms_norm_grad(
    library: Any, dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float
) -> Tensor:
    dy, x, weight, inverse = (t.contiguous() for t in (dy, x, weight, inverse))
    dx = ARENA.empty(x.shape, x.dtype)
    pointers = (
        *(t.data_ptr() for t in (dy, x, weight, inverse)),
        inverse.numel(),
        x.shape[-1],
        offset,
        dx.data_ptr(),
    )
    call(library, "hb_rms_norm_grad", *pointers, _DTYPES[x.dtype], torch.get_num_threads())
    return dx


def _rows(t: Tensor) -> tuple[Tensor, int]:
    """The tensor with rows at one stride, and that stride."""
    width = t.shape[-1]
    if t.stride(-1) == 1 or width == 1:
        stride = t.stride(-2) if t.dim() > 1 else width
        expected, fits = stride, stride >= width
        for size, found in zip(reversed(t.shape[:-1]), reversed(t.stride()[:-1]), strict=True):
            fits = fits and (size == 1 or found == expected)
            expected *= size
        if fits:
            return t, stride
    return t.contiguous(), width


def _gated(library: Any, gate: Tensor, up: Tensor, activation: int) -> Tensor:
    (gate, gate_stride), (up, up_stride) = _rows(gate), _rows(up)
    y = ARENA.empty(gate.shape, gate.dtype)
    sizes = (math.prod(gate.shape[:-1]), gate.shape[-1])
    pointers = (
        gate.data_ptr(),
        gate_stride,
        up.data_ptr(),
        up_stride,
        *sizes,
        activation,
        y.data_ptr(),
    )
    call(library, "hb_gated", *pointers, _DTYPES[gate.dtype], torch.get_num_threads())
    return y


def _gated_grad(
    library: Any, dy: Tensor, gate: Tensor, up: Tensor, activation: int
) -> tuple[Tensor, Tensor]:
    (gate, gate_stride), (up, up_stride), dy = _rows(gate), _rows(up), dy.contiguous()
    dgate, dup = (ARENA.empty(gate.shape, gate.dtype) for _ in range(2))
    sizes = (math.prod(gate.shape[:-1]), gate.shape[-1])
    pointers = (
        dy.data_ptr(),
        gate.data_ptr(),
        gate_stride,
        up.data_ptr(),
        up_stride,
        *sizes,
        activation,
    )
    outputs = (dgate.data_ptr(), dup.data_ptr(), _DTYPES[gate.dtype], torch.get_num_threads())
    call(library, "hb_gated_grad", *pointers, *outputs)
    return dgate, dup


def _rotate(library: Any, x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = ARENA.empty(x.shape, x.dtype)
    pointers = (*(t.data_ptr() for t in (x, cos, sin)), *x.shape, back, y.data_ptr())
    call(library, "hb_rotate", *pointers, _DTYPES[x.dtype], torch.get_num_threads())
    return y


def _cross_entropy(library: Any, logits: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    logits, labels = logits.contiguous(), labels.contiguous()
    losses = ARENA.empty(labels.shape, torch.float32)
    pointers = (
        logits.data_ptr(),
        labels.data_ptr(),
        *logits.shape,
        losses.data_ptr(),
        grad.data_ptr(),
    )
    call(library, "hb_cross_entropy", *pointers, _DTYPES[logits.dtype], torch.get_num_threads())
    return losses


def _heads(t: Tensor) -> Tensor:
    """[T, heads, d] with d contiguous and strides the library takes."""
    return t if (t.stride(2) == 1 or t.shape[2] == 1) and min(t.stride()) > 0 else t.contiguous()


def _attention_job(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[_Attention, list[Tensor]]:
    """The structure, and what must live as long as it does."""
    q, k, v, cu_seqlens = _heads(q), _heads(k), _heads(v), cu_seqlens.contiguous()
    strides = [n for t in (q, k, v) for n in t.stride()[:2]]
    sizes = (cu_seqlens.numel() - 1, q.shape[0], q.shape[1], k.shape[1], q.shape[2], window)
    pointers = [t.data_ptr() for t in (q, k, v)]
    return _Attention(*pointers, *strides, cu_seqlens.data_ptr(), *sizes, scale, softcap), [
        q,
        k,
        v,
        cu_seqlens,
    ]


def _attention(library: Any, q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    job, _alive = _attention_job(q, *args)
    out = ARENA.empty(q.shape, q.dtype)
    lse = ARENA.empty((q.shape[1], q.shape[0]), torch.float32)
    pointers = (job, out.data_ptr(), lse.data_ptr())
    call(library, "hb_attention_forward", *pointers, _DTYPES[q.dtype], torch.get_num_threads())
    return out, lse


def _attention_grad(library: Any, dout: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, cu_seqlens, out, lse, *params = args
    job, _alive = _attention_job(q, k, v, cu_seqlens, *params)
    dout, out, lse = _heads(dout), out.contiguous(), lse.contiguous()
    dq, dk, dv = (ARENA.empty(t.shape, q.dtype) for t in (q, k, v))
    pointers = (
        dout.data_ptr(),
        *dout.stride()[:2],
        *(t.data_ptr() for t in (out, lse, dq, dk, dv)),
    )
    call(
        library, "hb_attention_backward", job, *pointers, _DTYPES[q.dtype], torch.get_num_threads()
    )
    return dq, dk, dv


def _adamw_8bit_step(library: Any, params: list[Tensor], grads: list[Tensor], *rest: Any) -> None:
    *arena, lr, beta1, beta2, eps, weight_decay, step = rest
    m_codes, v_codes, m_absmax, v_absmax, m_map, v_map = arena
    grads = [g.contiguous() for g in grads]
    written = [p.contiguous() for p in params]
    count = len(params)
    pointers = c_void_p * count
    correction = (1 - beta2**step) ** 0.5
    call(
        library,
        "hb_adamw_8bit",
        pointers(*[p.data_ptr() for p in written]),
        pointers(*[g.data_ptr() for g in grads]),
        (c_int64 * count)(*[p.numel() for p in params]),
        count,
        *(t.data_ptr() for t in (m_codes, v_codes, m_absmax, v_absmax)),
        m_codes.numel(),
        m_map.data_ptr(),
        v_map.data_ptr(),
        lr * correction / (1 - beta1**step),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        eps * correction,
        1 - lr * weight_decay,
        torch.get_num_threads(),
    )
    for mine, theirs in zip(written, params, strict=True):
        if mine is not theirs and mine.data_ptr() != theirs.data_ptr():
            theirs.copy_(mine)

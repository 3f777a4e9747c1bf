"""Each operation as a launch of Triton kernels: shapes checked, grids chosen."""

import contextlib
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .gpu import computes, serves

TINY = 1e-38


@cache
def _kernels() -> Any:
    from . import triton_kernels

    return triton_kernels


def _launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, **constants: Any
) -> None:
    """Products and sums stay apart: contracted ones round once where the reference rounds twice.

    Triton launches on the current GPU, which need not be the one the tensors lie on.
    """
    device = next(a.device for a in args if isinstance(a, Tensor))
    offloaded = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if offloaded else contextlib.nullcontext():
        kernel[grid](*args, num_warps=warps, enable_fp_fusion=False, **constants)


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@cache
def _sorted_levels(levels: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Midpoints between neighbouring levels, fp32 [15], and the code of each rank, uint8 [16]."""
    table = torch.tensor(levels, dtype=torch.float32, device=device)
    ordered, codes = torch.sort(table, stable=True)
    return (ordered[1:] + ordered[:-1]) / 2, codes.to(torch.uint8)


def quantize_4bit(weight: Tensor, quant_map: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    flat = weight.reshape(-1)
    n = flat.numel()
    blocks = -(-n // block_size)
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    if n:
        cu_seqlens, codes = _sorted_levels(tuple(quant_map.tolist()), flat.device)
        rows = max(1, 2048 // block_size)
        sizes = {"BLOCK": block_size, "ROWS": rows, "TINY": TINY}
        _launch(
            _kernels().quantize,
            (-(-blocks // rows),),
            flat,
            cu_seqlens,
            codes,
            packed,
            absmax,
            n,
            blocks,
            **sizes,
        )
    return packed, absmax


def quantize_scales(
    absmax: Tensor, offset: Tensor, table: Tensor, group: int
) -> tuple[Tensor, Tensor]:
    """Codes and absolute maxima of groups of scales less their mean."""
    blocks = absmax.numel()
    groups = -(-blocks // group)
    codes = torch.empty(blocks, dtype=torch.uint8, device=absmax.device)
    nested = torch.empty(groups, dtype=torch.float32, device=absmax.device)
    if blocks:
        cu_seqlens = (table[1:] + table[:-1]) / 2
        sizes = {"GROUP": group, "TINY": TINY}
        _launch(
            _kernels().quantize_scales,
            (groups,),
            absmax,
            offset,
            cu_seqlens,
            codes,
            nested,
            blocks,
            **sizes,
        )
    return codes, nested


def _stored(parts: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Pointers and constants that every reader of 4-bit weights takes."""
    packed, absmax, levels, nested, nested_map, offset, _, group = parts
    double = nested is not None
    tables = (nested_map, nested, offset) if double else (levels, levels, levels)
    return (packed, absmax, levels, *tables), {"GROUP": group, "NESTED": double}


def dequantize_4bit(*args: Any) -> None:
    *parts, out = args
    n, block_size = out.numel(), parts[6]
    if not n:
        return
    tensors, constants = _stored(tuple(parts))
    blocks = -(-n // block_size)
    rows = max(1, 4096 // block_size)
    grid = (-(-blocks // rows),)
    sizes = {"BLOCK": block_size, "ROWS": rows, "WHOLE": n % block_size == 0}
    _launch(_kernels().dequantize, grid, *tensors, out, n, blocks, **sizes, **constants)


MATVEC_TOKENS = 8
"""Up to so many tokens weights are multiplied as they are read (a guess, until bench/gpu.py has
measured it)."""


def matvec(x: Tensor, parts: tuple[Any, ...], rows: int) -> Tensor:
    """x W^T, [tokens, rows], for a few tokens [tokens, columns], columns even."""
    tokens, columns = x.shape
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    tensors, constants = _stored(parts)
    block, width = parts[6], min(512, _power_of_two(columns // 2))
    aligned = columns % block == 0 and 2 * width % block == 0
    sizes = {"BLOCK": block, "ROWS": 4, "BYTES": width, "ALIGNED": aligned}
    _launch(
        _kernels().matvec,
        (-(-rows // 4), tokens),
        x,
        *tensors,
        y,
        rows,
        columns,
        **sizes,
        **constants,
    )
    return y


MOST_PLACES = 64
"""Tables kept: of an optimizer's groups and, where it is paged, of their windows."""
Addresses = tuple[tuple[int, ...], Tensor]
"""What identifies tensors (addresses, and sizes: a window of a tensor may begin where the whole
does), and per block of them the address of its first element, on their device."""
_places: dict[tuple[int, ...], tuple[Addresses, Addresses, Tensor]] = {}


def _addresses(tensors: list[Tensor], block: int) -> Addresses:
    each = [
        torch.arange(t.data_ptr(), t.data_ptr() + 4 * t.numel(), 4 * block, dtype=torch.int64)
        for t in tensors
        if t.numel()
    ]
    return _identity(tensors), torch.cat(each).to(tensors[0].device)


def _identity(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(number for t in tensors for number in (t.data_ptr(), t.numel()))


def _blocks_of(
    params: list[Tensor], grads: list[Tensor], block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per block of the arena: the addresses of its parameters and gradients, and how many there
    are.

    Parameters stay where they are; gradients may be others in every step.
    """
    key = _identity(params)
    if key not in _places:
        counts = []
        for t in params:
            whole, rest = divmod(t.numel(), block)
            counts += [
                torch.full((whole,), block, dtype=torch.int32),
                torch.tensor([rest] if rest else [], dtype=torch.int32),
            ]
        if len(_places) == MOST_PLACES:
            del _places[next(iter(_places))]
        _places[key] = (
            _addresses(params, block),
            _addresses(grads, block),
            torch.cat(counts).to(params[0].device),
        )
    of_params, of_grads, counts = _places[key]
    if of_grads[0] != _identity(grads):
        of_grads = _addresses(grads, block)
        _places[key] = (of_params, of_grads, counts)
    return of_params[1], of_grads[1], counts


def adamw_8bit_step(params: list[Tensor], grads: list[Tensor], *args: Any) -> None:
    m_codes, v_codes, m_absmax, v_absmax, m_map, v_map, lr, beta1, beta2, eps, decay, step = args
    if not m_codes.numel():
        return
    together = [g if g.is_contiguous() else g.contiguous() for g in grads]
    if any(not p.is_contiguous() for p in params):
        raise ValueError("parameters must be contiguous")
    correction2 = (1 - beta2**step) ** 0.5
    numbers = [beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * decay]
    numbers += [lr * correction2 / (1 - beta1**step), eps * correction2]
    places = _blocks_of(params, together, 256)
    cu_seqlens = ((m_map[1:] + m_map[:-1]) / 2, (v_map[1:] + v_map[:-1]) / 2)
    tensors = (*places, m_codes, v_codes, m_absmax, v_absmax, m_map, v_map, *cu_seqlens)
    _launch(
        _kernels().adamw_8bit, (m_codes.numel() // 256,), *tensors, *numbers, BLOCK=256, TINY=TINY
    )


def _dropping(
    kernel: Any, tensors: tuple[Tensor, ...], dropout: list[int], **constants: Any
) -> None:
    threshold, seed, step, micro_batch, layer, first = dropout
    seed &= 0x7FFFFFFFFFFFFFFF
    n = tensors[0].numel()
    counters = -(-(first % 8 + n) // 8)
    if n:
        # 0 and multiples of 16 before the first element, and they alone, let accesses be wide
        numbers = (
            first // 8,
            first % 8,
            threshold,
            layer,
            micro_batch,
            step,
            seed & 0xFFFFFFFF,
            seed >> 32,
        )
        _launch(kernel, (-(-counters // 256),), *tensors, n, *numbers, COUNTERS=256, **constants)


def dropout_mask(out: Tensor, dropout: list[int]) -> None:
    _dropping(_kernels().dropout_mask, (out.view(torch.int8),), dropout)


def drop(x: Tensor, dropout: list[int]) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _dropping(_kernels().drop, (x.contiguous(), out), dropout, ADD=False)
    return out


def add_dropped(total: Tensor, x: Tensor, dropout: list[int]) -> None:
    _dropping(_kernels().drop, (x.contiguous(), total), dropout, ADD=True)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    width, rows = x.shape[-1], x.numel() // max(x.shape[-1], 1)
    y = torch.empty_like(x)
    inverse = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    if x.numel():
        sizes = {"CAST_FIRST": cast_first, "WIDTH": _power_of_two(width)}
        _launch(
            _kernels().rms_norm,
            (rows,),
            x,
            weight,
            y,
            inverse,
            width,
            eps,
            offset,
            warps=8,
            **sizes,
        )
    return y, inverse


def rms_norm_grad(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float) -> Tensor:
    dy, x = dy.contiguous(), x.contiguous()
    width, rows = x.shape[-1], x.numel() // max(x.shape[-1], 1)
    dx = torch.empty_like(x)
    if x.numel():
        tensors = (dy, x, weight, inverse.contiguous(), dx)
        _launch(
            _kernels().rms_norm_grad,
            (rows,),
            *tensors,
            width,
            offset,
            warps=8,
            WIDTH=_power_of_two(width),
        )
    return dx


def _rows(t: Tensor) -> Tensor:
    """[rows, width], elements of a row side by side."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def gated(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    g, u = _rows(gate), _rows(up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        grid = (g.shape[0], -(-g.shape[1] // 1024))
        numbers = (g.shape[1], g.stride(0), u.stride(0))
        _launch(_kernels().gated, grid, g, u, y, *numbers, ACTIVATION=activation, WIDTH=1024)
    return y


def gated_grad(dy: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    d, g, u = dy.contiguous(), _rows(gate), _rows(up)
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    if d.numel():
        grid = (g.shape[0], -(-g.shape[1] // 1024))
        numbers = (g.shape[1], g.stride(0), u.stride(0))
        _launch(
            _kernels().gated_grad,
            grid,
            d,
            g,
            u,
            dgate,
            dup,
            *numbers,
            ACTIVATION=activation,
            WIDTH=1024,
        )
    return dgate, dup


def cross_entropy(logits: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    logits = _rows(logits)
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    if logits.numel():
        vocabulary = logits.shape[1]
        tensors = (logits, labels.contiguous(), losses, grad)
        piece = min(4096, _power_of_two(vocabulary))
        numbers = (vocabulary, logits.stride(0))
        _launch(
            _kernels().cross_entropy, (logits.shape[0],), *tensors, *numbers, warps=8, PIECE=piece
        )
    return losses


@lru_cache(maxsize=64)
def _rows_of(cu_seqlens: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """Boundaries of rows on the GPU, and the tokens of the longest: the same for every layer."""
    return torch.tensor(cu_seqlens, dtype=torch.int32, device=device), max(
        b - a for a, b in pairwise(cu_seqlens)
    )


def attends(query: Tensor, softcap: float | None) -> bool:
    """Whether PyTorch's flash attention serves queries [.., d] with rows of several lengths in one
    call."""
    fits = (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
    )
    if (
        not fits
        or softcap
        or not (computes(query, "attention") and computes(query, "attention_grad"))
    ):
        return False
    return query.is_meta or (serves("attention") and serves("attention_grad"))


def _flash(
    q: Tensor, cu_seqlens: Tensor, scale: float, window: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    rows, longest = _rows_of(tuple(cu_seqlens.tolist()), q.device)
    return (rows, rows, longest, longest, 0.0, True), {
        "scale": scale,
        "window_size_left": window - 1 if window else -1,
        "window_size_right": 0,
    }


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """By PyTorch's flash attention, whose softmax denominators are ours."""
    if softcap:
        raise ValueError("flash attention takes no softcap")
    if not q.numel():
        return torch.empty_like(q), q.new_empty((q.shape[1], 0), dtype=torch.float32)
    numbers, params = _flash(q, cu_seqlens, scale, window)
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *numbers, False, **params)
    return out, lse


def attention_grad(
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
    if softcap:
        raise ValueError("flash attention takes no softcap")
    if not q.numel():
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    numbers, params = _flash(q, cu_seqlens, scale, window)
    # without dropout the random state is not looked at
    random = (torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device))
    return torch.ops.aten._flash_attention_backward(
        dout.contiguous(), q, k, v, out, lse, *numbers, *random, **params
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    tokens, heads, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        tensors = (x, cos.contiguous(), sin.contiguous(), y)
        numbers = (heads, width // 2, x.stride(0), x.stride(1))
        half = _power_of_two(width // 2)
        warps = min(max(half // 32, 1), 4)
        _launch(
            _kernels().rotate,
            (tokens, heads),
            *tensors,
            *numbers,
            warps=warps,
            BACK=back,
            HALF=half,
        )
    return y

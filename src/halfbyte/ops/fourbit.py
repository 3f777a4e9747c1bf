"""Blockwise 4-bit quantization: the bytes of a bitsandbytes checkpoint, written and read in plain
PyTorch.

A tensor of n weights is flattened and cut into blocks of ``block_size`` (the last may be short).
Each block stores its absolute maximum in fp32, and each weight the index of the level of
``quant_map`` nearest to weight / absmax; the even weight of a pair is the high nibble. With double
quantization the absmax values, less their mean, are themselves cut into groups of 256 and coded
with 8 bits (QLoRA, section 3).

The code rule is bitsandbytes' on the CPU, so the bytes are equal: scaled = w * (1 / max(absmax,
1e-38)) in fp32 (in a short last block: w / absmax), code = number of level midpoints strictly below
it. The mean of the absmax values depends on the order of the sum; ours is a zero-padded halving
tree of elementwise adds, so that any backend and any number of threads gives the same bits
(`tree_sum`).

Roads not taken: one gather of a 16-entry table per weight is seven times slower on a CPU than one
gather of a 256-entry table of *pairs* (two fp32 viewed as one int64), which is what `_dequantize`
does.

One file because quantizing, dequantizing and multiplying share one layout of storage.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .. import codebooks
from ..ledger import Part
from . import cpu, cpu_calls, dequantized, gpu, gpu_calls
from .dropout import NO_DROPOUT, Dropout, add_dropped, plan_dropping
from .library import CHUNK, define, record_workspace
from .nearest import rank

TINY = 1e-38
_LEAST = torch.tensor([0x006CE3EE], dtype=torch.int32, device="cpu")
"""`TINY` as fp32, a subnormal number, by its bits: where such are flushed to zero, it cannot be
made from a number."""

NESTED = 256
MIN_BLOCK, MAX_BLOCK = 32, 4096
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def inverse(absmax: Tensor) -> Tensor:
    """1 / absmax, what a block is multiplied by; of a block of zeros 1: where subnormal numbers are
    flushed, `TINY` is 0, and 1 / 0 times 0 no number."""
    return 1.0 / absmax.clamp(min=TINY).where(absmax != 0, 1.0)


class FourBit(NamedTuple):
    """What a 4-bit tensor stores, in the order every operation takes it.

    packed: uint8 [ceil(n / 2)]. absmax: uint8 [blocks] if nested, else fp32 [blocks]. quant_map:
    fp32 [16]. nested_absmax: fp32 [ceil(blocks / nested_block_size)]; nested_quant_map: fp32 [256];
    nested_offset: fp32 [] (all three None unless nested).
    """

    packed: Tensor
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    nested_offset: Tensor | None
    block_size: int
    nested_block_size: int


STORAGE = (
    "Tensor packed, Tensor absmax, Tensor quant_map, Tensor? nested_absmax, Tensor? "
    "nested_quant_map, Tensor? nested_offset, int block_size, int nested_block_size"
)


def blocks_of(numel: int, block_size: int) -> int:
    return -(-numel // block_size)


def _check_block_size(block_size: int) -> None:
    if not (MIN_BLOCK <= block_size <= MAX_BLOCK and block_size & (block_size - 1) == 0):
        raise ValueError(
            f"block_size must be a power of two in {MIN_BLOCK}..{MAX_BLOCK}, got {block_size}"
        )


def check_storage(q: FourBit, numel: int) -> None:
    """Sizes and types of a stored tensor, so that no backend reads past an end."""
    _check_block_size(q.block_size)
    blocks = blocks_of(numel, q.block_size)
    expected: list[tuple[str, Tensor | None, torch.dtype, int]] = [
        ("packed", q.packed, torch.uint8, (numel + 1) // 2),
        ("quant_map", q.quant_map, torch.float32, 16),
        ("absmax", q.absmax, torch.float32 if q.nested_absmax is None else torch.uint8, blocks),
    ]
    if q.nested_absmax is not None:
        if q.nested_block_size < 1:
            raise ValueError(f"nested_block_size must be at least 1, got {q.nested_block_size}")
        groups = blocks_of(blocks, q.nested_block_size)
        expected += [
            ("nested_absmax", q.nested_absmax, torch.float32, groups),
            ("nested_quant_map", q.nested_quant_map, torch.float32, 256),
            ("nested_offset", q.nested_offset, torch.float32, 1),
        ]
    for name, tensor, dtype, count in expected:
        if tensor is None:
            raise ValueError(f"{name} is missing from a nested 4-bit tensor")
        if tensor.dtype != dtype or tensor.numel() != count:
            raise ValueError(
                f"{name} must be {dtype} with {count} elements, got {tensor.dtype} with "
                f"{tensor.numel()}"
            )


def tree_sum(values: Tensor) -> Tensor:
    """Sum of a 1-D fp32 tensor in an order that does not depend on threads or backend.

    Zero-padded to a power of two, then halves are added elementwise until one value is left.
    Returns fp32 [].
    """
    size = 1 << max(values.numel() - 1, 0).bit_length()
    padded = values.new_zeros(size)
    padded[: values.numel()] = values
    while padded.numel() > 1:
        half = padded.numel() // 2
        padded = padded[:half] + padded[half:]
    return padded[0]


def tree_mean(values: Tensor) -> Tensor:
    """`tree_sum` over the number of values, fp32 []; 0 of none."""
    if not values.numel():
        return values.new_zeros(())
    # by a tensor: on a GPU PyTorch does not divide by a number, it multiplies by the number's
    # reciprocal
    return tree_sum(values) / values.new_full((), float(values.numel()))


# --- quantize -------------------------------------------------------------------------------------


def quantize_4bit(weight: Tensor, quant_map: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of a tensor of any shape.

    Args:
        weight: fp32, bf16 or fp16, any shape; read in flattened (row-major) order.
        quant_map: fp32 [16], in code order, within [-1, 1].
        block_size: weights per scale, a power of two in 32..4096.

    Returns:
        packed uint8 [ceil(n / 2)] (an odd n leaves a padding nibble coding 0) and absmax fp32
            [ceil(n / block_size)].

    Raises:
        TypeError: weight is not a 16- or 32-bit float.
        ValueError: block size or table.
    """
    _check_block_size(block_size)
    if weight.dtype not in FLOATS:
        raise TypeError(f"4-bit quantization takes fp32, bf16 or fp16 weights, got {weight.dtype}")
    if quant_map.dtype != torch.float32 or quant_map.shape != (16,):
        raise ValueError(
            f"quant_map must be float32 [16], got {quant_map.dtype} {list(quant_map.shape)}"
        )
    return torch.ops.halfbyte.quantize_4bit(weight, quant_map, block_size)


def _midpoints(quant_map: Tensor) -> tuple[Tensor, Tensor | None]:
    """Boundaries between neighbouring levels, and the code of each rank where the table is not
    sorted."""
    ordered, codes = torch.sort(quant_map, stable=True)
    boundaries = (ordered[1:] + ordered[:-1]) / 2
    return boundaries, None if bool((ordered == quant_map).all()) else codes.to(torch.uint8)


def _pack(scaled: Tensor, boundaries: Tensor, codes_of_rank: Tensor | None) -> Tensor:
    """uint8 [n / 2] from scaled fp32 [n], n even."""
    codes = rank(scaled, boundaries)
    if codes_of_rank is not None:
        codes = codes_of_rank[codes.int()]
    return (codes[0::2] << 4) | codes[1::2]


def _quantize(weight: Tensor, quant_map: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    flat = weight.reshape(-1)
    n = flat.numel()
    packed = torch.empty((n + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks_of(n, block_size), dtype=torch.float32, device=flat.device)
    boundaries, codes_of_rank = _midpoints(quant_map)
    whole = n - n % block_size
    for start in range(0, whole, CHUNK):
        stop = min(start + CHUNK, whole)
        blocks = flat[start:stop].float().view(-1, block_size)
        scale = absmax[start // block_size : stop // block_size]
        torch.amax(blocks.abs(), 1, out=scale)
        scaled = blocks * inverse(scale).unsqueeze(1)
        packed[start // 2 : stop // 2] = _pack(scaled.view(-1), boundaries, codes_of_rank)
    if whole < n:
        tail = flat[whole:].float()
        most = tail.abs().amax()
        least = _LEAST.to(flat.device).view(torch.float32)[0]
        absmax[-1] = most.clamp(min=TINY).where(most != 0, least)
        scaled = functional.pad(
            tail / most.clamp(min=TINY).where(most != 0, 1.0), (0, (n - whole) % 2)
        )
        packed[whole // 2 :] = _pack(scaled, boundaries, codes_of_rank)
    return packed, absmax


def _quantize_fake(weight: Tensor, quant_map: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    n = weight.numel()
    return (
        weight.new_empty((n + 1) // 2, dtype=torch.uint8),
        weight.new_empty(blocks_of(n, block_size), dtype=torch.float32),
    )


def quantize_absmax(
    absmax: Tensor, nested_quant_map: Tensor, nested_block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization of the scales.

    Args:
        absmax: fp32 [blocks].
        nested_quant_map: fp32 [256], sorted.
        nested_block_size: scales per group.

    Returns:
        codes uint8 [blocks], nested_absmax fp32 [groups], nested_offset fp32 [] (the mean of
            absmax).
    """
    if absmax.dtype != torch.float32 or absmax.dim() != 1:
        raise ValueError(
            f"absmax must be float32 [blocks], got {absmax.dtype} {list(absmax.shape)}"
        )
    if nested_quant_map.dtype != torch.float32 or nested_quant_map.shape != (256,):
        raise ValueError("nested_quant_map must be float32 [256]")
    return torch.ops.halfbyte.quantize_absmax(absmax, nested_quant_map, nested_block_size)


def _quantize_absmax(
    absmax: Tensor, nested_quant_map: Tensor, nested_block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = absmax.numel()
    groups = blocks_of(blocks, nested_block_size)
    offset = tree_mean(absmax)
    centred = absmax.new_zeros(groups * nested_block_size)
    torch.sub(absmax, offset, out=centred[:blocks])
    grouped = centred.view(groups, nested_block_size)
    nested_absmax = grouped.abs().amax(1) if groups else absmax.new_zeros(0)
    scaled = (grouped * inverse(nested_absmax).unsqueeze(1)).view(-1)[:blocks]
    boundaries = (nested_quant_map[1:] + nested_quant_map[:-1]) / 2
    return rank(scaled, boundaries), nested_absmax, offset.clone()


def _quantize_absmax_fake(
    absmax: Tensor, nested_quant_map: Tensor, nested_block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    groups = blocks_of(absmax.numel(), nested_block_size)
    return (
        absmax.new_empty(absmax.shape, dtype=torch.uint8),
        absmax.new_empty(groups),
        absmax.new_empty(()),
    )


# --- dequantize -----------------------------------------------------------------------------------


def dequantize_4bit(
    q: FourBit, numel: int, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Values of a stored tensor, flat: level * absmax in fp32, rounded once to ``dtype``.

    Args:
        q: the stored parts.
        numel: number of weights.
        dtype: fp32, bf16 or fp16.
        out: [numel] of that dtype, contiguous, to write into; allocated where absent.

    Raises:
        ValueError: parts of the wrong size or type, or an unfit ``out``.
    """
    check_storage(q, numel)
    if dtype not in FLOATS:
        raise ValueError(f"dequantization gives fp32, bf16 or fp16, not {dtype}")
    if out is None:
        out = torch.empty(numel, dtype=dtype, device=q.packed.device)
    elif out.shape != (numel,) or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {dtype} [{numel}], got {out.dtype} {list(out.shape)}"
        )
    torch.ops.halfbyte.dequantize_4bit(*q, out)
    return out


def absmax_values(q: FourBit) -> Tensor:
    """Scales as fp32 [blocks], nested ones decoded: map[code] * nested_absmax + offset, each step
    rounded to fp32."""
    if q.nested_absmax is None:
        return q.absmax
    assert q.nested_quant_map is not None and q.nested_offset is not None
    values = q.nested_quant_map[q.absmax.int()]
    groups = q.nested_absmax.repeat_interleave(q.nested_block_size)[: values.numel()]
    return values.mul_(groups).add_(q.nested_offset)


def _dequantize(*args) -> None:
    *parts, out = args
    q = FourBit(*parts)
    n, device = out.numel(), out.device
    scales = absmax_values(q)
    byte = torch.arange(256, device=device)
    pairs = (
        torch.stack((q.quant_map[byte >> 4], q.quant_map[byte & 15]), 1).view(torch.int64).view(256)
    )
    whole = n - n % q.block_size
    gathered = torch.empty(min(CHUNK, max(n, 2)) // 2 + 1, dtype=torch.int64, device=device)
    for start in range(0, whole, CHUNK):
        stop = min(start + CHUNK, whole)
        buffer = gathered[: (stop - start) // 2]
        torch.index_select(pairs, 0, q.packed[start // 2 : stop // 2].int(), out=buffer)
        values = buffer.view(torch.float32).view(-1, q.block_size)
        scale = scales[start // q.block_size : stop // q.block_size].unsqueeze(1)
        if out.dtype == torch.float32:
            torch.mul(values, scale, out=out[start:stop].view(-1, q.block_size))
        else:
            out[start:stop].view(-1, q.block_size).copy_(values.mul_(scale))
    if whole < n:
        values = pairs[q.packed[whole // 2 :].int()].view(torch.float32)[: n - whole]
        out[whole:] = values * scales[-1]


def _dequantize_fake(*args) -> None:
    return None


# --- linear ---------------------------------------------------------------------------------------


def _plan_product(x: Tensor, parts: tuple, columns: int) -> None:
    """What a product takes beside its result: where the library does not compute, a whole
    dequantized weight."""
    width = x.shape[-1]
    if cpu.serves(x):
        cpu.plan_product(x, width)
        return
    dequantized.plan(parts, width * columns, x.dtype)
    if not gpu.computes(x, "dequantize_4bit"):
        # its scales in fp32, and what they are made of
        record_workspace(Part.DEQUANTIZED_WEIGHT, 3 * 4 * blocks_of(width * columns, parts[6]))


def linear_4bit(
    x: Tensor,
    q: FourBit,
    out_features: int,
    bias: Tensor | None = None,
    u: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """x W^T + bias + u b^T with W stored in 4 bits; the last term is LoRA's (u = s x A^T), added
    before rounding.

    Args:
        x: [..., in_features], fp32, bf16 or fp16: its dtype is the compute dtype and that of the
            result.
        q: the stored weight [out_features, in_features].
        bias: [out_features] or None.
        u: [..., r] and b: [out_features, r], or neither.
    """
    if x.dtype not in FLOATS:
        raise TypeError(f"a 4-bit linear computes in fp32, bf16 or fp16; the input is {x.dtype}")
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"bias must be [{out_features}], got {list(bias.shape)}")
    check_storage(q, out_features * x.shape[-1])
    _check_low_rank(x, u, b, (out_features, -1 if u is None else u.shape[-1]))
    return torch.ops.halfbyte.linear_4bit(x, *q, out_features, bias, u, b)


def _check_low_rank(
    x: Tensor, u: Tensor | None, weight: Tensor | None, shape: tuple[int, int]
) -> None:
    if (u is None) != (weight is None):
        raise ValueError("a low-rank term takes both its input and its weight")
    if (
        u is not None
        and weight is not None
        and (u.shape[:-1] != x.shape[:-1] or weight.shape != shape)
    ):
        raise ValueError(
            f"low-rank input {list(u.shape)} and weight {list(weight.shape)} do not fit "
            f"{list(x.shape)}"
        )


def _linear(x: Tensor, *args) -> Tensor:
    *parts, out_features, bias, u, b = args
    weight = dequantized.weight(tuple(parts), out_features, x.shape[-1], x.dtype, back=False)
    y = functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
    if u is not None:
        y.view(-1, out_features).addmm_(u.reshape(-1, u.shape[-1]).to(x.dtype), b.to(x.dtype).t())
    return y


def _linear_fake(x: Tensor, *args) -> Tensor:
    _plan_product(x, args[:8], args[-4])
    return x.new_empty((*x.shape[:-1], args[-4]))


def linear_4bit_input_grad(
    grad: Tensor,
    q: FourBit,
    in_features: int,
    du: Tensor | None = None,
    a: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
) -> Tensor:
    """grad W + drop(du a): the gradient of `linear_4bit` with respect to its input, the last term
    LoRA's.

    Args:
        grad: [..., out_features] in the compute dtype.
        q: the stored weight [out_features, in_features].
        du: [..., r] and a: [r, in_features], or neither.
        dropout: which elements get no gradient through LoRA.
    """
    if grad.dtype not in FLOATS:
        raise TypeError(
            f"a 4-bit linear computes in fp32, bf16 or fp16; the gradient is {grad.dtype}"
        )
    check_storage(q, grad.shape[-1] * in_features)
    _check_low_rank(grad, du, a, (-1 if du is None else du.shape[-1], in_features))
    return torch.ops.halfbyte.linear_4bit_input_grad(grad, *q, in_features, du, a, list(dropout))


def add_low_rank(dx: Tensor, du: Tensor, a: Tensor, dropout: Dropout) -> Tensor:
    """dx [..., in_features] += drop(du a), in place."""
    flat, du = dx.view(-1, dx.shape[-1]), du.reshape(-1, du.shape[-1]).to(dx.dtype)
    if dropout.threshold:
        add_dropped(flat, du @ a.to(dx.dtype), dropout)
    else:
        flat.addmm_(du, a.to(dx.dtype))
    return dx


def _input_grad(grad: Tensor, *args) -> Tensor:
    *parts, in_features, du, a, dropout = args
    weight = dequantized.weight(tuple(parts), grad.shape[-1], in_features, grad.dtype, back=True)
    dx = torch.matmul(grad, weight)
    return dx if du is None else add_low_rank(dx, du, a, Dropout(*dropout))


def _input_grad_fake(grad: Tensor, *args) -> Tensor:
    _plan_product(grad, args[:8], args[-4])
    dx = grad.new_empty((*grad.shape[:-1], args[-4]))
    if args[-1][0] and args[-3] is not None and not cpu.serves(grad):
        plan_dropping(dx)
        if not gpu.computes(grad, "add_dropped"):
            # LoRA's term, with what is dropped and without
            record_workspace(Part.LIVE_LAYER, dx.nbytes)
    return dx


define(
    "quantize_4bit(Tensor weight, Tensor quant_map, int block_size) -> (Tensor, Tensor)",
    _quantize,
    _quantize_fake,
)
define(
    "quantize_absmax(Tensor absmax, Tensor nested_quant_map, int nested_block_size) -> (Tensor, "
    "Tensor, Tensor)",
    _quantize_absmax,
    _quantize_absmax_fake,
)
define(f"dequantize_4bit({STORAGE}, Tensor(a!) out) -> ()", _dequantize, _dequantize_fake)
define(
    f"linear_4bit(Tensor x, {STORAGE}, int out_features, Tensor? bias, Tensor? u, Tensor? b) -> "
    "Tensor",
    _linear,
    _linear_fake,
)
define(
    f"linear_4bit_input_grad(Tensor grad, {STORAGE}, int in_features, Tensor? du, Tensor? a, "
    "int[] dropout) -> Tensor",
    _input_grad,
    _input_grad_fake,
)
cpu.register("quantize_4bit", _quantize, cpu_calls._quantize)
cpu.register("quantize_absmax", _quantize_absmax, cpu_calls._quantize_absmax)
cpu.register("dequantize_4bit", _dequantize, cpu_calls._dequantize)
cpu.register("linear_4bit", _linear, cpu_calls._linear)
cpu.register("linear_4bit_input_grad", _input_grad, cpu_calls._input_grad)


# --- on a GPU ---


def quantize_absmax_by_triton(
    absmax: Tensor, nested_quant_map: Tensor, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    offset = tree_mean(absmax)
    return *gpu_calls.quantize_scales(absmax, offset, nested_quant_map, group), offset.clone()


def linear_by_triton(x: Tensor, *args) -> Tensor:
    """A few tokens are multiplied with weights as they are read; for more the weight is dequantized
    first."""
    *parts, rows, bias, u, b = args
    flat = x.reshape(-1, x.shape[-1])
    if not 0 < flat.shape[0] <= gpu_calls.MATVEC_TOKENS or x.shape[-1] % 2:
        return _linear(x, *args)
    y = gpu_calls.matvec(flat.contiguous(), tuple(parts), rows)
    if bias is not None:
        y += bias.to(y.dtype)
    if u is not None:
        y.addmm_(u.reshape(-1, u.shape[-1]).to(y.dtype), b.to(y.dtype).t())
    return y.view(*x.shape[:-1], rows)


# the small cases by which it is judged


def _weight_case(device: torch.device) -> tuple:
    levels = torch.tensor(codebooks.levels("nf4"), dtype=torch.float32, device=device)
    return gpu.sample(device, 37, 45), levels, 64


def _scales_case(device: torch.device) -> tuple:
    table = torch.tensor(codebooks.dynamic_map(signed=True), dtype=torch.float32, device=device)
    return gpu.sample(device, 700, wide=True).abs(), table, NESTED


def _stored_case(device: torch.device, rows: int = 37, columns: int = 46) -> tuple:
    weight, levels, block_size = _weight_case(device)
    weight = weight.reshape(-1).repeat(2)[: rows * columns]
    packed, absmax = _quantize(weight, levels, block_size)
    _, table, group = _scales_case(device)
    return packed, *_quantize_absmax(absmax, table, group), levels, table, block_size


def _dequantize_case(device: torch.device) -> tuple:
    packed, codes, nested, offset, levels, table, block_size = _stored_case(device)
    out = torch.empty(37 * 46, dtype=gpu.sample(device, 1).dtype, device=device)
    return packed, codes, levels, nested, table, offset, block_size, NESTED, out


def _usual_case(device: torch.device) -> tuple:
    """Whole blocks; scales in fp32."""
    weight, levels, block_size = _weight_case(device)
    packed, absmax = _quantize(weight.reshape(-1)[: 12 * 128], levels, block_size)
    out = torch.empty(12 * 128, dtype=weight.dtype, device=device)
    return packed, absmax, levels, None, None, None, block_size, NESTED, out


def _linear_case(device: torch.device) -> tuple:
    *parts, _ = _dequantize_case(device)
    x, bias = gpu.sample(device, 2, 46, seed=1), gpu.sample(device, 37, seed=2)
    return x, *parts, 37, bias, gpu.sample(device, 2, 4, seed=3), gpu.sample(device, 37, 4, seed=4)


def _usual_linear_case(device: torch.device) -> tuple:
    *parts, _ = _usual_case(device)
    return gpu.sample(device, 1, 128, seed=1), *parts, 12, None, None, None


gpu.register("quantize_4bit", _quantize, gpu_calls.quantize_4bit, _weight_case)
gpu.register("quantize_absmax", _quantize_absmax, quantize_absmax_by_triton, _scales_case)
gpu.register(
    "dequantize_4bit", _dequantize, gpu_calls.dequantize_4bit, _dequantize_case, _usual_case
)
gpu.register("linear_4bit", _linear, linear_by_triton, _linear_case, _usual_linear_case)

"""One AdamW step with moments in 8 bits, over many tensors at once.

Each moment is stored per block of 256 values as codes of a dynamic map and an fp32 absolute maximum
(Dettmers et al. 2022, "8-bit optimizers via block-wise quantization", arXiv:2110.02861). All
tensors share one arena: tensor after tensor, each padded to whole blocks, so one call moves them
all and a block never crosses a tensor. Unlike the article's, a second moment is stored as zero only
where it is zero (docs/log.md, 2026-11-29).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import codebooks
from ..ledger import Part
from . import cpu, cpu_calls, gpu, gpu_calls
from .fourbit import inverse
from .library import define, record_workspace
from .nearest import rank

BLOCK = 256
_CHUNK = 1 << 18
_GROUP = 1 << 22
"""Elements of parameters copied together."""


def adamw_update(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    t: int,
) -> None:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2) in place on fp32 tensors of one shape; t counts
    from 1.

    The bias corrections are folded into the step size and eps as bitsandbytes does it. Every
    operation here rounds once: PyTorch's fused ones (add with alpha, addcmul, addcdiv) round as the
    processor at hand fuses them, and could not be met bit for bit by another backend. Its fp32
    square root on CPUs is not the nearest number in a fifth of all cases; through fp64 it is.
    """
    correction2 = (1 - beta2**t) ** 0.5
    step_size = lr * correction2 / (1 - beta1**t)
    m.mul_(beta1).add_(g * (1 - beta1))
    v.mul_(beta2).add_((g * g).mul_(1 - beta2))
    p.mul_(1 - lr * decay).sub_(
        (m * step_size).div_(v.double().sqrt_().float().add_(eps * correction2))
    )


def adamw_8bit_step(
    params: list[Tensor],
    grads: list[Tensor],
    m_codes: Tensor,
    v_codes: Tensor,
    m_absmax: Tensor,
    v_absmax: Tensor,
    m_map: Tensor,
    v_map: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """Update params in place and their moments in the arena.

    Args:
        params, grads: fp32 tensors, pairwise of one shape.
        m_codes, v_codes: uint8 [arena], arena = sum of the tensors' sizes rounded up to 256.
        m_absmax, v_absmax: fp32 [arena / 256].
        m_map: signed dynamic map;
        v_map: unsigned; both fp32 [256].
        step: counts from 1.
    """
    arena = sum(padded_size(p.numel()) for p in params)
    for name, tensor, dtype, count in (
        ("m_codes", m_codes, torch.uint8, arena),
        ("v_codes", v_codes, torch.uint8, arena),
        ("m_absmax", m_absmax, torch.float32, arena // BLOCK),
        ("v_absmax", v_absmax, torch.float32, arena // BLOCK),
    ):
        if tensor.dtype != dtype or tensor.numel() != count:
            raise ValueError(
                f"{name} must be {dtype} [{count}], got {tensor.dtype} {list(tensor.shape)}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")
    for name, table in (("m_map", m_map), ("v_map", v_map)):
        if table.dtype != torch.float32 or table.shape != (256,) or not table.is_contiguous():
            raise ValueError(
                f"{name} must be contiguous fp32 [256], got {table.dtype} {list(table.shape)}"
            )
    fp32 = all(t.dtype == torch.float32 for t in (*params, *grads))
    if not fp32 or any(p.shape != g.shape for p, g in zip(params, grads, strict=True)):
        raise ValueError("parameters and gradients must be fp32, pairwise of one shape")
    torch.ops.halfbyte.adamw_8bit_step(
        params,
        grads,
        m_codes,
        v_codes,
        m_absmax,
        v_absmax,
        m_map,
        v_map,
        lr,
        *betas,
        eps,
        weight_decay,
        step,
    )


def padded_size(numel: int) -> int:
    """Elements a tensor takes in the arena."""
    return -(-numel // BLOCK) * BLOCK


def decode(codes: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    """fp32 [n] from uint8 [n] and fp32 [n / 256]."""
    return table.index_select(0, codes.int()).view(-1, BLOCK).mul_(absmax.unsqueeze(1)).view(-1)


def _encode(values: Tensor, codes: Tensor, absmax: Tensor, table: Tensor, least: int = 0) -> None:
    """The nearest code of each value relative to its block's absolute maximum, written in place.

    Args:
        least: the code that a value which is not zero has at least. Of second moments 1: stored as
            zero beside a first moment that is not, one lets its weight go up to m / eps at once.
    """
    blocks = values.view(-1, BLOCK)
    torch.amax(blocks.abs(), 1, out=absmax)
    scaled = blocks * inverse(absmax).unsqueeze(1)
    cu_seqlens = (table[1:] + table[:-1]) / 2
    found = rank(scaled.view(-1), cu_seqlens)
    codes.copy_(found.clamp(min=least).where(values != 0, found) if least else found)


def _gather(tensors: list[Tensor], arena: int) -> Tensor:
    """The tensors in one fp32 arena, padding zero."""
    flat = tensors[0].new_zeros(arena)
    for part, tensor in zip(
        flat.split([padded_size(t.numel()) for t in tensors]), tensors, strict=True
    ):
        part[: tensor.numel()] = tensor.reshape(-1)
    return flat


def _adamw_8bit_step(
    params: list[Tensor],
    grads: list[Tensor],
    m_codes: Tensor,
    v_codes: Tensor,
    m_absmax: Tensor,
    v_absmax: Tensor,
    m_map: Tensor,
    v_map: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    first = 0
    for group, their_grads in _groups(params, grads):
        size = sum(padded_size(p.numel()) for p in group)
        p, g = _gather(group, size), _gather(their_grads, size)
        for start in range(0, size, _CHUNK):
            inside = slice(start, min(start + _CHUNK, size))
            here = slice(first + inside.start, first + inside.stop)
            blocks = slice(here.start // BLOCK, here.stop // BLOCK)
            m = decode(m_codes[here], m_absmax[blocks], m_map)
            v = decode(v_codes[here], v_absmax[blocks], v_map)
            adamw_update(p[inside], g[inside], m, v, lr, beta1, beta2, eps, weight_decay, step)
            _encode(m, m_codes[here], m_absmax[blocks], m_map)
            _encode(v, v_codes[here], v_absmax[blocks], v_map, least=1)
        for part, param in zip(
            p.split([padded_size(t.numel()) for t in group]), group, strict=True
        ):
            param.copy_(part[: param.numel()].view_as(param))
        first += size


def _groups(
    params: list[Tensor], grads: list[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Neighbours that are moved together: many small tensors at once, and never copies of all of
    them."""
    start, size = 0, 0
    for i, p in enumerate(params):
        if i > start and size + p.numel() > _GROUP:
            yield params[start:i], grads[start:i]
            start, size = i, 0
        size += p.numel()
    if params:
        yield params[start:], grads[start:]


def _adamw_8bit_step_fake(params: list[Tensor], *args) -> None:
    if params and not (cpu.serves(params[0]) or gpu.computes(params[0], "adamw_8bit_step")):
        most = max(
            sum(padded_size(p.numel()) for p in group) for group, _ in _groups(params, params)
        )
        record_workspace(Part.OPTIMIZER, 2 * 4 * most)


define(
    "adamw_8bit_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!) m_codes, Tensor(c!) v_codes, "
    "Tensor(d!) m_absmax, Tensor(e!) v_absmax, Tensor m_map, Tensor v_map, float lr, float beta1, "
    "float beta2, float eps, float weight_decay, int step) -> ()",
    _adamw_8bit_step,
    _adamw_8bit_step_fake,
)
cpu.register("adamw_8bit_step", _adamw_8bit_step, cpu_calls._adamw_8bit_step)


def _case(device: torch.device) -> tuple:
    """Three tensors and their state before a second step."""
    params = [
        gpu.sample(device, *shape, wide=True, seed=i)
        for i, shape in enumerate([(300,), (16, 33), (1,)])
    ]
    grads = [gpu.sample(device, *p.shape, wide=True, seed=9 + i) for i, p in enumerate(params)]
    arena = sum(padded_size(p.numel()) for p in params)
    codes = [torch.zeros(arena, dtype=torch.uint8, device=device) for _ in range(2)]
    absmax = [torch.zeros(arena // BLOCK, device=device) for _ in range(2)]
    signs = (True, False)
    maps = [
        torch.tensor(codebooks.dynamic_map(signed=s), dtype=torch.float32, device=device)
        for s in signs
    ]
    numbers = (1e-2, 0.9, 0.999, 1e-8, 0.1)
    arguments: list = [params, grads, *codes, *absmax, *maps, *numbers]
    _adamw_8bit_step(*arguments, step=1)
    return *arguments, 2


def _still_case(device: torch.device) -> tuple:
    """No gradient and no state: an adapter's A in its first step."""
    params, grads, *others, _ = _case(device)
    state = [torch.zeros_like(t) for t in others[:4]]
    return params, [torch.zeros_like(g) for g in grads], *state, *others[4:], 1


gpu.register("adamw_8bit_step", _adamw_8bit_step, gpu_calls.adamw_8bit_step, _case, _still_case)

"""Dropout masks as a function of counters, so that they are recomputed instead of stored.

A mask is needed in the forward pass, again where a checkpointed layer is recomputed, and in the
backward pass. Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns
(key, counter) into random words without any state: Philox4x32 with 7 rounds is the shortest that
passes BigCrush. Each 32-bit word serves two elements: element i of a mask uses the counter (i // 8,
layer, micro_batch, step), word (i % 8) // 2, the low half first, and is dropped if its 16 bits,
unsigned, are below the threshold round(p * 65536). A part of a tensor says with which element of
the whole it begins, so that its mask is that part of the whole's.

Everything is integer arithmetic, so every backend gives the same bits. The arithmetic here is int64
because PyTorch has no unsigned 32-bit multiply; the products wrap, and only their low and high 32
bits are used.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ledger import Part
from . import cpu, cpu_calls, gpu, gpu_calls
from .library import define, record_workspace

DROPOUT_RESOLUTION = 65536
ROUNDS = 7
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
_COUNTERS = 1 << 16
"""Counters per pass: four int64 lanes of them stay within the second-level cache."""


def drop_threshold(p: float) -> int:
    """The threshold for drop probability p; the exact probability is threshold / 65536.

    Raises:
        ValueError: p is not in [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout probability must be in [0, 1), got {p}")
    return min(round(p * DROPOUT_RESOLUTION), DROPOUT_RESOLUTION - 1)


class Dropout(NamedTuple):
    """Which elements of a tensor are dropped: a function of these numbers and of an element's
    index."""

    threshold: int
    """Of 65536 (`drop_threshold`); 0: nothing is dropped."""
    seed: int
    """63 bits."""
    step: int
    micro_batch: int
    layer: int
    first: int = 0
    """The mask's element that belongs to the tensor's first."""


NO_DROPOUT = Dropout(0, 0, 0, 0, 0)


def dropout_mask(numel: int, dropout: Dropout, device: torch.device) -> Tensor:
    """bool [numel], True where the element is kept.

    Raises:
        ValueError: a counter that does not fit in 32 bits, or an element beyond 2^35.
    """
    _check(numel, dropout)
    out = torch.empty(numel, dtype=torch.bool, device=device)
    torch.ops.halfbyte.dropout_mask(out, list(dropout))
    return out


def _check(numel: int, dropout: Dropout) -> None:
    if dropout.first < 0 or dropout.first + numel > 1 << 35:
        raise ValueError(f"a mask has elements 0 to 2^35, got {numel} from {dropout.first} on")
    for name in ("step", "micro_batch", "layer"):
        value = getattr(dropout, name)
        if not 0 <= value <= _MASK:
            raise ValueError(f"{name} must fit in 32 bits, got {value}")


def dropped(x: Tensor, dropout: Dropout) -> Tensor:
    """x times its mask: zero where an element is dropped.

    Raises:
        ValueError: as `dropout_mask`.
    """
    if not dropout.threshold:
        return x
    _check(x.numel(), dropout)
    return torch.ops.halfbyte.drop(x, list(dropout))


def add_dropped(total: Tensor, x: Tensor, dropout: Dropout) -> Tensor:
    """total += x times its mask, in place.

    Args:
        total: contiguous, of the shape and dtype of x.

    Raises:
        ValueError: as `dropout_mask`, or an unfit total.
    """
    _check(x.numel(), dropout)
    if total.shape != x.shape or total.dtype != x.dtype or not total.is_contiguous():
        raise ValueError(
            f"total must be contiguous {x.dtype} {list(x.shape)}, got {total.dtype} "
            f"{list(total.shape)}"
        )
    torch.ops.halfbyte.add_dropped(total, x, list(dropout))
    return total


def plan_dropping(x: Tensor) -> None:
    """Say, in a fake, what x without its dropped elements takes: without Triton its mask, too."""
    record_workspace(
        Part.LIVE_LAYER, x.numel() * (x.element_size() + (not gpu.computes(x, "drop")))
    )


def philox(counter0: Tensor, counters: tuple[int, int, int], key: tuple[int, int]) -> list[Tensor]:
    """Philox4x32-7 of (counter0[i], *counters): four int64 tensors whose low 32 bits are the words.

    Words are masked to 32 bits only where the next product needs it. In the first two rounds three
    counters are still plain numbers, which saves a fifth of the passes.
    """
    c0: Tensor | int = counter0
    c1: Tensor | int = counters[0]
    c2: Tensor | int = counters[1]
    c3: Tensor | int = counters[2]
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = _mix(p1, c1, k0), _mix(p0, c3, k1)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c for c in (c0, c1, c2, c3) if isinstance(c, Tensor)]


def _mix(product: Tensor | int, other: Tensor | int, key: int) -> Tensor | int:
    """The high 32 bits of the product, xor other, xor key."""
    if isinstance(product, int):
        return ((product >> 32) ^ key ^ other) & _MASK
    high = product >> 32
    if isinstance(other, int):
        return high.bitwise_xor_((other & _MASK) ^ key).bitwise_and_(_MASK)
    return high.bitwise_xor_(other).bitwise_xor_(key).bitwise_and_(_MASK)


def _dropout_mask(out: Tensor, dropout: list[int]) -> None:
    d, n = Dropout(*dropout), out.numel()
    inside = d.first % 8
    if inside:  # whole counters, of which the first few elements are another part's
        whole = torch.empty(inside + n, dtype=torch.bool, device=out.device)
        _dropout_mask(whole, list(d._replace(first=d.first - inside)))
        out.copy_(whole[inside:])
        return
    seed = d.seed & 0x7FFFFFFFFFFFFFFF
    key = (seed & _MASK, seed >> 32)
    for start in range(0, n, 8 * _COUNTERS):
        stop = min(start + 8 * _COUNTERS, n)
        c0 = torch.arange(
            (d.first + start) // 8, -(-(d.first + stop) // 8), dtype=torch.int64, device=out.device
        )
        words = torch.empty(len(c0), 4, dtype=torch.int32, device=out.device)
        for lane, word in enumerate(philox(c0, (d.layer, d.micro_batch, d.step), key)):
            words[:, lane] = word
        halves = words.view(torch.int16).view(-1)[: stop - start]
        # unsigned comparison of 16-bit halves in signed arithmetic: flip the sign bit on both sides
        torch.ge(halves.bitwise_xor_(-32768), d.threshold - 32768, out=out[start:stop])


def _drop(x: Tensor, dropout: list[int]) -> Tensor:
    return x * dropout_mask(x.numel(), Dropout(*dropout), x.device).view_as(x)


def _add_dropped(total: Tensor, x: Tensor, dropout: list[int]) -> None:
    total.add_(_drop(x, dropout))


def _nothing(*args) -> None:
    return None


def _drop_fake(x: Tensor, dropout: list[int]) -> Tensor:
    return x.new_empty(x.shape)


define("dropout_mask(Tensor(a!) out, int[] dropout) -> ()", _dropout_mask, _nothing)
define("drop(Tensor x, int[] dropout) -> Tensor", _drop, _drop_fake)
define("add_dropped(Tensor(a!) total, Tensor x, int[] dropout) -> ()", _add_dropped, _nothing)
cpu.register("dropout_mask", _dropout_mask, cpu_calls._dropout_mask)


def example(device: torch.device) -> tuple:
    """The small case by which a GPU is judged."""
    numbers = Dropout(drop_threshold(0.4), (1 << 61) + 7, 1, 3, 1 << 31, 13)
    return torch.zeros(1001, dtype=torch.bool, device=device), list(numbers)


def _drop_case(device: torch.device) -> tuple:
    return gpu.sample(device, 13, 77), example(device)[1]


def _usual_case(device: torch.device) -> tuple:
    return gpu.sample(device, 16, 64), list(Dropout(drop_threshold(0.05), 42, 3, 1, 7))


def _adding(case: gpu.Case) -> gpu.Case:
    def both(device: torch.device) -> tuple:
        x, numbers = case(device)
        return gpu.sample(device, *x.shape, seed=1), x, numbers

    return both


gpu.register("dropout_mask", _dropout_mask, gpu_calls.dropout_mask, example)
gpu.register("drop", _drop, gpu_calls.drop, _drop_case, _usual_case)
gpu.register(
    "add_dropped", _add_dropped, gpu_calls.add_dropped, _adding(_drop_case), _adding(_usual_case)
)

"""Tests of `engine.adamw8bit`."""

import copy
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import bitsandbytes
import pytest
import torch
from torch import nn

from halfbyte.codebooks import dynamic_map
from halfbyte.engine.adamw8bit import AdamW8bit
from halfbyte.engine.paged_optimizers import PagedAdamW, PagedAdamW8bit


def test_8bit_adamw_is_within_bitsandbytes_own_acceptance():
    """50 steps against torch's AdamW: mean parameter error below 6e-5 (their test's bound for
    fp32)."""
    torch.manual_seed(0)
    start = torch.randn(256, 1024) * 0.1
    ours, reference = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = AdamW8bit([ours], lr=1e-3, weight_decay=0.01)
    theirs = torch.optim.AdamW([reference], lr=1e-3, weight_decay=0.01)
    for step in range(50):
        grad = torch.randn(256, 1024, generator=torch.Generator().manual_seed(step)) * 0.01
        ours.grad, reference.grad = grad.clone(), grad.clone()
        mine.step()
        theirs.step()
        error = float((ours - reference).abs().mean())
        assert error < 6e-5, (step, error)
        with torch.no_grad():
            # as their test does: each step is judged alone, from equal parameters
            reference.copy_(ours)


def test_8bit_adamw_agrees_with_bitsandbytes():
    """The same formula and nearly the same codes: parameters after 20 steps differ by under a
    thousandth of a step."""
    torch.manual_seed(0)
    start = torch.randn(64, 512) * 0.1
    ours, peer = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = AdamW8bit([ours], lr=1e-3, weight_decay=0.01)
    theirs = bitsandbytes.optim.AdamW8bit([peer], lr=1e-3, weight_decay=0.01)
    for step in range(20):
        grad = torch.randn(64, 512, generator=torch.Generator().manual_seed(step)) * 0.01
        ours.grad, peer.grad = grad.clone(), grad.clone()
        mine.step()
        theirs.step()
    assert float((ours - peer).abs().mean()) < 1e-5 and float((ours - start).abs().mean()) > 1e-3


def test_small_tensors_are_exact_and_state_moves_raw():
    torch.manual_seed(0)
    large, small = nn.Parameter(torch.randn(80, 64)), nn.Parameter(torch.randn(10, 7))
    reference = nn.Parameter(small.detach().clone())
    mine, theirs = AdamW8bit([large, small], lr=1e-2), torch.optim.AdamW([reference], lr=1e-2)
    for _ in range(5):
        for p in (large, small):
            p.grad = torch.randn_like(p)
        assert small.grad is not None
        reference.grad = small.grad.clone()
        mine.step()
        theirs.step()
    torch.testing.assert_close(small, reference, rtol=1e-5, atol=1e-6)
    other = AdamW8bit(
        [nn.Parameter(large.detach().clone()), nn.Parameter(small.detach().clone())], lr=1e-2
    )
    other.load_state_dict(mine.state_dict())
    assert other.steps == 5
    for name, tensor in mine.state_tensors().items():
        assert torch.equal(other.state_tensors()[name], tensor), name


SIZE, RATE, BETAS = 8192, 1e-3, (0.9, 0.999)


def hard_gradients(kind: str, steps: int) -> Iterator[torch.Tensor]:
    """Of outliers, zeros and rows that are met now and then, which even ones do not show."""
    draw = torch.Generator().manual_seed(0)
    spread = torch.logspace(-4, 0, SIZE)[torch.randperm(SIZE, generator=draw)]
    for step in range(steps):
        noise = torch.randn(SIZE, generator=draw)
        if kind == "outliers":
            yield noise * spread
        elif kind == "drift":
            yield (noise * 0.1 + 1) * spread
        elif kind == "stopped":
            yield noise * spread * (1.0 if step < 20 else 1e-5)
        elif kind == "zeros":
            yield noise * (torch.arange(SIZE) % 3 == 0)
        else:
            met = torch.rand(SIZE // 64, generator=draw) < 0.02
            yield noise * met.repeat_interleave(64)


def walked(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], kind: str, steps: int
) -> tuple[torch.Tensor, float]:
    """Where parameters end, and the longest way of one in a step, both in rates."""
    p = nn.Parameter(torch.zeros(SIZE))
    optimizer, longest = make([p]), 0.0
    for grad in hard_gradients(kind, steps):
        before = p.detach().clone()
        p.grad = grad
        optimizer.step()
        longest = max(longest, float((p.detach() - before).abs().max()) / RATE)
    return p.detach() / RATE, longest


def roundings() -> float:
    """How much longer a step can be by the codes of both moments: the first rounded up, the second
    down, each to the nearest of its map."""
    first = [level for level in dynamic_map(signed=True) if level >= 0]
    second = dynamic_map(signed=False)[1:]
    up = max(b / ((a + b) / 2) for a, b in pairwise(first))
    down = max((a + b) / 2 / a for a, b in pairwise(second))
    return up * math.sqrt(down)


@pytest.mark.parametrize("kind", ["outliers", "drift", "stopped", "zeros", "rows"])
def test_no_weight_is_thrown_out(kind: str):
    """2,000 steps: none goes further at once than AdamW can (Kingma & Ba 2015, section 2.1, by the
    Cauchy-Schwarz inequality over all gradients), and none ends further from torch's path than
    with bitsandbytes' 8 bits."""
    b1, b2 = BETAS
    bound = math.sqrt((1 - b1) ** 2 / ((1 - b2) * (1 - b1**2 / b2)))
    assert bound == pytest.approx(7.27, abs=0.01)
    plain = {"lr": RATE, "betas": BETAS, "weight_decay": 0.0}
    wanted, _ = walked(lambda p: torch.optim.AdamW(p, **plain), kind, 2000)
    ours, longest = walked(lambda p: AdamW8bit(p, **plain), kind, 2000)
    peer, _ = walked(lambda p: bitsandbytes.optim.AdamW8bit(p, **plain), kind, 2000)
    assert longest <= bound * roundings()
    assert float((ours - wanted).abs().max()) <= 1.1 * float((peer - wanted).abs().max())
    assert float((ours - wanted).norm()) <= 1.01 * float((peer - wanted).norm())


def test_named_parameters_keep_32_bits_whatever_their_size():
    torch.manual_seed(0)
    table, other = nn.Parameter(torch.randn(500, 700)), nn.Parameter(torch.randn(80, 64))
    reference = nn.Parameter(table.detach().clone())
    mine = AdamW8bit([table, other], lr=1e-2, in_32bit=[table])
    theirs = torch.optim.AdamW([reference], lr=1e-2)
    assert mine.arenas[0]["small_m"].numel() == table.numel()
    for _ in range(4):
        table.grad, other.grad = torch.randn_like(table), torch.randn_like(other)
        reference.grad = table.grad.clone()
        mine.step()
        theirs.step()
    torch.testing.assert_close(table, reference, rtol=1e-5, atol=1e-6)


def test_a_state_of_8_bits_is_decoded_for_those_that_keep_32():
    torch.manual_seed(0)
    shapes = [(80, 64), (10, 7), (90, 60), (5,), (70, 64)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    old = AdamW8bit(params, lr=1e-2)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        old.step()
    new = AdamW8bit(params, lr=1e-2, in_32bit=[params[2]])
    new.take(old)
    again = AdamW8bit(params, lr=1e-2, in_32bit=[params[2]])
    grouped_32 = AdamW8bit(
        [{"params": params[3:]}, {"params": params[:3]}], lr=1e-2, in_32bit=[params[2]]
    )
    grouped_32.take(new)
    again.take(grouped_32)
    for name, tensor in again.state_tensors().items():
        assert torch.equal(tensor, new.state_tensors()[name]), name
    arena, was = new.arenas[0], old.arenas[0]
    assert torch.equal(arena["m_codes"][:5120], was["m_codes"][:5120])
    assert torch.equal(arena["m_codes"][5120:], was["m_codes"][5120 + 5632 :])
    assert torch.equal(arena["small_v"][:70], was["small_v"][:70])
    assert torch.equal(arena["small_v"][-5:], was["small_v"][-5:])
    levels = torch.tensor(dynamic_map(signed=False))[was["v_codes"][5120 : 5120 + 5400].long()]
    scales = was["v_absmax"][20:42].repeat_interleave(256)[:5400]
    assert torch.equal(arena["small_v"][70:-5], levels * scales)


@pytest.mark.parametrize("make", [AdamW8bit, PagedAdamW8bit, PagedAdamW])
def test_without_a_gradient_a_parameter_stays_where_it_is(make: Any):
    """Decay, moments and the count of steps are of those that took part, as torch has it; groups of
    nothing are no error, in any order; and all of it comes back from a state_dict."""
    torch.manual_seed(0)
    shapes = [(80, 64), (96, 64), (12,), (128, 64), (7,)]
    given = [torch.randn(shape) for shape in shapes]

    def optimizer(kind: Any) -> tuple[list[nn.Parameter], Any]:
        params = [nn.Parameter(t.clone()) for t in given]
        groups = [{"params": []}, {"params": params, "weight_decay": 0.1}, {"params": []}]
        options = {"min_8bit_size": 1 << 20} if "8bit" in kind.__name__ else {}
        return params, kind(groups, lr=1e-2, **options)

    (mine, ours), (theirs, torchs) = optimizer(make), optimizer(torch.optim.AdamW)
    for step, absent in enumerate([(), (1,), (1, 2), (), (0, 1, 2, 3, 4), (3,)]):
        before = [p.detach().clone() for p in mine]
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * step + i))
            p.grad = q.grad = None if i in absent else grad
        ours.step()
        torchs.step()
        for i, (p, q) in enumerate(zip(mine, theirs, strict=True)):
            assert (i not in absent) or torch.equal(p, before[i])
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
        fresh, again = optimizer(make)
        again.load_state_dict(copy.deepcopy(ours.state_dict()))
        with torch.no_grad():
            for p, q in zip(fresh, mine, strict=True):
                p.copy_(q)
        mine, ours = fresh, again


def test_in_8_bits_those_around_an_absent_one_move_as_without_it():
    torch.manual_seed(0)
    given = [torch.randn(64, 64 + 64 * i) for i in range(3)]
    grads = [torch.randn_like(t) for t in given]
    found = []
    for absent in (1, None):
        params = [nn.Parameter(t.clone()) for i, t in enumerate(given) if absent == 1 or i != 1]
        optimizer = AdamW8bit(params, lr=1e-2)
        for _ in range(3):
            for p, grad in zip(params, grads if absent else [grads[0], grads[2]], strict=True):
                p.grad = None if absent and p.shape == given[1].shape else grad
            optimizer.step()
        found.append([p.detach() for p in params])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][2], found[1][1])
    assert torch.equal(found[0][1], given[1])


def state_of(make: Any, *shapes: tuple[int, ...]) -> dict[str, Any]:
    """Of an optimizer after a step."""
    optimizer = make(nn.Parameter(torch.ones(shape)) for shape in shapes)
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("make", "shapes", "said"),
    [
        (torch.optim.AdamW, [(64, 128), (3,)], "another optimizer"),
        (bitsandbytes.optim.AdamW8bit, [(64, 128), (3,)], "another optimizer"),
        (
            AdamW8bit,
            [(128, 64), (3,)],
            r"number 0 has the shape \[128, 64\] in it, and \[64, 128\]",
        ),
        (AdamW8bit, [(3,), (64, 128)], "number 0"),
        (AdamW8bit, [(64, 128)], "number 1 has the shape none in it"),
        (AdamW8bit, [(64, 128), (3,), (3,)], r"number 2 has the shape \[3\] in it, and none here"),
    ],
)
def test_a_state_of_other_parameters_is_refused_before_anything_is_taken(
    make: Any, shapes: list[tuple[int, ...]], said: str
):
    mine = AdamW8bit([nn.Parameter(torch.ones(64, 128)), nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=said):
        mine.load_state_dict(state_of(make, *shapes))
    assert mine.steps == 0 and not any(mine.arenas[0]["m_codes"])


def test_a_state_of_other_groups_is_refused():
    def groups(params: Any) -> Any:
        return AdamW8bit([{"params": [p]} for p in params])

    theirs = state_of(groups, (64, 128), (3,))
    mine = AdamW8bit([nn.Parameter(torch.ones(64, 128)), nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match="other groups"):
        mine.load_state_dict(theirs)
    theirs = state_of(AdamW8bit, (64, 128), (3,))
    del theirs["shapes"]  # as before they were kept
    mine.load_state_dict(theirs)
    assert mine.steps == 1


def test_sparse_gradients_are_refused_by_name():
    table = nn.Embedding(100, 64, sparse=True)
    optimizer = AdamW8bit(table.parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()

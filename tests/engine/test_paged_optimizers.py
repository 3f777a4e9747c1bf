"""Tests of `engine.paged_optimizers`."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from halfbyte.engine import paged_optimizers
from halfbyte.engine.adamw8bit import AdamW8bit
from halfbyte.engine.paged_optimizers import PagedAdamW, PagedAdamW8bit
from halfbyte.memory.paged_arrays import Pages
from halfbyte.ops import cpu

from ..helpers import MIB


def parameters(seed: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Large and small, of odd sizes, one of several windows."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [
        (5000,),
        (3,),
        (70, 64),
        (1, 1),
        (4096,),
        (130, 257),
        (draw.randrange(1, 9000),),
    ]
    draw.shuffle(shapes)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def steps(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], count: int, seed: int = 0
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for number, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 10.0 ** (number - 3)
        optimizer.step()


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.02, "weight_decay": 0.1}]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_optimizers, "WINDOW", {"cpu": 2048, "cuda": 2048})


@pytest.fixture(params=[False, True], ids=["mapped", "staged"])
def staging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Windows copied to and fro as on a GPU, on a CPU."""
    if request.param:
        monkeypatch.setattr(
            paged_optimizers,
            "Pages",
            lambda arrays, device, directory: Pages(arrays, device, directory, staged=True),
        )
    return request.param


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("seed", range(4))
def test_paged_8bit_adamw_is_the_unpaged_one_to_the_bit(
    seed: int, kernels: str, small_windows: None, staging: bool, tmp_path: Path
):
    ours, theirs = parameters(seed), parameters(seed)
    paged = PagedAdamW8bit(groups(ours), lr=0.01, directory=tmp_path)
    plain = AdamW8bit(groups(theirs), lr=0.01)
    with cpu.using(kernels):
        steps(paged, ours, 5)
        steps(plain, theirs, 5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    mine, other = paged.state_tensors(), plain.state_tensors()
    assert mine.keys() == other.keys() and all(
        torch.equal(mine[name], other[name]) for name in mine
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_paged_adamw_is_torchs_to_the_bit(
    seed: int, dtype: torch.dtype, small_windows: None, staging: bool, tmp_path: Path
):
    ours, theirs = parameters(seed, dtype), parameters(seed, dtype)
    paged = PagedAdamW(groups(ours), lr=0.01, directory=tmp_path)
    plain = torch.optim.AdamW(groups(theirs), lr=0.01, weight_decay=0.01)
    steps(paged, ours, 4)
    steps(plain, theirs, 4)
    # one takes no part, as where it is frozen meanwhile
    for params, optimizer in (
        (ours, paged),
        (theirs, plain),
    ):
        for p in params:
            p.grad = torch.ones_like(p)
        params[2].grad = None
        optimizer.step()
    steps(paged, ours, 2, 1)
    steps(plain, theirs, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", [PagedAdamW8bit, PagedAdamW])
def test_states_leave_memory_midway_and_pass_between_modes(
    kind: Any, small_windows: None, tmp_path: Path
):
    """Paged out after two steps; saved from one mode and loaded into the other; never brought back
    by loading."""
    reference, moved, other = parameters(7), parameters(7), parameters(7)
    plain = kind(groups(reference), lr=0.01, paged=False, directory=tmp_path)
    paged = kind(groups(moved), lr=0.01, paged=False, directory=tmp_path)
    steps(plain, reference, 2)
    steps(paged, moved, 2)
    assert not paged.paged and paged.resident_bytes() > 0
    paged.page_out()
    assert paged.paged and paged.resident_bytes() == 0 and not paged.resident_tensors()
    steps(plain, reference, 2, 1)
    steps(paged, moved, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip(reference, moved, strict=True))
    for source in (plain, paged):
        again = kind(groups(other), lr=0.5, directory=tmp_path)
        with torch.no_grad():
            for p, q in zip(other, reference, strict=True):
                p.copy_(q)
        again.load_state_dict(source.state_dict())
        assert again.paged and again.resident_bytes() == 0
        straight = [nn.Parameter(p.detach().clone()) for p in reference]
        unpaged = kind(groups(straight), lr=0.5, paged=False, directory=tmp_path)
        unpaged.load_state_dict(source.state_dict())
        steps(again, other, 2, 2)
        steps(unpaged, straight, 2, 2)
        assert all(torch.equal(a, b) for a, b in zip(other, straight, strict=True))


@pytest.mark.parametrize("kind", [PagedAdamW8bit, PagedAdamW])
def test_resident_states_fall_by_nine_tenths(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also at the highest, which is inside of a step."""
    params = [nn.Parameter(torch.zeros(1 << 20)) for _ in range(12)]
    optimizer = kind(params, directory=tmp_path)
    held = (
        sum(t.nbytes for t in optimizer.state_dict()["arenas"][0].values())
        if kind is PagedAdamW8bit
        else 2 * 4 * 12 * MIB
    )
    highest, whole = 0, Pages._mapped

    def watched(self: Pages, cuts: Any) -> Any:
        nonlocal highest
        for window in whole(self, cuts):
            yield window
            highest = max(highest, self.resident_bytes())

    monkeypatch.setattr(Pages, "_mapped", watched)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert 0 < highest <= 0.1 * held
    assert optimizer.resident_bytes() == 0


def test_paged_states_need_contiguous_parameters(tmp_path: Path):
    p = nn.Parameter(torch.zeros(100, 100).t())
    for kind in (PagedAdamW8bit, PagedAdamW):
        with pytest.raises(ValueError, match="contiguous"):
            kind([p], directory=tmp_path)


@pytest.mark.parametrize("kind", [PagedAdamW8bit, PagedAdamW])
def test_a_page_out_that_is_interrupted_changes_nothing(
    kind: Any, small_windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At each of its copies in turn."""
    for moment in range(1, 8):
        reference, interrupted = parameters(7), parameters(7)
        plain = kind(groups(reference), lr=0.01, paged=False, directory=tmp_path)
        other = kind(groups(interrupted), lr=0.01, paged=False, directory=tmp_path)
        steps(plain, reference, 2)
        steps(other, interrupted, 2)
        count, honest = [0], Tensor.copy_

        def copy(
            self: Tensor, *rest: Any, count: Any = count, honest: Any = honest, moment: int = moment
        ) -> Tensor:
            count[0] += 1
            if count[0] == moment:
                raise KeyboardInterrupt
            return honest(self, *rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Tensor, "copy_", copy)
            other.page_out()
        steps(plain, reference, 2, 1)
        steps(other, interrupted, 2, 1)
        assert all(torch.equal(a, b) for a, b in zip(reference, interrupted, strict=True))


def test_a_state_without_a_parameter_starts_it_from_zero(small_windows: None, tmp_path: Path):
    ours, theirs = parameters(3), parameters(3)
    paged = PagedAdamW(ours, lr=0.01, directory=tmp_path)
    plain = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.01)
    steps(paged, ours, 2)
    steps(plain, theirs, 2)
    for optimizer in (paged, plain):
        state = optimizer.state_dict()
        del state["state"][1]
        optimizer.load_state_dict(state)
    steps(paged, ours, 2, 1)
    steps(plain, theirs, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", [PagedAdamW8bit, PagedAdamW])
def test_groups_may_be_added(kind: Any, tmp_path: Path):
    ours, theirs = parameters(5), parameters(5)
    paged, plain = (
        kind(ours[:3], directory=tmp_path),
        kind(theirs[:3], directory=tmp_path, paged=False),
    )
    for optimizer, params in ((paged, ours), (plain, theirs)):
        optimizer.add_param_group({"params": params[3:], "lr": 0.02})
        steps(optimizer, params, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))

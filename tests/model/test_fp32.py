"""Tests of `model.fp32`."""

import contextlib

import pytest
import torch
from torch import nn

from halfbyte.model.fp32 import around_calls, as_near, distance, in_fp32, typical_distance
from halfbyte.quantization.tensor import quantize


def test_a_module_computes_in_fp32_within_the_block_only():
    torch.manual_seed(0)
    stored = quantize(torch.randn(64, 64))
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 8, dtype=torch.bfloat16))
    model[0].weight = nn.Parameter(stored.with_dtype(torch.bfloat16), requires_grad=False)
    x = torch.randn(3, 64)
    own = list(model.parameters())
    with in_fp32(model):
        found = model(x)
        assert found.dtype == torch.float32
    assert all(a is b for a, b in zip(model.parameters(), own, strict=True))
    weight, (w, b) = stored.dequantize(torch.float32), (p.float() for p in model[1].parameters())
    torch.testing.assert_close(found, x @ weight.T @ w.T + b, rtol=1e-4, atol=1e-4)
    near = model(x.bfloat16())
    assert near.dtype == torch.bfloat16 and 0 < distance(near, found) < 0.02


def test_what_fails_inside_leaves_the_module_as_it_was():
    layer = nn.Linear(4, 4, dtype=torch.bfloat16)
    with pytest.raises(ZeroDivisionError), in_fp32(layer):
        raise ZeroDivisionError
    assert layer.weight.dtype == torch.bfloat16


def test_a_distance_is_judged_by_the_originals_own():
    assert as_near(0.03, 0.021, torch.bfloat16) and not as_near(0.03, 0.019, torch.bfloat16)
    assert as_near(2.0**-9, 0.0, torch.bfloat16) and not as_near(2.0**-9, 0.0, torch.float32)
    assert distance(torch.ones(2), torch.ones(3)) == float("inf")
    assert distance(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")


def test_a_typical_distance_is_not_that_of_the_worst_token():
    reference = torch.ones(9, 4)
    found = reference * 1.01
    found[3] = 100.0
    assert typical_distance(found, reference) == pytest.approx(0.01, rel=1e-4)
    found[:5] = float("nan")
    assert typical_distance(found, reference) == float("inf")


def test_a_module_that_calls_others_keeps_its_context_until_it_returns():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.inner(x)
            seen.append(list(open_now))
            return y

    @contextlib.contextmanager
    def within(module: nn.Module):
        open_now.append(type(module).__name__)
        yield
        open_now.remove(type(module).__name__)

    seen: list[list[str]] = []
    open_now: list[str] = []
    outer = Outer()
    with around_calls([outer, outer.inner], within):
        outer(torch.ones(1, 2))
        assert seen == [["Outer"]] and not open_now
        with pytest.raises(RuntimeError):
            outer(torch.ones(1, 3))
    outer(torch.ones(1, 2))
    assert not open_now and seen[-1] == []

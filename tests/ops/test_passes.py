"""Passes and attention: gradients of the plain-PyTorch meaning in fp64, the library beside it, and
their contracts."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from halfbyte import ops
from halfbyte.ops import cpu, passes

from ..helpers import Reference, random_tensor


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_gradient(offset: float):
    weight = random_tensor(6, seed=1).detach()

    def apply(x: Tensor) -> Tensor:
        return Reference.apply(
            lambda x: passes._rms_norm(x, weight, 1e-3, offset, False),
            lambda dy, given, results: (
                passes._rms_norm_grad(dy, given[0], weight, results[1], offset),
            ),
            x,
        )

    assert torch.autograd.gradcheck(apply, random_tensor(4, 6))


@pytest.mark.parametrize("activation", range(len(ops.ACTIVATIONS)))
def test_gated_gradient(activation: int):
    def apply(gate: Tensor, up: Tensor) -> Tensor:
        return Reference.apply(
            lambda gate, up: passes._gated(gate, up, activation),
            lambda dy, given, results: passes._gated_grad(dy, *given, activation),
            gate,
            up,
        )

    assert torch.autograd.gradcheck(apply, (random_tensor(3, 5), random_tensor(3, 5, seed=1)))


def test_cross_entropy_is_pytorchs():
    logits, labels = random_tensor(7, 11).detach(), torch.tensor([0, 10, -100, 4, 4, 11, 3])
    with cpu.using("torch"):
        losses, grad = ops.cross_entropy(logits.float(), labels)
    wide = logits.requires_grad_()
    known = labels.where(labels < 11, torch.tensor(-100))
    functional.cross_entropy(wide, known, reduction="sum").backward()
    assert wide.grad is not None
    torch.testing.assert_close(grad.double(), wide.grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        losses.double(), functional.cross_entropy(logits, known, reduction="none").detach()
    )


def test_wrong_tensors_are_refused():
    x, w = torch.randn(2, 8), torch.randn(8)
    good = torch.randn(4, 2, 8)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    params = ops.AttentionParams(1.0)
    for error, call in (
        (TypeError, lambda: ops.rms_norm(x, w.bfloat16(), 1e-6)),
        (ValueError, lambda: ops.rms_norm(x, w[:7], 1e-6)),
        (ValueError, lambda: ops.gated(x, x[:1], "silu")),
        (ValueError, lambda: ops.gated(x, x, "relu")),
        (ValueError, lambda: ops.cross_entropy(x, torch.zeros(3, dtype=torch.int64))),
        (
            ValueError,
            lambda: ops.cross_entropy(x, torch.zeros(2, dtype=torch.int64), x.t().contiguous()),
        ),
        (ValueError, lambda: ops.attention(good, good[:, :, :4], good, cu_seqlens, params)),
        (ValueError, lambda: ops.attention(good, good, good, cu_seqlens.long(), params)),
        (TypeError, lambda: ops.attention(good, good.half(), good, cu_seqlens, params)),
        (ValueError, lambda: ops.lora_input(x, w[None, :7])),
        (ValueError, lambda: ops.rotate(good, x, x)),
        (TypeError, lambda: ops.rotate(good, good[:, 0].half(), good[:, 0])),
        (ValueError, lambda: ops.lora_grads(x, x[:1], x, torch.randn(8, 8), 1.0)),
    ):
        with pytest.raises(error):
            call()
    if cpu.paths():
        with pytest.raises(ValueError, match="bounds"):
            ops.attention(good, good, good, torch.tensor([0, 3], dtype=torch.int32), params)
        with pytest.raises(ValueError, match="descend"):
            ops.attention(good, good, good, torch.tensor([0, 3, 2, 4], dtype=torch.int32), params)


def test_shapes_on_meta():
    q, k = torch.empty(6, 4, 8, device="meta"), torch.empty(6, 2, 8, device="meta")
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32)
    out, lse = torch.ops.halfbyte.attention(q, k, k, cu_seqlens.to("meta"), 1.0, 0, 0.0)
    assert out.shape == q.shape and lse.shape == (4, 6)
    for name, arguments in (
        ("rms_norm", (torch.randn(3, 8), torch.randn(8), 1e-6, 0.0, True)),
        ("gated", (torch.randn(3, 8), torch.randn(3, 8), 0)),
        ("lora_input", (torch.randn(3, 8), torch.randn(2, 8), [0] * 5)),
        ("rotate", (torch.randn(3, 2, 8), torch.randn(3, 8), torch.randn(3, 8), True)),
        ("cross_entropy", (torch.randn(3, 8), torch.tensor([1, 2, 3]), torch.empty(3, 8))),
    ):
        torch.library.opcheck(getattr(torch.ops.halfbyte, name), arguments)


@pytest.mark.skipif(not cpu.paths(), reason="no C++ library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_shows(dtype: torch.dtype):
    """A NaN must not come out as a number, on any path."""
    best = cpu.path_in_use()
    try:
        for path in cpu.paths():
            cpu.choose_path(path)
            logits = torch.zeros(2, 40, dtype=dtype)
            logits[0, 7] = float("nan")
            losses, grad = ops.cross_entropy(logits, torch.tensor([3, 3]))
            assert losses.isnan().tolist() == [True, False] and bool(grad[0].isnan().any()), path
            bad = torch.ones(3, 33, dtype=dtype)
            bad[1, 32] = float("nan")
            for kind in ops.ACTIVATIONS:
                assert ops.gated(bad, torch.ones_like(bad), kind).isnan().sum() == 1, (path, kind)
            assert ops.rms_norm(bad, bad[0], 1e-6)[0].isnan().any(1).tolist() == [
                False,
                True,
                False,
            ], path
            q = torch.ones(5, 2, 16, dtype=dtype)
            q[3, 1, 2] = float("nan")
            k = torch.ones_like(q)
            out, lse = ops.attention(
                q, k, k, torch.tensor([0, 5], dtype=torch.int32), ops.AttentionParams(0.25)
            )
            assert out[3, 1].isnan().all() and lse[1, 3].isnan() and int(lse.isnan().sum()) == 1, (
                path
            )
    finally:
        cpu.choose_path(best)

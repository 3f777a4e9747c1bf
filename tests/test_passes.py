"""Passes and attention: gradients of the plain-PyTorch meaning in fp64, the library beside it, and
their contracts."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from halfbyte import ops
from halfbyte.model import attention as registered
from halfbyte.ops import cpu, passes, rotary
from halfbyte.ops.attention import _attention, _attention_grad

BOUNDS = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
FORMATS = [
    ops.AttentionParams(0.5),
    ops.AttentionParams(0.3, window=2),
    ops.AttentionParams(0.7, softcap=2.0),
    ops.AttentionParams(0.4, 3, 1.5),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_()


class Meaning(torch.autograd.Function):
    """An operation and its gradient, both by their plain-PyTorch meaning, as autograd would call
    them."""

    @staticmethod
    def forward(ctx, forward, backward, *inputs):
        results = forward(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        ctx.save_for_backward(*inputs, *results)
        ctx.count, ctx.backward_of = len(inputs), backward
        return results[0]

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        found = ctx.backward_of(grads[0], saved[: ctx.count], saved[ctx.count :])
        return None, None, *found


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_gradient(offset: float):
    weight = random(6, seed=1).detach()

    def apply(x: Tensor) -> Tensor:
        return Meaning.apply(
            lambda x: passes._rms_norm(x, weight, 1e-3, offset, False),
            lambda dy, given, results: (
                passes._rms_norm_grad(dy, given[0], weight, results[1], offset),
            ),
            x,
        )

    assert torch.autograd.gradcheck(apply, random(4, 6))


def test_rotation_gradient():
    cos, sin = torch.randn(3, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)

    def apply(x: Tensor) -> Tensor:
        return Meaning.apply(
            lambda x: (rotary._rotate(x, cos, sin, False),),
            lambda dy, given, results: (rotary._rotate(dy, cos, sin, True),),
            x,
        )

    assert torch.autograd.gradcheck(apply, random(3, 2, 6))


@pytest.mark.parametrize("activation", range(len(ops.ACTIVATIONS)))
def test_gated_gradient(activation: int):
    def apply(gate: Tensor, up: Tensor) -> Tensor:
        return Meaning.apply(
            lambda gate, up: passes._gated(gate, up, activation),
            lambda dy, given, results: passes._gated_grad(dy, *given, activation),
            gate,
            up,
        )

    assert torch.autograd.gradcheck(apply, (random(3, 5), random(3, 5, seed=1)))


@pytest.mark.parametrize("params", FORMATS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_gradient(params: ops.AttentionParams, kv_heads: int):
    def apply(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Meaning.apply(
            lambda q, k, v: _attention(q, k, v, BOUNDS, *params),
            lambda dout, given, results: _attention_grad(dout, *given, BOUNDS, *results, *params),
            q,
            k,
            v,
        )

    q, k, v = random(8, 2, 3), random(8, kv_heads, 3, seed=1), random(8, kv_heads, 3, seed=2)
    assert torch.autograd.gradcheck(apply, (q, k, v))


def test_cross_entropy_is_pytorchs():
    logits, labels = random(7, 11).detach(), torch.tensor([0, 10, -100, 4, 4, 11, 3])
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


def test_attention_is_pytorchs_own():
    """Without window and cap the meaning is scaled_dot_product_attention, for grouped heads and one
    row."""
    q, k, v = (random(9, n, 8, seed=n).detach() for n in (4, 2, 2))
    out, _ = _attention(q, k, v, torch.tensor([0, 9], dtype=torch.int32), 8**-0.5, 0, 0.0)
    heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
    expected = functional.scaled_dot_product_attention(
        heads[0], heads[1], heads[2], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, expected[0].transpose(0, 1))


@pytest.mark.skipif(not cpu.paths(), reason="no C++ library")
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("softcap", [None, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_the_registry_as_without_the_library(
    window: int | None, softcap: float | None, dtype: torch.dtype
):
    """transformers' layout in and out: the fused operation and PyTorch's own attention within
    rounding."""
    lengths = (17, 1, 30)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    q, k, v = (random(1, n, 48, 16, seed=n).detach().to(dtype) for n in (4, 2, 2))

    def run() -> list[Tensor]:
        given = [t.clone().requires_grad_() for t in (q, k, v)]
        out, _ = registered.segment_attention(
            None, *given, None, sliding_window=window, softcap=softcap, cu_seq_lens_q=cu_seqlens
        )
        assert out.shape == (1, 48, 4, 16)
        out.float().square().sum().backward()
        return [out.detach(), *(t.grad for t in given if t.grad is not None)]

    with cpu.using("torch"):
        expected = run()
    unit = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8}[dtype]
    for mine, theirs in zip(run(), expected, strict=True):
        assert float((mine.float() - theirs.float()).norm() / theirs.float().norm()) < 4 * unit


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


@pytest.mark.parametrize("window", [20, 1 << 40, 2**63 - 1])
def test_a_window_longer_than_everything_is_none(window: int):
    q, k, v = (random(20, 2, 16, seed=n).detach().float() for n in range(3))
    cu_seqlens = torch.tensor([0, 20], dtype=torch.int32)
    out, lse = ops.attention(q, k, v, cu_seqlens, ops.AttentionParams(0.25))
    wide, wide_lse = ops.attention(q, k, v, cu_seqlens, ops.AttentionParams(0.25, window=window))
    assert torch.equal(out, wide) and torch.equal(lse, wide_lse)
    for mine, theirs in zip(
        ops.attention_grad(
            q, q, k, v, cu_seqlens, out, lse, ops.AttentionParams(0.25, window=window)
        ),
        ops.attention_grad(q, q, k, v, cu_seqlens, out, lse, ops.AttentionParams(0.25)),
        strict=True,
    ):
        assert torch.equal(mine, theirs)

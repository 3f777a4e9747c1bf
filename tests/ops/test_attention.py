"""Tests of `ops.attention`."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from halfbyte import ops
from halfbyte.ops.attention import _attention, _attention_grad

from ..helpers import Reference, random_tensor

BOUNDS = torch.tensor([0, 3, 3, 8], dtype=torch.int32)


FORMATS = [
    ops.AttentionParams(0.5),
    ops.AttentionParams(0.3, window=2),
    ops.AttentionParams(0.7, softcap=2.0),
    ops.AttentionParams(0.4, 3, 1.5),
]


@pytest.mark.parametrize("params", FORMATS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_attention_gradient(params: ops.AttentionParams, kv_heads: int):
    def apply(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Reference.apply(
            lambda q, k, v: _attention(q, k, v, BOUNDS, *params),
            lambda dout, given, results: _attention_grad(dout, *given, BOUNDS, *results, *params),
            q,
            k,
            v,
        )

    q, k, v = (
        random_tensor(8, 2, 3),
        random_tensor(8, kv_heads, 3, seed=1),
        random_tensor(8, kv_heads, 3, seed=2),
    )
    assert torch.autograd.gradcheck(apply, (q, k, v))


def test_attention_is_pytorchs_own():
    """Without window and cap the meaning is scaled_dot_product_attention, for grouped heads and one
    row."""
    q, k, v = (random_tensor(9, n, 8, seed=n).detach() for n in (4, 2, 2))
    out, _ = _attention(q, k, v, torch.tensor([0, 9], dtype=torch.int32), 8**-0.5, 0, 0.0)
    heads = [t.transpose(0, 1)[None] for t in (q, k, v)]
    expected = functional.scaled_dot_product_attention(
        heads[0], heads[1], heads[2], is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, expected[0].transpose(0, 1))


@pytest.mark.parametrize("window", [20, 1 << 40, 2**63 - 1])
def test_a_window_longer_than_everything_is_none(window: int):
    q, k, v = (random_tensor(20, 2, 16, seed=n).detach().float() for n in range(3))
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

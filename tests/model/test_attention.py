"""Tests of `model.attention`."""

import itertools

import pytest
import torch
from torch import Tensor

from halfbyte.model import attention
from halfbyte.model import attention as registered
from halfbyte.ops import cpu

from ..helpers import random_tensor


def test_soft_cap_and_sinks_equal_the_formula():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    sinks = torch.randn(4)
    out, _ = attention.segment_attention(
        None,
        q,
        k,
        v,
        None,
        sliding_window=3,
        softcap=2.0,
        s_aux=sinks,
        cu_seq_lens_q=torch.tensor([0, 9]),
    )
    for head in range(4):
        for t in range(9):
            keys = slice(max(0, t - 2), t + 1)
            scores = torch.tanh((k[0, head // 2, keys] @ q[0, head, t]) / 8**0.5 / 2.0) * 2.0
            weights = torch.cat((scores, sinks[head : head + 1])).softmax(0)[:-1]
            torch.testing.assert_close(
                out[0, t, head], weights @ v[0, head // 2, keys], rtol=1e-5, atol=1e-5
            )


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
    q, k, v = (random_tensor(1, n, 48, 16, seed=n).detach().to(dtype) for n in (4, 2, 2))

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

"""Tests of `ops.fourbit`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from halfbyte import codebooks, ops
from halfbyte.engine.adamw8bit import AdamW8bit
from halfbyte.ops import cpu
from halfbyte.quantization.bnb_format import (
    components,
)
from halfbyte.quantization.tensor import quantize

from ..helpers import random_weight


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3000),
    st.sampled_from([32, 64, 128]),
    st.booleans(),
    st.sampled_from(["nf4", "fp4", "nf4-article"]),
    st.integers(0, 2**31),
)
def test_every_weight_gets_its_nearest_level(
    n: int, block_size: int, double: bool, quant_type: str, seed: int
):
    """fp64 oracle: no level is nearer than the chosen one, up to rounding of the scaled weight."""
    w = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    q = quantize(w, block_size=block_size, double_quant=double, quant_type=quant_type)
    exact = quantize(w, block_size=block_size, double_quant=False, quant_type=quant_type)
    assert torch.equal(q.packed, exact.packed), "codes are chosen with the fp32 scale"
    codes = torch.stack((exact.packed >> 4, exact.packed & 15), 1).view(-1)[:n]
    levels = torch.tensor(codebooks.levels(quant_type), dtype=torch.float64)
    scaled = w.double() / exact.absmax.double().repeat_interleave(block_size)[:n]
    distance = (scaled.unsqueeze(1) - levels).abs()
    chosen = distance.gather(1, codes.long().unsqueeze(1)).squeeze(1)
    assert bool((chosen <= distance.min(1).values + 1e-6).all())


@pytest.mark.parametrize("shape", [(5, 33), (2, 3, 64), (1,), (0,)])
@pytest.mark.parametrize("double", [True, False])
def test_any_shape_and_stride(shape: tuple[int, ...], double: bool):
    w = random_weight(shape, torch.float32)
    q = quantize(w, double_quant=double)
    assert q.shape == w.shape and q.dequantize().shape == w.shape
    if w.dim() > 1:
        turned = w.transpose(0, 1)
        assert torch.equal(quantize(turned).packed, quantize(turned.contiguous()).packed)


def test_threads_do_not_change_a_byte():
    w = random_weight((512, 2048), torch.bfloat16)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(components("w", quantize(w)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[key], results[0][key]) for key in results[0])


def test_operations_pass_opcheck():
    q = quantize(torch.randn(8, 64))
    x = torch.randn(3, 64)
    torch.library.opcheck(torch.ops.halfbyte.linear_4bit, (x, *q.parts, 8, None, None, None))
    torch.library.opcheck(
        torch.ops.halfbyte.linear_4bit,
        (x, *q.parts, 8, x[0, :8], torch.randn(3, 2), torch.randn(8, 2)),
    )
    torch.library.opcheck(
        torch.ops.halfbyte.linear_4bit_input_grad,
        (torch.randn(3, 8), *q.parts, 64, None, None, [0] * 5),
    )
    torch.library.opcheck(torch.ops.halfbyte.quantize_4bit, (torch.randn(8, 64), q.quant_map, 64))
    torch.library.opcheck(torch.ops.halfbyte.dequantize_4bit, (*q.parts, torch.empty(512)))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_tensors_on_several_devices_are_refused(kernels: str):
    """PyTorch asks the kernel of one of them, which would give memory that nobody wrote."""
    stored = quantize(random_weight((32, 64), torch.float32))
    x, bias = torch.randn(3, 64), torch.zeros(32)
    with cpu.using(kernels):
        for given in ((x, bias.to("meta")), (x.to("meta"), bias)):
            with pytest.raises(ValueError, match="on one device"):
                ops.linear_4bit(given[0], stored.parts, 32, given[1])
        params = [nn.Parameter(torch.randn(80, 64)), nn.Parameter(torch.randn(80, 64).to("meta"))]
        maps = AdamW8bit(params[:1])._maps
        for p in params:
            p.grad = torch.zeros_like(p)
        codes = [torch.zeros(10240, dtype=torch.uint8) for _ in range(2)]
        scales = [torch.zeros(40) for _ in range(2)]
        with pytest.raises(ValueError, match="on one device"):
            ops.adamw_8bit_step(
                params,
                [p.grad for p in params if p.grad is not None],
                *codes,
                *scales,
                *maps,
                lr=1e-3,
                betas=(0.9, 0.999),
                eps=1e-8,
                weight_decay=0.0,
                step=1,
            )

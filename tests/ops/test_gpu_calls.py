"""Triton's kernels in Triton's interpreter, on this CPU, beside the plain-PyTorch meaning: fp32 and
fp16, every bit where the meaning is exact. (The interpreter gets bf16 wrong; bench/gpu.py proves
that on a card.)"""

import os

import pytest
import torch
from torch import Tensor

from halfbyte import codebooks, ops
from halfbyte.ops import adamw8bit, dropout, fourbit, gpu_calls, passes, rotary
from halfbyte.ops.attention import _attention, _attention_grad
from halfbyte.quantization.tensor import quantize, refuse_non_finite

pytest.importorskip("triton")


if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("on a GPU bench/gpu.py proves the kernels", allow_module_level=True)


# numpy, which interprets, warns where a GPU just gives a NaN
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def equal(mine: Tensor, theirs: Tensor) -> None:
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    assert torch.equal(mine, theirs), f"{int((mine != theirs).sum())} of {mine.numel()} differ"


def near(mine: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
    difference = float((mine.double() - theirs.double()).norm())
    assert difference <= tolerance * float(theirs.double().norm()) + 1e-30, difference


@pytest.mark.parametrize("shape", [(64,), (3, 40), (7, 129), (2, 5, 33), (1,), (0,), (130, 64)])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantize_and_dequantize_bit_for_bit(
    shape: tuple[int, ...], block_size: int, quant_type: str
):
    """Any shape, odd sizes and short last blocks, nested and not."""
    torch.manual_seed(0)
    dtype = torch.float16 if block_size == 64 else torch.float32
    weight = (torch.randn(shape) * 3).to(dtype)
    table = torch.tensor(codebooks.levels(quant_type), dtype=torch.float32)
    packed, absmax = gpu_calls.quantize_4bit(weight, table, block_size)
    expected_packed, expected_absmax = fourbit._quantize(weight, table, block_size)
    equal(packed, expected_packed)
    equal(absmax, expected_absmax)
    scale_map = torch.tensor(codebooks.dynamic_map(signed=True), dtype=torch.float32)
    nested = fourbit.quantize_absmax_by_triton(absmax, scale_map, 256)
    for mine, theirs in zip(nested, fourbit._quantize_absmax(absmax, scale_map, 256), strict=True):
        equal(mine, theirs)
    codes, groups, offset = nested
    for parts in (
        (packed, absmax, table, None, None, None, block_size, 256),
        (packed, codes, table, groups, scale_map, offset, block_size, 256),
    ):
        for out_dtype in (torch.float32, torch.float16):
            mine, theirs = (torch.full((weight.numel(),), 7.0, dtype=out_dtype) for _ in range(2))
            gpu_calls.dequantize_4bit(*parts, mine)
            fourbit._dequantize(*parts, theirs)
            equal(mine, theirs)


def test_ties_zeros_and_broken_numbers_are_as_in_the_meaning():
    table = torch.tensor(codebooks.levels("nf4"), dtype=torch.float32)
    middles = (table[1:] + table[:-1]) / 2
    weight = torch.cat((middles, table, torch.zeros(64), torch.full((33,), 1e-39)))
    weight = torch.cat((torch.ones(1), weight, torch.tensor([-0.0])))
    for mine, theirs in zip(
        gpu_calls.quantize_4bit(weight, table, 32),
        fourbit._quantize(weight, table, 32),
        strict=True,
    ):
        equal(mine, theirs)
    weight[5], weight[40] = float("nan"), float("inf")
    _, absmax = gpu_calls.quantize_4bit(weight, table, 32)
    assert absmax[0].isnan() and absmax[1].isinf()
    with pytest.raises(ValueError, match="NaN or an infinity"):
        refuse_non_finite(absmax, 32)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    "tokens,rows,columns", [(1, 5, 64), (3, 18, 96), (2, 7, 130), (2, 3, 2112), (1, 2, 2050)]
)
def test_matvec_is_the_product_within_rounding(
    tokens: int, rows: int, columns: int, double_quant: bool
):
    """Beside fp64 of the dequantized weight; blocks may run across rows."""
    torch.manual_seed(1)
    stored = quantize(torch.randn(rows, columns), double_quant=double_quant)
    weight = stored.dequantize(torch.float32).double()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 2.0**-10)):
        x = torch.randn(tokens, columns).to(dtype)
        near(
            gpu_calls.matvec(x, tuple(stored.parts), rows),
            (x.double() @ weight.t()).to(dtype),
            tolerance,
        )
    x, bias = torch.randn(tokens, columns), torch.randn(rows)
    u, b = torch.randn(tokens, 4), torch.randn(rows, 4)
    mine = fourbit.linear_by_triton(x, *stored.parts, rows, bias, u, b)
    near(mine, fourbit._linear(x, *stored.parts, rows, bias, u, b), 1e-6)


def test_adamw_bit_for_bit_over_many_tensors_and_steps():
    """Odd sizes, a tensor of one element, weight decay; codes, scales and parameters."""
    torch.manual_seed(2)
    sizes = [(300,), (16, 33), (1,), (4, 256), (257,)]
    params = [torch.randn(size) for size in sizes]
    arena = sum(adamw8bit.padded_size(p.numel()) for p in params)
    maps = [
        torch.tensor(codebooks.dynamic_map(signed=signed), dtype=torch.float32)
        for signed in (True, False)
    ]

    def state() -> list[Tensor]:
        codes = [torch.zeros(arena, dtype=torch.uint8) for _ in range(2)]
        return [*codes, *(torch.zeros(arena // 256) for _ in range(2))]

    mine, theirs = [p.clone() for p in params], [p.clone() for p in params]
    my_state, their_state = state(), state()
    for step in range(1, 5):
        grads = [torch.randn_like(p) * 10.0**-step for p in params]
        numbers = (1e-2, 0.9, 0.999, 1e-8, 0.1, step)
        gpu_calls.adamw_8bit_step(mine, grads, *my_state, *maps, *numbers)
        adamw8bit._adamw_8bit_step(theirs, grads, *their_state, *maps, *numbers)
        for a, b in zip([*mine, *my_state], [*theirs, *their_state], strict=True):
            equal(a, b)


def test_adamw_tells_windows_that_begin_at_one_address_apart():
    """As a paged optimizer's do, and the whole tensor before it was paged."""
    maps = [
        torch.tensor(codebooks.dynamic_map(signed=signed), dtype=torch.float32)
        for signed in (True, False)
    ]
    mine, grad = torch.randn(1024), torch.randn(1024)
    theirs = mine.clone()
    for size in (1024, 300, 600):
        for reference, values in ((False, mine), (True, theirs)):
            arena = adamw8bit.padded_size(size)
            codes, scales = torch.zeros(2, arena, dtype=torch.uint8), torch.zeros(2, arena // 256)
            step = adamw8bit._adamw_8bit_step if reference else gpu_calls.adamw_8bit_step
            step(
                [values[:size]],
                [grad[:size]],
                *codes,
                *scales,
                *maps,
                1e-2,
                0.9,
                0.999,
                1e-8,
                0.0,
                1,
            )
        equal(mine, theirs)


@pytest.mark.parametrize("first,numel", [(0, 1), (0, 3000), (5, 777), (8, 64), (2**32 + 3, 40)])
def test_dropout_masks_bit_for_bit(first: int, numel: int):
    for seed in (1, 0, 2**62 + 12345, 2**33 - 1):
        numbers = ops.Dropout(ops.drop_threshold(0.3), seed, 1, 2**32 - 1, 1, first)
        mine, theirs = (torch.zeros(numel, dtype=torch.bool) for _ in range(2))
        gpu_calls.dropout_mask(mine, list(numbers))
        dropout._dropout_mask(theirs, list(numbers))
        equal(mine, theirs)
        for dtype in (torch.float32, torch.float16):
            x, total = torch.randn(2, numel).to(dtype)
            x[0], expected, given = -torch.inf, total.clone(), list(numbers)
            torch.testing.assert_close(
                gpu_calls.drop(x, given), dropout._drop(x, given), rtol=0, atol=0, equal_nan=True
            )
            x[0] = -0.5
            dropout._add_dropped(expected, x, given)
            gpu_calls.add_dropped(total, x, given)
            equal(total, expected)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-6), (torch.float16, 2.0**-10)])
def test_passes_within_rounding(dtype: torch.dtype, tolerance: float):
    """Norms, gated activations, cross-entropy and rotation, beside the meaning in fp64."""
    torch.manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    x, weight, dy = draw(2, 3, 50), draw(50), draw(2, 3, 50)
    for offset, cast_first in ((0.0, True), (1.0, False)):
        y, inverse = gpu_calls.rms_norm(x, weight, 1e-6, offset, cast_first)
        wide = passes._rms_norm(x.double(), weight.double(), 1e-6, offset, False)
        near(y, wide[0].to(dtype), 3 * tolerance)
        near(inverse, wide[1].float(), 1e-6)
        dx = gpu_calls.rms_norm_grad(dy, x, weight, inverse, offset)
        near(
            dx,
            passes._rms_norm_grad(dy.double(), x.double(), weight.double(), wide[1], offset).to(
                dtype
            ),
            tolerance,
        )
    both, dy = draw(4, 2, 2 * 37), draw(4, 2, 37)
    gate, up = both.chunk(2, -1)  # rows of one product
    for activation in range(len(passes.ACTIVATIONS)):
        near(
            gpu_calls.gated(gate, up, activation),
            passes._gated(gate.double(), up.double(), activation).to(dtype),
            tolerance,
        )
        expected = passes._gated_grad(dy.double(), gate.double(), up.double(), activation)
        for mine, theirs in zip(
            gpu_calls.gated_grad(dy, gate, up, activation), expected, strict=True
        ):
            near(mine, theirs.to(dtype), tolerance)
    logits, labels = draw(5, 5000) * 4, torch.tensor([0, 4999, -100, 17, 5000])
    grad, wide_grad = torch.full_like(logits, 7.0), torch.empty(5, 5000, dtype=torch.float64)
    losses = gpu_calls.cross_entropy(logits, labels, grad)
    near(losses, passes._cross_entropy(logits.double(), labels, wide_grad).float(), 1e-6)
    near(grad, wide_grad.to(dtype), max(tolerance, 1e-6))
    assert losses[2] == losses[4] == 0 and not grad[2].any() and not grad[4].any()
    x, cos, sin = draw(6, 3, 24)[:, :2], draw(6, 24), draw(6, 24)
    for back in (False, True):
        expected = rotary._rotate(x.double(), cos.double(), sin.double(), back).to(dtype)
        near(gpu_calls.rotate(x, cos, sin, back), expected, tolerance)


@pytest.mark.parametrize("window", [0, 2, 4])
def test_flash_attention_is_asked_for_the_same_attention(flash: None, window: int):
    """Rows of several lengths, grouped heads, a window: what a GPU is asked for is the meaning."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(23, heads, 8).half() for heads in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 9, 10, 23], dtype=torch.int32)
    params = (0.3, window, 0.0)
    out, lse = gpu_calls.attention(q, k, v, cu_seqlens, *params)
    expected, expected_lse = _attention(q, k, v, cu_seqlens, *params)
    near(out, expected, 2.0**-9)
    near(lse, expected_lse, 1e-5)
    dout = torch.randn_like(q)
    mine = gpu_calls.attention_grad(dout, q, k, v, cu_seqlens, out, lse, *params)
    for one, other in zip(
        mine, _attention_grad(dout, q, k, v, cu_seqlens, out, lse, *params), strict=True
    ):
        near(one, other, 2.0**-8)
    with pytest.raises(ValueError, match="softcap"):
        gpu_calls.attention(q, k, v, cu_seqlens, 0.3, window, 30.0)
    assert not gpu_calls.attends(q, None), "this is a CPU"

"""4-bit storage: bytes against bitsandbytes, values against fp64, the tensor subclass against an
ordinary weight."""

import copy
import json
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from halfbyte import codebooks, ops
from halfbyte.errors import ModelError
from halfbyte.files.safetensors import read_header, read_tensor
from halfbyte.ops import cpu, dequantized
from halfbyte.quantization.bnb_format import (
    components,
    from_components,
    read_checkpoint,
    write_checkpoint,
)
from halfbyte.quantization.tensor import NF4Tensor, quantize

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 172), (1,), (3,), (65,), (1000, 7), (4, 64), (128, 512), (0,)]


def random_weight(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    w = torch.randn(shape, generator=generator).to(dtype)
    w.view(-1)[::7] = 0
    return w


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_and_scales_equal_bitsandbytes(quant_type: str, block_size: int, dtype: torch.dtype):
    for shape in SHAPES[:-1]:
        w = random_weight(shape, dtype)
        theirs, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type=quant_type)
        ours = quantize(w, block_size=block_size, quant_type=quant_type, double_quant=False)
        assert torch.equal(ours.packed, theirs.view(-1)), shape
        assert torch.equal(ours.absmax, state.absmax), shape
        assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(theirs, state)), shape


def test_nested_codes_differ_at_near_ties_only():
    """bitsandbytes looks codes up in 65,536 steps and sums the mean in another order: under 1 % of
    codes, by one."""
    w = random_weight((512, 4096), torch.float32)
    _, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = quantize(w)
    assert ours.nested_absmax is not None and ours.nested_offset is not None
    steps = (ours.absmax.int() - state.absmax.int()).abs()
    assert int(steps.max()) <= 1 and float((steps > 0).float().mean()) < 0.01
    torch.testing.assert_close(ours.nested_absmax, state.state2.absmax, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.nested_offset, state.offset.view(()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_their_nested_bytes_dequantize_bit_equal(dtype: torch.dtype):
    for shape in [(64, 172), (65,), (128, 512)]:
        packed, state = bnb.quantize_4bit(
            random_weight(shape, dtype), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        stored = {
            "w": packed,
            **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()},
        }
        ours = from_components("w", stored)
        assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state)), shape


def test_bitsandbytes_opens_ours():
    w = random_weight((64, 172), torch.bfloat16)
    ours = quantize(w)
    parts = components("w", ours)
    state = bnb.QuantState.from_dict(
        {key.removeprefix("w."): value for key, value in parts.items() if key != "w"},
        device=torch.device("cpu"),
    )
    assert torch.equal(bnb.dequantize_4bit(parts["w"], state), ours.dequantize())


def test_layout_of_a_checkpoint(tmp_path: Path):
    """Names, shapes and JSON keys in the order bitsandbytes writes them; reading back is
    bit-exact."""
    ours = quantize(random_weight((64, 172), torch.bfloat16))
    write_checkpoint(tmp_path / "model.safetensors", {"a.weight": ours, "b": torch.ones(3)})
    entries = read_header(tmp_path / "model.safetensors")
    assert entries["a.weight"].shape == (64 * 172 // 2, 1)
    key = "a.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(read_tensor(entries[key], key).tolist()))
    assert list(state) == [
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]
    back = read_checkpoint(tmp_path)
    assert set(back) == {"a.weight", "b"}
    restored = back["a.weight"]
    assert isinstance(restored, NF4Tensor)
    for name in (
        "packed",
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "nested_offset",
    ):
        assert torch.equal(getattr(restored, name), getattr(ours, name)), name


def test_damaged_components_are_named():
    parts = components("w", quantize(random_weight((64, 64), torch.float32)))
    for missing in ("w.absmax", "w.nested_absmax", "w.quant_state.bitsandbytes__nf4"):
        with pytest.raises(ModelError, match="w is damaged"):
            from_components("w", {k: v for k, v in parts.items() if k != missing})
    with pytest.raises(ModelError, match="absmax must be"):
        from_components("w", {**parts, "w.absmax": parts["w.absmax"][:-1]})


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_is_refused_by_block(bad: float):
    w = torch.ones(640)
    w[200] = bad
    with pytest.raises(ValueError, match=r"block 3 \(elements 192"):
        quantize(w)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="block_size"):
        quantize(torch.ones(64), block_size=48)
    with pytest.raises(ValueError, match="unknown 4-bit format"):
        quantize(torch.ones(64), quant_type="int3")
    with pytest.raises(TypeError, match="int64"):
        quantize(torch.ones(64, dtype=torch.int64))
    q = quantize(torch.ones(64))
    with pytest.raises(ValueError, match="packed must be"):
        ops.dequantize_4bit(q.parts, 128, torch.float32)


# --- the subclass ---------------------------------------------------------------------------------


def quantized_linear(bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    layer = nn.Linear(100, 48, bias=bias)
    layer.weight = nn.Parameter(quantize(layer.weight.data), requires_grad=False)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_equals_its_dequantized_twin_bit_for_bit(dtype: torch.dtype):
    with cpu.using("torch"):
        _equals_twin(dtype)


def _equals_twin(dtype: torch.dtype):
    layer = quantized_linear()
    weight = layer.weight
    assert isinstance(weight, NF4Tensor)
    x = torch.randn(2, 5, 100, dtype=dtype, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    ours = layer(x)
    theirs = nn.functional.linear(twin, weight.dequantize(dtype), layer.bias.to(dtype))
    assert torch.equal(ours, theirs)
    grad = torch.randn_like(ours)
    ours.backward(grad)
    theirs.backward(grad)
    assert x.grad is not None and twin.grad is not None and torch.equal(x.grad, twin.grad)


def test_generating_first_does_not_spoil_training():
    layer = quantized_linear()
    dequantized._buffers.clear()
    with cpu.using("torch"):
        with torch.inference_mode():
            layer(torch.randn(2, 100))
        layer(torch.randn(2, 100, requires_grad=True)).sum().backward()


def test_saved_for_backward_is_the_four_bits():
    layer = quantized_linear()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(4, 100, requires_grad=True))
    assert saved == []


def test_survives_what_models_do_to_weights():
    layer = quantized_linear()
    assert isinstance(copy.deepcopy(layer).weight, NF4Tensor)
    assert isinstance(layer.to("cpu").weight, NF4Tensor)
    state = layer.state_dict()
    with torch.device("meta"):
        empty = nn.Linear(100, 48)
    empty.load_state_dict(state, assign=True)
    x = torch.randn(3, 100)
    assert torch.equal(empty(x), layer(x))


def test_refuses_by_name():
    layer = quantized_linear()
    with pytest.raises(TypeError, match="not cast"):
        layer.to(torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"aten\.add"):
        layer.weight + 1


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

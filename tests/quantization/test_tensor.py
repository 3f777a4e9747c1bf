"""4-bit storage: bytes against bitsandbytes, values against fp64, the tensor subclass against an
ordinary weight."""

import copy

import pytest
import torch
from bitsandbytes import functional as bnb
from torch import nn

from halfbyte import nf4, ops
from halfbyte.ops import cpu, dequantized
from halfbyte.quantization.tensor import NF4Tensor, quantize

from ..helpers import FLOAT_TYPES, random_weight

SHAPES = [(64, 172), (1,), (3,), (65,), (1000, 7), (4, 64), (128, 512), (0,)]


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_codes_and_scales_equal_bitsandbytes(quant_type: str, block_size: int, dtype: torch.dtype):
    for shape in SHAPES[:-1]:
        w = random_weight(shape, dtype)
        theirs, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type=quant_type)
        ours = quantize(w, block_size=block_size, quant_type=quant_type, double_quant=False)
        assert torch.equal(ours.packed, theirs.view(-1)), shape
        assert torch.equal(ours.absmax, state.absmax), shape
        assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(theirs, state)), shape


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


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("weights", "block"), [(64, 64), (65, 64), (17 * 64 * 256 + 3, 64), (4096, 32), (1, 4096)]
)
def test_stored_sizes_are_what_a_tensor_takes(weights: int, block: int, double_quant: bool):
    tensor = nf4.quantize(torch.randn(weights), block_size=block, double_quant=double_quant)
    assert sum(nf4.stored_sizes(weights, block, double_quant)) == tensor.stored_bytes

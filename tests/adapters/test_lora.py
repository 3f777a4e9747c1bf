"""The adapter: gradients against an unquantized twin and autograd, dropout from counters, files
against PEFT."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import halfbyte
from halfbyte import nf4, ops
from halfbyte.adapters import lora
from halfbyte.adapters.lora import AdapterConfig, DropoutClock, LoraLinear
from halfbyte.errors import UsageError
from halfbyte.exporters.merge import surviving_share
from halfbyte.ops import cpu


def test_dora_begins_as_its_base_and_scales_rows_to_its_magnitudes():
    torch.manual_seed(0)
    for weight in (torch.randn(48, 64), nf4.quantize(torch.randn(48, 64))):
        layer = nn.Linear(64, 48)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        plain = copy.deepcopy(layer)
        made = lora.LoraLinear.from_linear(
            layer, AdapterConfig(4, 8, use_dora=True), 0, lora.DropoutClock(), torch.Generator()
        )
        x = torch.randn(7, 64)
        torch.testing.assert_close(made(x), plain(x), rtol=1e-6, atol=1e-6)
        nn.init.normal_(made.lora_B, std=0.3)
        with torch.no_grad():
            merged = made.merged(made.base_weight().float())
        torch.testing.assert_close(merged.norm(dim=1), made.lora_magnitude_vector)
        torch.testing.assert_close(
            made.train()(x), x @ merged.t() + made.bias, rtol=1e-4, atol=1e-4
        )
        before = made.eval()(x)
        with torch.no_grad():
            made.lora_A.mul_(2)  # norms at rest are found anew when what they depend on changes
        assert not torch.allclose(made(x), before)
        merged = made.merged(made.base_weight().float()).detach()
        torch.testing.assert_close(made(x), x @ merged.t() + made.bias, rtol=1e-4, atol=1e-4)
        assert 0 <= surviving_share(made, halfbyte.TrainConfig(model="m", data="d")) <= 1.5


def adapted(
    config: AdapterConfig, *, quantized: bool, dtype: torch.dtype = torch.float32
) -> LoraLinear:
    """One layer; unquantized it holds the dequantized weight: the twin."""
    torch.manual_seed(3)
    layer = nn.Linear(96, 40)
    q = nf4.quantize(layer.weight.data).with_dtype(dtype)
    layer.weight = nn.Parameter(q if quantized else q.dequantize(dtype), requires_grad=False)
    layer.bias = nn.Parameter(layer.bias.data.to(dtype), requires_grad=False)
    made = LoraLinear.from_linear(
        layer, config, 5, DropoutClock(7, 3, 1), torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        made.lora_B.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    return made


def gradients(layer: LoraLinear, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 7, 96, generator=generator).to(dtype).requires_grad_()
    out = layer(x)
    out.backward(torch.randn(out.shape, generator=generator).to(dtype))
    assert x.grad is not None and layer.lora_A.grad is not None and layer.lora_B.grad is not None
    return [out.detach(), x.grad, layer.lora_A.grad, layer.lora_B.grad]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_equals_the_twin_bit_for_bit(dtype: torch.dtype, dropout: float):
    config = AdapterConfig(4, 8, dropout)
    with cpu.using("torch"):
        ours = gradients(adapted(config, quantized=True, dtype=dtype), dtype)
        twin = gradients(adapted(config, quantized=False, dtype=dtype), dtype)
    assert all(torch.equal(a, b) for a, b in zip(ours, twin, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_library_gives_the_twins_numbers(dtype: torch.dtype, dropout: float):
    """Sums in another order, then one rounding to the dtype on either side; du and u carry a
    rounding each, too."""
    config = AdapterConfig(4, 8, dropout)
    ours = gradients(adapted(config, quantized=True, dtype=dtype), dtype)
    twin = gradients(adapted(config, quantized=False, dtype=dtype), dtype)
    unit = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}[dtype]
    for mine, theirs in zip(ours, twin, strict=True):
        assert float((mine.float() - theirs.float()).norm() / theirs.float().norm()) < 4 * unit


@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_equal_autograds(rslora: bool):
    """The hand-written backward against autograd on the formula, in fp64 terms: fp32 rounding
    only."""
    config = AdapterConfig(4, 8, 0.25, rslora)
    layer = adapted(config, quantized=True)
    ours = gradients(layer, torch.float32)
    a, b = (p.detach().double().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(2, 7, 96, generator=generator).double().requires_grad_()
    threshold = ops.drop_threshold(0.25)
    mask = ops.dropout_mask(x.numel(), ops.Dropout(threshold, 7, 3, 1, 5), x.device).view_as(x)
    dropped = x * mask / (1 - threshold / ops.DROPOUT_RESOLUTION)
    y = (
        nn.functional.linear(x, layer.base_weight().double(), layer.bias.double())
        + config.scaling * dropped @ a.T @ b.T
    )
    y.backward(torch.randn(y.shape, generator=generator).double())
    for mine, theirs in zip(ours, (y, x.grad, a.grad, b.grad), strict=True):
        assert theirs is not None
        torch.testing.assert_close(mine.double(), theirs.detach(), rtol=2e-5, atol=2e-5)


def test_evaluation_does_not_disturb_training():
    """A peer's gradients are wrong after one evaluation; here train, eval, train gives the same
    bits."""
    layer = adapted(AdapterConfig(4, 8, 0.1), quantized=True)
    before = gradients(layer.train(), torch.float32)
    layer.zero_grad()
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(3, 96))
    after = gradients(layer.train(), torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_targets(tiny_llama: LlamaForCausalLM):
    assert len(lora.target_names(tiny_llama, "all-linear")) == 14
    assert len(lora.target_names(tiny_llama, "q_proj, v_proj")) == 4
    assert lora.target_names(tiny_llama, r".*layers\.1\.mlp\..*_proj") == [
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    with pytest.raises(UsageError, match="qproj"):
        lora.target_names(tiny_llama, "q_proj,qproj")

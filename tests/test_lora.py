"""The adapter: gradients against an unquantized twin and autograd, dropout from counters, files
against PEFT."""

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from halfbyte import nf4, ops
from halfbyte.adapters import lora
from halfbyte.adapters.lora import AdapterConfig, DropoutClock, LoraLinear
from halfbyte.errors import UsageError
from halfbyte.ops import cpu


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


# --- dropout --------------------------------------------------------------------------------------


def philox_in_python(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-7 as the paper writes it, in Python integers."""
    for _ in range(7):
        p0, p1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            (p1 >> 32) ^ counter[1] ^ key[0],
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ counter[3] ^ key[1],
            p0 & 0xFFFFFFFF,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


def test_masks_are_philox():
    seed, step, micro, layer, threshold = 0x1234_5678_9ABC, 17, 3, 250, 20000
    n = 100
    expected = []
    for block in range(13):
        words = philox_in_python([block, layer, micro, step], [seed & 0xFFFFFFFF, seed >> 32])
        expected += [half >= threshold for word in words for half in (word & 0xFFFF, word >> 16)]
    mask = ops.dropout_mask(
        n, ops.Dropout(threshold, seed, step, micro, layer), torch.device("cpu")
    )
    assert mask.tolist() == expected[:n]


def test_masks_do_not_depend_on_how_much_is_asked_for():
    long = ops.dropout_mask(600_000, ops.Dropout(3277, 1, 2, 3, 4), torch.device("cpu"))
    assert torch.equal(
        ops.dropout_mask(1000, ops.Dropout(3277, 1, 2, 3, 4), torch.device("cpu")), long[:1000]
    )
    share = 1 - 3277 / 65536
    # five standard deviations of a binomial of 600,000
    assert abs(float(long.float().mean()) - share) < 5 * (share * (1 - share) / 600_000) ** 0.5
    for first in (8, 8 * 1000, 13, 65_537 * 8 + 3):  # a part's mask is that part of the whole's
        part = ops.dropout_mask(70_000, ops.Dropout(3277, 1, 2, 3, 4, first), torch.device("cpu"))
        assert torch.equal(part, long[first : first + 70_000])
    other = ops.dropout_mask(600_000, ops.Dropout(3277, 1, 2, 3, 5), torch.device("cpu"))
    both = float((long & other).float().mean())
    assert abs(both - share**2) < 0.002, "layers are independent"


def test_targets(tiny_llama: LlamaForCausalLM):
    assert len(lora.target_names(tiny_llama, "all-linear")) == 14
    assert len(lora.target_names(tiny_llama, "q_proj, v_proj")) == 4
    assert lora.target_names(tiny_llama, r".*layers\.1\.mlp\..*_proj") == [
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    ]
    with pytest.raises(UsageError, match="qproj"):
        lora.target_names(tiny_llama, "q_proj,qproj")

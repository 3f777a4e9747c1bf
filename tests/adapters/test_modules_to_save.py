"""Tests of `adapters.modules_to_save`."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from halfbyte import nf4
from halfbyte.adapters.modules_to_save import (
    make_modules_trainable,
    train_every_parameter,
    trainable_modules,
)
from halfbyte.errors import UsageError


def test_whole_modules_compute_in_the_type_they_had(tiny_llama: LlamaForCausalLM):
    model = tiny_llama.to(torch.bfloat16)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    make_modules_trainable(model, ["lm_head", "embed_tokens", "model.norm"])
    assert [path for path, _ in trainable_modules(model)] == [
        "model.embed_tokens",
        "model.norm",
        "lm_head",
    ]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    model(input_ids=ids).logits.float().square().sum().backward()
    for _, module in trainable_modules(model):
        for p in module.parameters():
            assert p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32


def test_whole_modules_that_cannot_be_are_refused_by_name(tiny_llama: LlamaForCausalLM):
    with pytest.raises(UsageError, match="lm_heads"):
        make_modules_trainable(tiny_llama, ["lm_heads"])
    tied = copy.deepcopy(tiny_llama)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(UsageError) as caught:
        make_modules_trainable(tied, ["lm_head"])
    assert (
        "embed_tokens" in caught.value.what and "lm_head,embed_tokens" in caught.value.ways_out[0]
    )
    make_modules_trainable(tied, ["lm_head", "embed_tokens"])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight, "one parameter, trained once"
    tiny_llama.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        nf4.quantize(tiny_llama.model.layers[0].mlp.up_proj.weight.data), requires_grad=False
    )
    with pytest.raises(UsageError, match="4 bits"):
        make_modules_trainable(tiny_llama, ["up_proj"])


def test_every_parameter_of_a_model_in_16_bits_has_an_fp32_master(tiny_llama: LlamaForCausalLM):
    """Updates far below half a unit of the last place add up; what is computed stays the same."""
    model = tiny_llama.to(torch.bfloat16)
    model.lm_head.weight = model.model.embed_tokens.weight
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    train_every_parameter(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied masters stay tied"
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    norm = model.model.norm.weight
    before = norm.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids).logits.float().square().mean().backward()
        optimizer.step()
    moved = (norm.detach() - before).abs()
    assert float((moved > 0).float().mean()) > 0.9 and float(moved.max()) < 1e-4


def test_models_in_32_bits_are_trained_as_they_are(tiny_llama: LlamaForCausalLM):
    train_every_parameter(tiny_llama)
    assert not list(trainable_modules(tiny_llama))


class Around(nn.Module):
    """A module with a parameter of its own around one with another."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.scale + self.inner.weight[0]


def test_trained_modules_may_lie_in_each_other():
    torch.manual_seed(0)
    model = Around().bfloat16()
    x = torch.randn(2, 4).bfloat16()
    with torch.no_grad():
        expected = model(x)
    train_every_parameter(model)
    found = model(x)
    assert torch.equal(found, expected)
    found.float().sum().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.parameters())

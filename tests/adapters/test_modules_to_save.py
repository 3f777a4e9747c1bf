"""Tests of `adapters.modules_to_save`."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from halfbyte import nf4
from halfbyte.adapters.modules_to_save import make_modules_trainable, trainable_modules
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

"""Tests of `engine.loss`."""

import torch
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
)

from halfbyte.data.formats import IGNORE
from halfbyte.engine import loss
from halfbyte.engine.loss import output_head


def test_chunked_loss_equals_the_whole(tiny_llama: LlamaForCausalLM):
    """Value and gradients of hidden states and of a trained head, whatever the chunk."""
    torch.manual_seed(0)
    head = loss.output_head(tiny_llama)
    weight = tiny_llama.lm_head.weight
    hidden = torch.randn(50, 64)
    labels = torch.randint(0, 160, (50,))
    labels[::3] = IGNORE
    whole = hidden.clone().requires_grad_()
    reference = functional.cross_entropy(
        whole @ weight.T, labels, ignore_index=IGNORE, reduction="sum"
    )
    expected = torch.autograd.grad(reference, [whole, weight])
    for rows in (1, 7, 1000):
        mine = hidden.clone().requires_grad_()
        value = loss.supervised_loss(mine, labels, head, [weight], rows)
        torch.testing.assert_close(value, reference, rtol=1e-5, atol=1e-5)
        got = torch.autograd.grad(value, [mine, weight])
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_head_finds_what_it_asks_of_its_base():
    """OPT's runs the part of the base that holds the layers; Falcon-H1's asks it for a factor."""
    config = AutoConfig.for_model(
        "opt", vocab_size=64, hidden_size=32, ffn_dim=32, num_hidden_layers=1,
        num_attention_heads=2, word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(8)[None]
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    assert torch.allclose(output_head(model)(hidden), model(input_ids=ids).logits[0], atol=1e-5)

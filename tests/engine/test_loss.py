"""Tests of `engine.loss`."""

import torch
from torch.nn import functional
from transformers import (
    LlamaForCausalLM,
)

from halfbyte.data.formats import IGNORE
from halfbyte.engine import loss


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

"""Loss, attention, optimizer and batches, each against its oracle."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from halfbyte.engine import selftest
from halfbyte.engine.selftest import self_test
from halfbyte.model import attention

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def families() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    for config, model in (
        (MistralConfig(**SMALL, sliding_window=5), MistralForCausalLM),
        (Qwen3Config(**SMALL), Qwen3ForCausalLM),
        (Gemma2Config(**SMALL, sliding_window=6), Gemma2ForCausalLM),
        (
            GraniteConfig(
                **{k: v for k, v in SMALL.items() if k != "head_dim"}, logits_scaling=3.0
            ),
            GraniteForCausalLM,
        ),
        (CohereConfig(**{k: v for k, v in SMALL.items() if k != "head_dim"}), CohereForCausalLM),
    ):
        yield model(config).eval()


@torch.no_grad()
def test_packing_and_chunked_head_hold_across_families():
    """Sliding windows, soft caps, scaled and divided logits: errors within fp32 rounding."""
    for model in families():
        model.config.dtype = torch.float32
        abilities = self_test(model)
        assert abilities.packing and abilities.chunked_head, (type(model).__name__, abilities)


@torch.no_grad()
def test_self_test_catches_a_leak(tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch):
    """An attention that ignores the boundaries must fail the self-test."""
    honest = attention.segment_attention

    def leaky(*args, cu_seq_lens_q, **kwargs):
        return honest(*args, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **kwargs)

    tiny_llama.config.dtype = torch.float32
    monkeypatch.setattr(attention, "segment_attention", leaky)
    assert not self_test(tiny_llama).packing
    monkeypatch.undo()
    assert self_test(tiny_llama).packing


def test_rounding_is_told_from_a_leak(
    tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    """Somewhat above the tolerance it is decided by whether a row's bits depend on the row before
    it."""
    tiny_llama.config.dtype = torch.float32
    real = selftest._relative
    floor = selftest.TOLERANCE[torch.float32]
    monkeypatch.setattr(
        selftest, "_relative", lambda value, reference: real(value, reference) + 2 * floor
    )
    assert self_test(tiny_llama).packing
    monkeypatch.setattr(
        selftest, "_relative", lambda value, reference: real(value, reference) + 5 * floor
    )
    assert not self_test(tiny_llama).packing

    def leaking(*args) -> torch.Tensor:
        found = packed(*args)
        return found + found[:1] * 1e-9  # less than any tolerance

    packed = selftest._packed
    monkeypatch.setattr(
        selftest, "_relative", lambda value, reference: real(value, reference) + 2 * floor
    )
    monkeypatch.setattr(selftest, "_packed", leaking)
    assert not self_test(tiny_llama).packing

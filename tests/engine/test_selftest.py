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
from halfbyte.errors import ModelError
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
    real, packed = selftest._largest, selftest._packed
    floor = selftest.TOLERANCE[torch.float32]

    def farther(times: int) -> None:
        monkeypatch.setattr(selftest, "_largest", lambda *given: real(*given) + times * floor)

    farther(2)
    assert self_test(tiny_llama).packing
    farther(5)
    assert not self_test(tiny_llama).packing

    def leaking(*args) -> torch.Tensor:
        found = packed(*args)
        return found + found[:1] * 1e-9  # less than any tolerance

    farther(2)
    monkeypatch.setattr(selftest, "_packed", leaking)
    assert not self_test(tiny_llama).packing


HONEST = selftest._packed


@torch.no_grad()
def test_in_16_bits_packed_rows_are_held_against_fp32(monkeypatch: pytest.MonkeyPatch):
    """As near as separate rows are, which is not very near where softmaxes are steep; what is
    farther is refused."""
    for model in families():
        model.bfloat16().config.dtype = torch.bfloat16
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4)  # steep softmaxes: roundings of some tokens grow a hundredfold
        abilities = self_test(model)
        assert abilities.packing and abilities.chunked_head, (type(model).__name__, abilities)
        with monkeypatch.context() as patch:
            patch.setattr(selftest, "_packed", lambda *given: _shaken(HONEST(*given)))
            assert not self_test(model).packing


def _shaken(hidden: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    return (hidden.float() * (1 + 0.1 * torch.randn(hidden.shape))).to(hidden.dtype)


def test_a_model_that_looks_ahead_is_refused(tiny_llama: LlamaForCausalLM):
    """As bert does: it would learn to copy what it is to predict."""
    tiny_llama.config.dtype = torch.float32
    assert self_test(tiny_llama).packing
    forward = tiny_llama.model.norm.forward

    def looking_ahead(hidden: torch.Tensor) -> torch.Tensor:
        return forward(hidden + 0.1 * hidden.roll(-1, dims=1))

    tiny_llama.model.norm.forward = looking_ahead  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ModelError, match="no causal language model"):
        self_test(tiny_llama)


def test_a_model_that_cannot_be_run_is_refused_by_name(tiny_llama: LlamaForCausalLM):
    """As Llama 4, whose base model is its head's; without it, the training ended unforeseen."""

    def without(**given: object) -> object:
        raise AttributeError("no attribute 'last_hidden_state'")

    tiny_llama.model.forward = without  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ModelError, match="LlamaForCausalLM does not run here") as refused:
        self_test(tiny_llama)
    assert "last_hidden_state" in str(refused.value)

"""Loss, attention, optimizer and batches, each against its oracle."""

from collections.abc import Iterator

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
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

from halfbyte.data.batches import IGNORE, Schedule, collate, pack, prepare
from halfbyte.data.renderer import TokenizedExample
from halfbyte.engine import loss, selftest
from halfbyte.engine.adamw8bit import AdamW8bit
from halfbyte.engine.selftest import self_test
from halfbyte.errors import DataError
from halfbyte.model import attention
from halfbyte.ops.library import ROW_MULTIPLE

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


def test_soft_cap_and_sinks_equal_the_formula():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    sinks = torch.randn(4)
    out, _ = attention.segment_attention(
        None,
        q,
        k,
        v,
        None,
        sliding_window=3,
        softcap=2.0,
        s_aux=sinks,
        cu_seq_lens_q=torch.tensor([0, 9]),
    )
    for head in range(4):
        for t in range(9):
            keys = slice(max(0, t - 2), t + 1)
            scores = torch.tanh((k[0, head // 2, keys] @ q[0, head, t]) / 8**0.5 / 2.0) * 2.0
            weights = torch.cat((scores, sinks[head : head + 1])).softmax(0)[:-1]
            torch.testing.assert_close(
                out[0, t, head], weights @ v[0, head // 2, keys], rtol=1e-5, atol=1e-5
            )


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


# --- optimizer ------------------------------------------------------------------------------------


def test_8bit_adamw_is_within_bitsandbytes_own_acceptance():
    """50 steps against torch's AdamW: mean parameter error below 6e-5 (their test's bound for
    fp32)."""
    torch.manual_seed(0)
    start = torch.randn(256, 1024) * 0.1
    ours, reference = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = AdamW8bit([ours], lr=1e-3, weight_decay=0.01)
    theirs = torch.optim.AdamW([reference], lr=1e-3, weight_decay=0.01)
    for step in range(50):
        grad = torch.randn(256, 1024, generator=torch.Generator().manual_seed(step)) * 0.01
        ours.grad, reference.grad = grad.clone(), grad.clone()
        mine.step()
        theirs.step()
        error = float((ours - reference).abs().mean())
        assert error < 6e-5, (step, error)
        with torch.no_grad():
            reference.copy_(
                ours
            )  # as their test does: each step is judged alone, from equal parameters


def test_8bit_adamw_agrees_with_bitsandbytes():
    """The same formula and nearly the same codes: parameters after 20 steps differ by under a
    thousandth of a step."""
    torch.manual_seed(0)
    start = torch.randn(64, 512) * 0.1
    ours, peer = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    mine = AdamW8bit([ours], lr=1e-3, weight_decay=0.01)
    theirs = bitsandbytes.optim.AdamW8bit([peer], lr=1e-3, weight_decay=0.01)
    for step in range(20):
        grad = torch.randn(64, 512, generator=torch.Generator().manual_seed(step)) * 0.01
        ours.grad, peer.grad = grad.clone(), grad.clone()
        mine.step()
        theirs.step()
    assert float((ours - peer).abs().mean()) < 1e-5 and float((ours - start).abs().mean()) > 1e-3


def test_small_tensors_are_exact_and_state_moves_raw():
    torch.manual_seed(0)
    large, small = nn.Parameter(torch.randn(80, 64)), nn.Parameter(torch.randn(10, 7))
    reference = nn.Parameter(small.detach().clone())
    mine, theirs = AdamW8bit([large, small], lr=1e-2), torch.optim.AdamW([reference], lr=1e-2)
    for _ in range(5):
        for p in (large, small):
            p.grad = torch.randn_like(p)
        assert small.grad is not None
        reference.grad = small.grad.clone()
        mine.step()
        theirs.step()
    torch.testing.assert_close(small, reference, rtol=1e-5, atol=1e-6)
    other = AdamW8bit(
        [nn.Parameter(large.detach().clone()), nn.Parameter(small.detach().clone())], lr=1e-2
    )
    other.load_state_dict(mine.state_dict())
    assert other.steps == 5
    for name, tensor in mine.state_tensors().items():
        assert torch.equal(other.state_tensors()[name], tensor), name


# --- batches --------------------------------------------------------------------------------------


def row(length: int, supervised_from: int = 1) -> TokenizedExample:
    return TokenizedExample(
        f"f:{length}", list(range(length)), [i >= supervised_from for i in range(length)]
    )


def test_labels_are_shifted_within_rows_only():
    batch = collate([row(3), row(4, 2)], [1, 0])
    assert batch.input_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.labels.tolist() == [-100, 2, 3, -100, 1, 2, -100]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert [(at, part.labels.tolist()) for at, part in batch.split(1)] == [
        (0, [-100, 2, 3, -100]),
        (4, [1, 2, -100]),
    ]
    assert [(at, part.rows, part.cu_seqlens.tolist()) for at, part in batch.split(7)] == [
        (0, batch.rows, [0, 4, 7])
    ]


def test_padding_is_a_row_of_its_own_that_trains_nothing():
    batch = collate([row(3), row(4, 2)], [1, 0])
    padded = batch.padded()
    assert len(padded.input_ids) == ROW_MULTIPLE and padded.cu_seqlens.tolist() == [0, 4, 7, 16]
    assert padded.position_ids.tolist()[7:] == list(range(9))
    assert padded.supervised == batch.supervised and padded.padded() is padded


def test_long_rows_are_counted_not_forgotten():
    rows = [row(5), row(20), row(30, 15)]
    result = prepare(rows, 10, "truncate")
    assert (result.truncated, result.end_lost, result.dropped_unsupervised) == (1, 1, ["f:30"])
    assert prepare(rows, 10, "drop").dropped_long == ["f:20", "f:30"]
    with pytest.raises(DataError, match="longer than max_length") as caught:
        prepare(rows, 10, "error")
    assert caught.value.where == "f:20"
    with pytest.raises(DataError, match="none of 1 rows"):
        prepare([row(30, 15)], 10, "truncate")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(0, 5))
def test_packing_keeps_every_row_once(lengths: list[int], epoch: int):
    rows = [row(n) for n in lengths]
    schedule = Schedule(rows, 1, 2, 2, 40)
    sequences = schedule.sequences(epoch)
    assert sorted(r for sequence in sequences for r in sequence) == list(range(len(rows)))
    assert all(sum(lengths[r] for r in sequence) <= 40 for sequence in sequences)
    assert len(sequences) == len(schedule.sequences(0)), "every epoch has as many steps"
    assert sequences == schedule.sequences(epoch)
    assert [r for step in schedule.epoch(epoch) for group in step for r in group] == [
        r for sequence in sequences for r in sequence
    ]


def test_packing_fills_bins():
    assert pack([6, 4, 5, 5], [0, 1, 2, 3], 10) == [[0, 1], [2, 3]]

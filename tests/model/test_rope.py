"""Tests of `model.rope`."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from halfbyte.data.batches import collate
from halfbyte.engine.evaluate import row_losses
from halfbyte.engine.generate import prompts_at_once
from halfbyte.engine.selftest import self_test
from halfbyte.files.model_config import context_of
from halfbyte.model.rope import border, forget_longer_passes, pass_kind

from ..helpers import small_config, tiny_rows

SHORT = 32


def longrope(**changes: Any) -> Phi3Config:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": SHORT,
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + 0.7 * i for i in range(8)],
    }
    sizes: dict[str, Any] = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4 * SHORT,
        "original_max_position_embeddings": SHORT,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    }
    return Phi3Config(**{**sizes, "rope_parameters": rope, **changes})


def dynamic() -> LlamaConfig:
    return small_config(
        max_position_embeddings=SHORT,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    )


def test_kinds_change_where_transformers_changes_factors():
    kind = pass_kind(longrope())
    assert [kind(n) for n in (1, SHORT, SHORT + 1, 4 * SHORT)] == [0, 0, 1, 1]
    assert border(longrope()) == SHORT and border(small_config()) is None
    kind = pass_kind(dynamic())
    assert kind(1) == kind(SHORT) != kind(SHORT + 1) != kind(SHORT + 2)
    assert border(dynamic()) == SHORT


def test_a_context_is_as_long_as_it_is_extended():
    def context(kind: str, original: int | None, limit: int = 64) -> int | None:
        rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
        if original:
            rope["original_max_position_embeddings"] = original
        return context_of(small_config(max_position_embeddings=limit, rope_parameters=rope))

    assert context("yarn", 64) == context("linear", None) == context("dynamic", None) == 256
    assert context("yarn", 16) == 64, "what is said to be extended already is not extended again"
    assert context_of(small_config(max_position_embeddings=64)) == 64


@torch.no_grad()
def test_what_stands_beside_a_row_does_not_change_it():
    torch.manual_seed(0)
    for config, kind in ((longrope(), Phi3ForCausalLM), (dynamic(), LlamaForCausalLM)):
        model: Any = kind(config).eval()
        forget_longer_passes(model)
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(4)
        rows = tiny_rows(12, SHORT + 20, 20, SHORT, SHORT + 9, SHORT + 20)
        model.config.dtype = torch.float32
        abilities = self_test(model)
        assert abilities.packing
        alone = [row_losses(model, [row], packed=False).sums[0] for row in rows]
        together = row_losses(model, rows, packed=True).sums
        torch.testing.assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-5, atol=0)


def test_a_micro_batch_is_cut_where_its_rows_are_rotated_otherwise():
    rows = tiny_rows(12, SHORT + 20, SHORT + 1, 20, 8)
    batch = collate(rows, range(5))
    parts = batch.split(10**6, pass_kind(longrope()))
    assert [len(part.rows) for _, part in parts] == [1, 2, 2]
    assert [start for start, _ in parts] == [0, 12, 12 + 2 * SHORT + 21]
    padded = collate(rows, [0]).padded()
    assert int(padded.position_ids.max()) < 12, "padding is no longer than the rows"


def test_prompts_that_grow_over_the_border_are_answered_alone():
    kind = pass_kind(longrope())
    prompts = [[1] * n for n in (4, 5, SHORT - 2, SHORT - 1, 6)]
    groups = prompts_at_once(prompts, 0, lambda length: kind(length + 8))
    assert [len(group) for group in groups] == [2, 1, 1, 1]

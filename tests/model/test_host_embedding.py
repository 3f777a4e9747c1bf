"""An embedding table in host memory: the same rows, and a plan that is smaller by the table."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

import halfbyte
from halfbyte.config.options import PlanConfig, TrainConfig
from halfbyte.engine.learner import Learner
from halfbyte.engine.reductions import REDUCTIONS
from halfbyte.engine.selftest import Abilities
from halfbyte.errors import UsageError
from halfbyte.model.host_embedding import host_table, keep_on_host, why_not
from halfbyte.planning.budget import CONTEXT_BYTES, Budget
from halfbyte.planning.dry_run import outline
from halfbyte.planning.search import Planner

from ..helpers import small_config

IDS = torch.arange(24).view(2, 12) * 5 % 160


def gemma() -> Any:
    """Multiplies rows by a buffer of the module."""
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
    )
    shared = {name: getattr(small_config(), name) for name in (*names, "num_key_value_heads")}
    return Gemma2ForCausalLM(Gemma2Config(head_dim=16, tie_word_embeddings=False, **shared))


@pytest.mark.parametrize("make", [lambda: LlamaForCausalLM(small_config()), gemma])
def test_rows_are_the_same_and_the_table_is_no_parameter(make: Any):
    torch.manual_seed(0)
    model = make().requires_grad_(False).eval()
    expected, table = model(input_ids=IDS).logits, model.get_input_embeddings().weight
    keep_on_host(model)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    assert all(p is not table for p in model.parameters())
    assert host_table(model) is model.get_input_embeddings().weight
    assert (
        isinstance(model.get_input_embeddings(), nn.Embedding) and why_not(model) == "it is there"
    )
    assert model.device == table.device
    embedding: Any = model.get_input_embeddings()
    embedding.computes_on = torch.device("meta")
    assert embedding(IDS).is_meta, "rows go where the model computes"


def test_a_plan_is_smaller_by_the_table_and_counts_it_on_the_host():
    config = small_config(vocab_size=32000, hidden_size=256)
    here, there = (outline(config, 64, embedding_offloading=how) for how in ("never", "always"))
    size = 2 * 32000 * 256
    assert here.tensor_bytes - there.tensor_bytes == size
    assert here.bytes_of("embeddings and head") - there.bytes_of("embeddings and head") == size
    assert [part.where for part in there.ledger if part.part == "embedding table"] == ["host"]
    assert here.parameters == there.parameters and here.phases["load"] == there.phases["load"]


def test_a_plan_passes_over_what_this_model_cannot_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Whether a table can move is certain only when the model is built: what does not fit is said,
    not that."""
    monkeypatch.setattr(Planner, "_embedding_may_move", lambda self: True)
    small_config(tie_word_embeddings=True).save_pretrained(tmp_path)
    options: dict[str, Any] = {"dtype": "bfloat16", "max_length": 64}
    assert not halfbyte.plan(str(tmp_path), device="cuda", fit_to="600MiB", **options).fits
    planner = Planner(tmp_path, PlanConfig(model=str(tmp_path), device="cuda", **options), None)
    planner.budget = Budget("cuda", 600 << 20, CONTEXT_BYTES)
    assert planner.resolve_auto()[0] == {}


def test_where_it_cannot_lie_there_it_says_why():
    def learner(model: Any, **options: Any) -> Learner:
        config = TrainConfig(model="none", data="none", **options)
        return Learner(model, config, Abilities(True, True, 0.0, 0.0), lambda name, line: None)

    with pytest.raises(UsageError, match="computes in host memory"):
        learner(LlamaForCausalLM(small_config()), embedding_offloading="always")
    (move,) = [r for r in REDUCTIONS if r.option == "embedding_offloading"]
    assert move.while_running(learner(LlamaForCausalLM(small_config())), []) is None
    with pytest.raises(UsageError, match="the same table"):
        outline(small_config(tie_word_embeddings=True), 64, embedding_offloading="always")
    with pytest.raises(UsageError, match="it is trained"):
        outline(small_config(), 64, embedding_offloading="always", modules_to_save="embed_tokens")

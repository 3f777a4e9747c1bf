"""Tests of `engine.reductions`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from halfbyte.config.options import RULES, TrainConfig
from halfbyte.data.batches import collate
from halfbyte.engine.reductions import REDUCTIONS, Situation, moved
from halfbyte.memory.recompute import Recompute

from ..helpers import gradient, tiny_learner, tiny_rows

BY_OPTION = {reduction.option: reduction for reduction in REDUCTIONS}


def test_a_learner_takes_less_memory_midway_for_the_same_bits(
    tiny_config: LlamaConfig, tmp_path: Path
):
    batch = collate(tiny_rows(9, 30), range(2))
    made = tiny_learner(tiny_config, tmp_path, kept_activations="all")
    expected, _ = gradient(made, batch)
    for option in ("kept_activations", "activation_offloading", "paging"):
        change = BY_OPTION[option].while_running
        assert change(made, [batch]), option
        found, _ = gradient(made, batch)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert change(made, [batch]) is None, "there is nothing more of it"
    assert isinstance(made.recompute, Recompute) and made.recompute.keep == "none"


def situation(**changes: Any) -> Situation:
    given = {"device": "cpu", "embedding_may_move": False, "longest": 100, "largest": 300}
    return Situation(**{**given, "length": 512, **changes})


def config(**options: Any) -> TrainConfig:
    return TrainConfig(model="m", data="d", **options)


def test_every_reduction_changes_an_option_there_is():
    assert len(BY_OPTION) == len(REDUCTIONS) and BY_OPTION.keys() <= RULES.keys()


def test_what_changes_no_result_stands_before_what_does():
    costs = [bool(reduction.costs(config())) for reduction in REDUCTIONS]
    assert costs == sorted(costs)


@pytest.mark.parametrize(
    ("options", "changes", "expected"),
    [
        ({}, {}, ["paging", "activation_offloading", "weight_streaming", "tokens_per_pass"]),
        (
            {"optim": "adamw_torch"},
            {},
            ["activation_offloading", "weight_streaming", "tokens_per_pass"],
        ),
        (
            {"weight_streaming": "never", "activation_offloading": "never", "tokens_per_pass": 64},
            {"longest": 2000},
            ["paging", "tokens_per_tile"],
        ),
        (
            {"gradient_checkpointing": False},
            {"device": "cuda", "embedding_may_move": True, "largest": 100},
            ["paging", "embedding_offloading"],
        ),
    ],
)
def test_what_a_training_does_by_itself(
    options: dict[str, Any], changes: dict[str, Any], expected: list[str]
):
    """Only what is left to `auto`, and only where it can help."""
    there = [r for r in REDUCTIONS if r.at_start(config(**options), situation(**changes))]
    assert [reduction.option for reduction in there] == expected


def test_advice_is_a_change_that_can_be_typed():
    """Every change that is named as a way out makes valid options, other than those given."""
    given = config(
        gradient_checkpointing=False,
        per_device_train_batch_size=4,
        dequantized_weights="ahead",
        bnb_4bit_use_double_quant=False,
        optim="adamw_torch",
        lora_r=64,
    )
    for reduction in REDUCTIONS:
        change = reduction.as_advice(given, situation())
        if change:
            after = TrainConfig(**{**given.model_dump(), **change})
            assert after != given and change.keys() <= RULES.keys(), reduction.option
    batch = BY_OPTION["per_device_train_batch_size"].as_advice(given, situation())
    assert batch == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 64}


def test_what_lies_elsewhere_is_named():
    assert moved({"paging": "always", "weight_streaming": "auto"}) == ["optimizer states"]
    assert moved({"activation_offloading": "always"}) == ["layer inputs"]

"""Dropout of a base model: masks by counters, or none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from halfbyte.config.options import TrainConfig
from halfbyte.data.batches import collate
from halfbyte.engine.learner import Learner
from halfbyte.engine.selftest import Abilities
from halfbyte.model.architecture import build_empty
from halfbyte.model.base_dropout import base_dropout, silence

from ..helpers import tiny_rows


def llama(config: LlamaConfig, p: float) -> Any:
    config.attention_dropout = p
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def neox(config: LlamaConfig, p: float) -> Any:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=config.vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=48,
            hidden_dropout=p,
            attention_dropout=p,
        )
    )


def gradients(
    model: Any, place: Path, steps: list[int], notes: list[str], **options: Any
) -> list[list[Tensor]]:
    """Of a step each."""
    config = TrainConfig(
        model="m", data="d", output_dir=str(place), lora_dropout=0.0, load_in_4bit=False, **options
    )
    model.config.dtype = torch.float32
    learner = Learner(
        model, config, Abilities(False, True, 0, 0), lambda w, line: notes.append(line)
    )
    for p in learner.trained:
        if not bool(p.any()):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    found = []
    for step in steps:
        torch.manual_seed(len(found))  # whatever was drawn before
        learner.forget()
        learner.accumulate(collate(tiny_rows(9, 16), range(2)), 20, step, 0)
        found.append([p.grad.clone() for p in learner.trained if p.grad is not None])
    return found


@pytest.mark.parametrize("make", [llama, neox])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_masks_are_a_function_of_the_step(
    tiny_config: LlamaConfig, tmp_path: Path, make: Any, checkpointing: bool
):
    notes: list[str] = []
    model = make(tiny_config, 0.3)
    assert base_dropout(model)
    options = {"gradient_checkpointing": checkpointing}
    first, second, again = gradients(model, tmp_path, [1, 2, 1], notes, **options)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert any("dropout of its own" in line and "0.3" in line for line in notes)


@pytest.mark.parametrize("make", [llama, neox])
def test_off_is_none(tiny_config: LlamaConfig, tmp_path: Path, make: Any):
    notes: list[str] = []
    (found,) = gradients(make(tiny_config, 0.3), tmp_path, [1], notes, base_dropout="off")
    assert any("left out" in line for line in notes)
    (expected,) = gradients(make(tiny_config, 0.0), tmp_path, [1], notes)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_noise_on_routers_is_found_and_left_out():
    config = AutoConfig.for_model(
        "mixtral", vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, router_jitter_noise=0.1,
    )  # fmt: skip
    model = build_empty(config)
    assert base_dropout(model) == {"jitter_noise": 0.1}
    silence(model)
    assert base_dropout(model) == {}

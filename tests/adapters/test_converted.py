"""Adapters that changed their base, as plain LoRA; PEFT itself is the oracle."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.adapters.converted import plain_lora
from halfbyte.errors import ModelError

IDS = torch.arange(3, 30)[None]
CHANGES: list[dict[str, Any]] = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
]


def theirs(stories: Path, home: Path, **options: Any) -> Any:
    """A model of PEFT's, trained a little, and its adapter in ``home``."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", **{**settings, **options})
    )
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn_like(p)
    model.save_pretrained(home)
    return model.eval()


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("options", CHANGES)
def test_it_is_the_model_that_peft_has(
    stories: Path, tmp_path: Path, own_cache: Path, kind: str, options: dict[str, Any]
):
    model = theirs(stories, tmp_path / "adapter", init_lora_weights=kind, **options)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        ours, _ = halfbyte.load(tmp_path / "adapter", load_in_4bit=False, dtype="float32")
        torch.testing.assert_close(ours(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)
        made = plain_lora(tmp_path / "adapter", stories)
        config = json.loads((made / "adapter_config.json").read_text())
        assert config["r"] == 8 and config["init_lora_weights"] is True
        base = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
        again = peft.PeftModel.from_pretrained(base, str(made)).eval()
        torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-3)
    assert plain_lora(made, stories) == made


def test_a_training_goes_on_from_it_and_it_is_merged(
    stories: Path, tmp_path: Path, own_cache: Path
):
    model = theirs(stories, tmp_path / "adapter", init_lora_weights="pissa")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "one", "completion": " two"}\n')
    run = halfbyte.train(
        str(stories),
        str(rows),
        output_dir=str(tmp_path / "run"),
        adapter_name_or_path=str(tmp_path / "adapter"),
        load_in_4bit=False,
        dtype="float32",
        max_steps=1,
        learning_rate=1e-30,
        num_samples=0,
    )
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        found = halfbyte.load(run.path)[0](input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    halfbyte.merge(tmp_path / "adapter", tmp_path / "merged", onto="original")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-2, atol=1e-2)


def test_what_was_drawn_is_refused(stories: Path, tmp_path: Path):
    theirs(stories, tmp_path / "adapter", init_lora_weights="pissa_niter_4")
    with pytest.raises(ModelError) as caught:
        halfbyte.load(tmp_path / "adapter")
    assert "pissa_niter_4" in caught.value.found

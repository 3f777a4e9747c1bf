"""Tests of `adapters.initial`."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import halfbyte
from halfbyte.errors import ModelError, UsageError

from ..helpers import perturb_zeros, train_adapter


def test_training_goes_on_from_an_adapter_of_peft_and_peft_from_ours(stories: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(stories)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
        use_dora=True,
    )
    theirs: Any = peft.get_peft_model(base, config)
    perturb_zeros(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    given = {
        "adapter_name_or_path": str(tmp_path / "theirs"),
        "load_in_4bit": False,
        "dtype": "float32",
    }
    with pytest.raises(UsageError, match="lora_r"):
        train_adapter(stories, tmp_path, "no", max_steps=1, lora_r=4, **given)
    with pytest.raises(UsageError, match="target_modules"):
        train_adapter(
            stories, tmp_path, "no", max_steps=1, lora_r=3, target_modules="all-linear", **given
        )
    data = tmp_path / "rows.jsonl"
    settings = {"max_steps": 1, "num_samples": 0, "learning_rate": 1e-30, **given}
    still = halfbyte.train(str(stories), data, output_dir=str(tmp_path / "still"), **settings)
    ids = torch.arange(12)[None]
    model, _ = halfbyte.load(still.path)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    config_written = json.loads((still.adapter / "adapter_config.json").read_text())
    assert (config_written["r"], config_written["lora_alpha"], config_written["use_dora"]) == (
        3,
        5,
        True,
    )
    onward = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(stories), str(still.adapter), is_trainable=True
    )
    torch.testing.assert_close(onward(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    assert any(p.requires_grad for p in onward.parameters())


@pytest.mark.slow
def test_a_resume_needs_the_adapter_no_more(stories: Path, tmp_path: Path):
    first = train_adapter(
        stories, tmp_path, "first", max_steps=1, modules_to_save="lm_head,embed_tokens"
    )
    begun = {"adapter_name_or_path": str(first.path), "modules_to_save": "embed_tokens, lm_head"}
    whole = train_adapter(stories, tmp_path, "whole", max_steps=4, save_steps=2, **begun)
    cut = train_adapter(stories, tmp_path, "cut", max_steps=4, save_steps=2, **begun)
    shutil.rmtree(cut.path / "checkpoints" / "step-00000004")
    shutil.rmtree(cut.adapter)
    first.path.rename(tmp_path / "gone")
    train_adapter(
        stories, tmp_path, "cut", max_steps=4, save_steps=2, resume_from_checkpoint="auto", **begun
    )
    files = [run.adapter / "adapter_model.safetensors" for run in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_adapter_of_another_base_is_refused_unless_said_so(stories: Path, tmp_path: Path):
    run = train_adapter(stories, tmp_path, "run", max_steps=1)
    other = {"bnb_4bit_quant_type": "fp4", "max_steps": 1, "adapter_name_or_path": str(run.path)}
    data = tmp_path / "rows.jsonl"
    with pytest.raises(ModelError, match="not the one this adapter was trained on"):
        halfbyte.train(str(stories), data, output_dir=str(tmp_path / "no"), num_samples=0, **other)
    said = halfbyte.train(
        str(stories),
        data,
        output_dir=str(tmp_path / "yes"),
        num_samples=0,
        allow_other_base=True,
        **other,
    )
    assert said.config().lora_r == 4, "the adapter's own"

"""Tests of `config.aliases`: words of other tools mean what they mean there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainingArguments

from halfbyte.cli import run as cli
from halfbyte.config.aliases import LEFT_OUT, ONLY, translate, whole_batch
from halfbyte.config.build import read_yaml
from halfbyte.config.options import TrainConfig
from halfbyte.errors import UsageError

from ..helpers import small_config

KNOWN = set(TrainConfig.model_fields)


def test_what_would_change_the_training_is_refused():
    for key, (values, why) in ONLY.items():
        assert translate(key, values[0], KNOWN, "here")[0] == {}
        with pytest.raises(UsageError, match=f"{key} other would change what is trained") as caught:
            translate(key, "other", KNOWN, "here")
        assert why in caught.value.expected
    assert not LEFT_OUT.keys() & ONLY.keys()
    given, notice = translate("lora_target_linear", True, KNOWN, "here")
    assert given == {"target_modules": "all-linear"} and notice


@pytest.mark.parametrize(
    ("key", "value"),
    [("bias", "lora_only"), ("load_best_model_at_end", True), ("group_by_length", True)],
)
def test_what_was_left_out_once_and_changes_weights_is_refused(key: str, value: Any):
    with pytest.raises(UsageError, match="would change what is trained"):
        translate(key, value, KNOWN, "here")


@pytest.mark.parametrize(
    ("key", "value", "ours"),
    [
        ("warmup_steps", 0.1, {"warmup_ratio": 0.1}),  # as transformers 5 takes it
        ("warmup_steps", "0.1", {"warmup_ratio": "0.1"}),
        ("warmup_steps", 10, {"warmup_steps": 10}),
        ("warmup_steps", 0, {"warmup_steps": 0}),
        ("optimizer", "adamw_bnb_8bit", {"optim": "adamw_8bit"}),
        ("optim", "adamw_torch_fused", {"optim": "adamw_torch"}),
        ("optim", "paged_adamw_8bit", {"optim": "paged_adamw_8bit"}),
        ("peft_use_rslora", True, {"use_rslora": True}),
        ("bf16", "full", {"dtype": "bfloat16"}),
        ("bf16", "auto", {}),
        ("neftune_noise_alpha", 0, {}),
        ("label_smoothing_factor", 0.0, {}),
    ],
)
def test_values_that_mean_the_same(key: str, value: Any, ours: dict[str, Any]):
    found, notice = translate(key, value, KNOWN, "here")
    assert found == ours
    assert bool(notice) == (found != {key: value})


def test_bf16_that_is_off_says_nothing_of_32_bits():
    _, notice = translate("bf16", False, KNOWN, "here")
    assert notice == "bf16 False leaves dtype as it is: auto, where it is not given"


VALUES: dict[str, tuple[Any, Any]] = {
    "save_strategy": ("no", "steps"),
    "eval_strategy": ("no", "steps"),
    "logging_strategy": ("no", "steps"),
    "dataloader_num_workers": (0, 1),
    "do_eval": (False, True),
    "remove_unused_columns": (True, False),
    "logging_first_step": (False, True),
    "log_level": ("passive", "error"),
    "save_only_model": (False, True),
    "debug": ("", "underflow_overflow"),
    "eval_accumulation_steps": (None, 1),
    "disable_tqdm": (False, True),
    "dataloader_pin_memory": (False, True),
    "per_device_eval_batch_size": (1, 4),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, {"use_reentrant": True}),
}
"""Of each key that is left out and that transformers' trainer knows, two values."""


@pytest.mark.slow
@pytest.mark.parametrize("key", VALUES)
def test_what_is_left_out_changes_no_weight_in_transformers(key: str, tmp_path: Path):
    def trained(value: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = LlamaForCausalLM(small_config())
        ids = torch.arange(3, 11)
        rows = [{"input_ids": (ids + i) % 150, "labels": (ids + i) % 150} for i in range(6)]
        arguments = TrainingArguments(
            **{
                "output_dir": str(tmp_path / "run"),
                "max_steps": 4,
                "report_to": [],
                "use_cpu": True,
                "gradient_checkpointing": True,
                "per_device_train_batch_size": 2,
                "save_steps": 2,
                "eval_steps": 2,
                key: value,
            }
        )
        Trainer(model, arguments, train_dataset=rows, eval_dataset=rows).train()  # pyright: ignore[reportArgumentType]
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(*map(trained, VALUES[key]))


def test_every_key_that_is_left_out_has_its_reason():
    assert all(LEFT_OUT.values())
    fields = TrainingArguments.__dataclass_fields__
    assert {key for key in LEFT_OUT if key in fields} <= VALUES.keys() | {
        # of names and places, of what is gone, of several processes, and of products that are not
        # ours
        *("logging_dir", "overwrite_output_dir", "tf32", "local_rank", "ddp_timeout")
    }


def test_the_batch_of_a_step_beside_that_of_a_pass():
    given, notice = whole_batch({"micro_batch_size": 2, "batch_size": 8, "lr": 1}, "here")
    assert given == {"micro_batch_size": 2, "lr": 1, "gradient_accumulation_steps": 4}
    assert notice and "gradient_accumulation_steps 4" in notice
    assert whole_batch({"batch_size": 8}, "here") == ({"batch_size": 8}, None)
    same = {"batch_size": "8", "micro_batch_size": "2", "gradient_accumulation_steps": 4}
    assert whole_batch(same, "here")[0]["gradient_accumulation_steps"] == 4
    for wrong in (
        {"batch_size": 9, "micro_batch_size": 2},
        {"batch_size": 8, "micro-batch-size": 2, "gradient_accumulation_steps": 2},
    ):
        with pytest.raises(UsageError, match="rows of a whole step"):
            whole_batch(wrong, "here")


@pytest.mark.parametrize("door", ["flags", "flags=", "file"])
def test_every_door_takes_the_batch_of_a_step(
    door: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["train", "demo", "--data", "rows.jsonl", "--dry-run", "--json"]
    if door == "file":
        (tmp_path / "c.yaml").write_text("batch_size: 8\nmicro_batch_size: 2\n")
        command += ["--config", str(tmp_path / "c.yaml")]
    elif door == "flags":
        command += ["--batch_size", "8", "--micro-batch-size", "2"]
    else:
        command += ["--micro_batch_size=2", "--batch-size=8"]
    assert cli(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["per_device_train_batch_size"] * found["gradient_accumulation_steps"] == 8


def test_a_blank_adapter_is_answered_by_name(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("adapter:\nlora_r: 8\n")
    with pytest.raises(UsageError, match="adapter is blank") as caught:
        read_yaml(tmp_path / "c.yaml")
    assert "full: true" in caught.value.ways_out[0]

"""Which checkpoint counts as the best, and what a result that cannot be written leaves."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaForCausalLM

import halfbyte
from halfbyte.config.options import TrainConfig
from halfbyte.errors import StorageError
from halfbyte.files import hub
from halfbyte.run.directory import EVALS, Run
from halfbyte.training import saving
from halfbyte.training.saving import best_step, save_result

from ..helpers import small_config


def run_with(tmp_path: Path, steps: list[int], losses: dict[int, float | None]) -> Run:
    run = Run(tmp_path)
    for step in steps:
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    rows = [json.dumps({"step": step, "loss": loss}) + "\n" for step, loss in losses.items()]
    (tmp_path / EVALS).write_text("".join(rows))
    return run


def test_the_best_is_the_lowest_loss_of_those_that_exist(tmp_path: Path):
    losses = {0: 0.1, 4: 2.0, 8: 1.0, 12: None, 16: 1.5}
    run = run_with(tmp_path, [4, 8, 12], losses)
    assert best_step(run, 16) == 8  # step 0 was never saved, 12 has no loss
    assert best_step(run_with(tmp_path / "other", [4], {}), 8) is None


def test_a_result_that_cannot_be_written_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = Run(tmp_path)
    run.adapter.mkdir()
    (run.adapter / "old").write_text("the result before")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "has_adapter", lambda model: True)
    monkeypatch.setattr(saving, "save_adapter", full)
    learner: Any = SimpleNamespace(model=None)
    with pytest.raises(StorageError, match="No space left") as caught:
        config = TrainConfig(model="acme/base", data="rows.jsonl")
        save_result(run, learner, SimpleNamespace(), {"base": {"path": "base"}}, config)  # pyright: ignore[reportArgumentType]
    assert caught.value.ways_out[0] == "free space"
    assert "--resume_from_checkpoint auto" in caught.value.ways_out[1]
    assert [path.name for path in run.adapter.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_what_was_not_trained_is_delivered_as_the_base_has_it(tmp_path: Path):
    """The tokenizer's files, whatever class they name, and what config.json says of a cache."""
    base = tmp_path / "base"
    LlamaForCausalLM(small_config(vocab_size=3072)).save_pretrained(base)
    settings = json.loads((hub.resolve("demo") / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "chat_template.jinja"):
        shutil.copyfile(hub.resolve("demo") / name, base / name)
    # in the form of older releases, which read no other
    config = json.loads((base / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"] * 3
    (base / "config.json").write_text(json.dumps(config))
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "output": "b"}\n' * 2)
    made = halfbyte.train(
        str(base),
        str(tmp_path / "rows.jsonl"),
        output_dir=str(tmp_path / "run"),
        full=True,
        load_in_4bit=False,
        max_steps=1,
        num_samples=0,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (made.adapter / name).read_bytes() == (base / name).read_bytes()
    delivered = json.loads((made.adapter / "config.json").read_text())
    assert delivered == {**config, "dtype": "float32"} and delivered["use_cache"] is True

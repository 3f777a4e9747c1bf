"""Tests of `run.source`: whatever a directory is, it is used as what it says it is."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.cli import run as cli
from halfbyte.config.options import DataOptions, ModelOptions, TrainConfig
from halfbyte.errors import Interrupted, ModelError, UsageError
from halfbyte.files import hub
from halfbyte.progress import no_progress
from halfbyte.quantization.writer import quantize
from halfbyte.run.directory import Run
from halfbyte.run.load import rows_as_in
from halfbyte.run.source import (
    Source,
    as_stored,
    held_in,
    is_adapter,
    is_merged,
    named_elsewhere,
    run_at,
)

from ..helpers import stopped_after


@pytest.fixture(scope="module")
def merged(trained_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("merged") / "m"
    halfbyte.merge(trained_run.path, target)
    return target


def test_a_merged_model_is_used_as_it_is_stored(
    merged: Path, trained_run: Run, capsys: pytest.CaptureFixture[str]
):
    """It is not quantized a second time, unless that is asked for; what is held how is said."""
    assert is_merged(merged) and as_stored(merged, {}) == {"load_in_4bit": False}
    assert as_stored(merged, {"load_in_4bit": True}) == {"load_in_4bit": True}
    assert as_stored(trained_run.path, {}) == {}
    model, _ = halfbyte.load(merged)
    assert "bit" not in held_in(model)
    assert held_in(halfbyte.load(merged, load_in_4bit=True)[0]) == "4 bits (nf4)"
    data = trained_run.info()["data"]["source"]
    command = ["eval", str(merged), "--data", data, "--max_rows", "8", "--json"]
    losses = {}
    for name, more in (("stored", []), ("again", ["--load_in_4bit", "true"])):
        assert cli([*command, *more]) == 0
        found = json.loads(capsys.readouterr().out)
        losses[name] = found["base"]["loss"]
        assert ("4 bits" in found["held"]) == (name == "again")
    assert cli(["eval", str(trained_run.path), *command[2:]]) == 0
    run = json.loads(capsys.readouterr().out)["tuned"]["loss"]
    assert abs(losses["stored"] - run) < 0.02 < abs(losses["again"] - run)


def test_a_runs_adapter_stands_for_the_run(trained_run: Run):
    assert run_at(trained_run.adapter) == run_at(trained_run.path) == Run(trained_run.path)
    assert Source.open(trained_run.adapter).run == Run(trained_run.path)
    ids = torch.arange(9)[None]
    ours, again = (halfbyte.load(path)[0] for path in (trained_run.path, trained_run.adapter))
    assert torch.equal(ours(input_ids=ids).logits, again(input_ids=ids).logits)


@pytest.fixture
def plain_adapter(tmp_path: Path) -> Path:
    """An adapter as PEFT writes it, without a tokenizer, on the built-in model."""
    base = hub.resolve("demo")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    model.save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


def test_an_adapter_of_peft_is_evaluated_asked_and_merged(
    plain_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert is_adapter(plain_adapter) and run_at(plain_adapter) is None
    base = AutoModelForCausalLM.from_pretrained(hub.resolve("demo"), dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, str(plain_adapter)).eval()
    ours, tokenizer = halfbyte.load(plain_adapter, load_in_4bit=False, dtype="float32")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    assert tokenizer.chat_template
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "2 teas", "completion": "5 pounds"}\n' * 3)
    assert cli(["eval", str(plain_adapter), "--data", str(rows), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["base"]["loss"] != found["tuned"]["loss"] and "4 bits" in found["held"]
    assert cli(["chat", str(plain_adapter), "--prompt", "2 teas", "--max_new_tokens", "4"]) == 0
    layers = base.config.num_hidden_layers
    receipt = halfbyte.merge(plain_adapter, tmp_path / "m", onto="original")
    assert receipt.rows_are == "built in" and receipt.recomputed.adapted == 2 * layers
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0.05)
    assert "with a LoRA adapter added" in (tmp_path / "m/README.md").read_text()


def test_a_base_is_named_as_it_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A Hub id with its revision; a path from the root of the file system."""

    def config(model: str, **more: Any) -> TrainConfig:
        return TrainConfig(model=model, data="rows.jsonl", **more)

    assert named_elsewhere(config("acme/tiny", revision="v2")) == ("acme/tiny", "v2")
    monkeypatch.chdir(tmp_path)
    Path("acme").mkdir()
    assert named_elsewhere(config("acme")) == (str(tmp_path.resolve() / "acme"), None)
    shutil.copytree(hub.resolve("demo"), "acme/small")
    below = str(tmp_path.resolve() / "acme" / "small")
    assert named_elsewhere(config("acme", subfolder="small")) == (below, None)


def test_an_adapter_that_names_no_base_is_refused_by_name(plain_adapter: Path, tmp_path: Path):
    config = json.loads((plain_adapter / "adapter_config.json").read_text())
    base = tmp_path / "base"
    shutil.copytree(hub.resolve("demo"), base)
    for name in ("../base", None):
        config["base_model_name_or_path"] = name
        (plain_adapter / "adapter_config.json").write_text(json.dumps(config))
        if name:
            assert Source.open(plain_adapter).base == base.resolve()
        else:
            with pytest.raises(ModelError, match="does not say which model"):
                halfbyte.load(plain_adapter)


def test_a_base_stored_in_4_bits_is_to_everything_what_it_is(stories: Path, tmp_path: Path):
    """A resumed training goes on, and an adapter without a run is on the same base: neither takes
    our defaults for what was asked."""
    base = tmp_path / "base"
    form = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}
    quantize(stories, ModelOptions(allow_low_coverage=True, **form), base, no_progress)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": "a", "completion": f" {i}"}) for i in range(4)))
    settings: dict[str, Any] = {"max_steps": 2, "num_samples": 0, "output_dir": str(tmp_path / "r")}
    with pytest.raises(Interrupted):
        halfbyte.train(str(base), rows, reporter=stopped_after(1), **settings)
    run = halfbyte.train(str(base), rows, resume_from_checkpoint="auto", **settings)
    assert {name: getattr(run.config(), name) for name in form} == form
    assert not run.info()["changes"]
    shutil.copytree(run.adapter, tmp_path / "adapter")
    held = Source.open(tmp_path / "adapter").holding
    assert {name: getattr(held, name) for name in form} == form
    for place in (run.path, tmp_path / "adapter"):
        with pytest.raises(UsageError, match="stored in 4 bits already"):
            halfbyte.load(place, bnb_4bit_quant_type="nf4")
        halfbyte.load(place, bnb_4bit_quant_type="fp4")


def test_rows_are_read_as_a_runs_were_unless_it_was_said_otherwise(tmp_path: Path):
    run = Run(tmp_path)
    trained = TrainConfig(
        model="demo", data="r.jsonl", max_length=77, turns="each", chat_template_kwargs={"a": 1}
    )
    (tmp_path / "run.json").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "config", lambda self: trained)
        found = rows_as_in(run, DataOptions(turns="last"))
    assert (found.max_length, found.turns, found.chat_template_kwargs) == (77, "last", {"a": 1})
    given = DataOptions(max_length=5)
    assert rows_as_in(None, given) is given

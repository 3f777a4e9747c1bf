"""Tests of `planning.plan`."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte.cli import run

from ..helpers import geometry


def test_a_directory_with_nothing_but_a_config_is_planned_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = geometry(tmp_path)
    assert run(["plan", str(path), "--max_length", "256", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    for key in (
        "model",
        "fits",
        "budget_bytes",
        "peak_bytes",
        "phases",
        "ledger",
        "lora_parameters",
    ):
        assert key in found
    assert found["fits"] and found["quantized_parameters"] == 6 * (4 * 256 * 256 + 3 * 256 * 704)
    device = sum(part["bytes"] for part in found["ledger"] if part["where"] == "device")
    assert device == found["phases"]["step"], "the ledger adds up"
    assert captured.err.rstrip().splitlines()[-1].startswith("next: halfbyte train")


@pytest.mark.parametrize("dtype,size", [("bfloat16", 2), ("float32", 4)])
def test_the_bytes_of_files_are_the_bases_in_the_type_it_is_stored_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, size: int
):
    path = geometry(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config.pop("torch_dtype", None)
    (path / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
    found = []
    for rank in ("4", "64"):
        capsys.readouterr()
        assert run(["plan", str(path), "--max_length", "64", "--lora_r", rank, "--json"]) == 0
        plan = json.loads(capsys.readouterr().out)
        found.append(
            sum(part["bytes"] for part in plan["ledger"] if part["part"] == "the model's files")
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    assert found == [size * model.num_parameters()] * 2


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "compressed-tensors"])
def test_foreign_formats_are_refused_by_plan_as_by_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
):
    path = geometry(tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    assert run(["plan", str(path), "--max_length", "64"]) == 6
    assert method in capsys.readouterr().err

"""The command line as a person uses it: exit codes, messages, JSON, options from anywhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from halfbyte.cli import run


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "Say hello.", "output": "Hello!"}\n' * 6)
    return path


def test_train_chat_merge_end_to_end(stories: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "run")
    arguments = ["train", str(stories), "--data", str(rows), "--output-dir", out, "--max_steps=30", "--json"]
    assert run([*arguments, "--learning_rate", "1e-2", "--gradient_accumulation_steps", "1"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["steps"] == 30
    assert captured.err.rstrip().splitlines()[-1].startswith("next: halfbyte chat")
    assert run(["chat", out, "--prompt", "Say hello."]) == 0
    assert "Hello!" in capsys.readouterr().out, "overfitted: it answers, and stops by itself"
    merged = str(tmp_path / "merged")
    assert run(["merge", out, "--onto", "trained", "-o", merged, "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert receipt["greedy_agreement"] > 0.99
    assert run(["merge", out, "-o", merged]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_demo_runs_and_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(["demo", "--output_dir", str(tmp_path / "demo"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["loss_after"] < 0.5 < 4 < result["loss_before"]
    assert result["greedy_agreement"] > 0.99


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["train", "{model}", "--data", "{rows}", "--learning_rte", "1"], 2, "did you mean 'learning_rate'?"),
        (["train", "{model}", "--data", "{rows}", "--learning_rate", "-1"], 2, "learning_rate"),
        (["train", "{model}", "--data", "{rows}", "--full"], 2, "--load_in_4bit false"),
        (["train", "--data", "{rows}"], 2, "model is required"),
        (["fly"], 2, "No such command"),
        (["train", "/no/such/model", "--data", "{rows}"], 6, "no model directory"),
        (["train", "{model}", "--data", "/no/rows.jsonl"], 4, "cannot read the data file"),
        (["train", "{model}", "--data", "{bad}"], 4, "bad.jsonl:1"),
        (["train", "{model}", "--data", "{rows}", "--target_modules", "nope"], 2, "matches no linear layer"),
        (["train", "{model}", "--data", "{rows}", "--output_dir", "{rows}/x"], 5, "cannot write to"),
        (["chat", "{model}/absent"], 6, "no model directory"),
        (["merge", "{model}", "-o", "x"], 6, "is not a run directory"),
    ],
)
def test_failures_name_the_way_out(
    stories: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": 1}\n')
    places = {"model": stories, "rows": rows, "bad": bad}
    filled = [a.format(**places) for a in arguments]
    if arguments[0] == "train" and "--output_dir" not in arguments:
        filled += ["--output_dir", str(tmp_path / "out")]
    assert run(filled) == code
    assert message in capsys.readouterr().err


def test_errors_as_json(capsys: pytest.CaptureFixture[str]):
    assert run(["merge", "nowhere", "-o", "x", "--json"]) == 6
    error = json.loads(capsys.readouterr().out)
    assert error["exit_code"] == 6 and "not a run directory" in error["what"]


def test_one_yaml_for_all_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config = tmp_path / "c.yaml"
    config.write_text("model: m\ndata: d\nlora_rank: 4\nmax-seq-length: 77\nmax_new_tokens: 9\n")
    assert run(["train", "--config", str(config), "--lora_alpha", "64", "--dry-run", "--json"]) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert (record["lora_r"], record["max_length"], record["lora_alpha"]) == (4, 77, 64)
    assert "lora_rank is called lora_r here" in captured.err
    assert run(["chat", "--config", str(config), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_new_tokens"] == 9
    config.write_text("leaning_rate: 1\n")
    assert run(["train", "--config", str(config)]) == 2
    assert "learning_rate" in capsys.readouterr().err


def test_booleans_with_and_without_a_value(capsys: pytest.CaptureFixture[str]):
    common = ["train", "m", "--data", "d", "--dry-run", "--json"]
    for given, expected in ((["--packing"], True), (["--packing", "false"], False), (["--packing=true"], True)):
        assert run([*common, *given]) == 0
        assert json.loads(capsys.readouterr().out)["packing"] is expected


def test_help_does_not_import_torch():
    code = "import sys, halfbyte.cli as c; c.run(['--help']); sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment).returncode == 0


def test_package_gives_functions_not_modules():
    import halfbyte
    import halfbyte.train

    assert callable(halfbyte.train) and callable(halfbyte.load) and callable(halfbyte.merge)
    assert halfbyte.nf4.NF4Tensor is halfbyte.NF4Tensor
    with pytest.raises(AttributeError):
        _ = halfbyte.nothing

"""Tests of `run.facts`."""

import shutil
from pathlib import Path

from halfbyte.run.directory import Run
from halfbyte.run.facts import facts


def test_a_run_is_told_by_its_own_files(trained_run: Run):
    found = facts(trained_run)
    assert found["steps"] == 20 and len(found["curve"]) == 20
    first, last = found["held_out"]
    assert first["step"] == 0 and last["step"] == 20 and last["loss"] < first["loss"]
    assert found["judged"]["verdict"] == "better"
    memory = found["memory"]
    assert memory["measured"] == max(phase["measured"] or 0 for phase in memory["phases"].values())
    assert memory["phases"]["judge"]["planned"] and memory["phases"]["judge"]["measured"]
    errors = [tensor["relative_mse"] for tensor in found["quantization"]]
    assert errors == sorted(errors, reverse=True) and 0.001 < errors[0] < 0.05
    assert set(found["hashes"]) == {"base", "data", "template", "tokenizer"}
    assert all(found["hashes"].values())


def test_what_is_not_there_is_empty(trained_run: Run, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(trained_run.path, copy)
    for name in ("plan.json", "memory.jsonl", "eval.jsonl", "metrics.jsonl", "quant.json"):
        (copy / name).unlink()
    found = facts(Run(copy))
    assert found["curve"] == found["quantization"] == [] and found["held_out"] is None
    assert found["memory"] == {"planned": 0, "measured": 0, "phases": {}}

"""Tests of `planning.plan`."""

import json
from pathlib import Path

import pytest

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

"""Tests of `ops.gpu`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from halfbyte.ops import dropout, gpu, gpu_calls, passes


def test_a_kernel_that_differs_or_dies_gives_way(monkeypatch: pytest.MonkeyPatch):
    """What is tried before a kernel is used finds wrong bits, wrong numbers and exceptions."""
    device = torch.device("cpu")
    reference, case = dropout._dropout_mask, dropout.example
    assert gpu.disagreement(reference, gpu_calls.dropout_mask, case, device) == ""

    def wrong(out: Tensor, numbers: list[int]) -> None:
        gpu_calls.dropout_mask(out, numbers)
        out[3].logical_not_()

    def dies(out: Tensor, numbers: list[int]) -> None:
        raise RuntimeError("out of registers")

    assert "1 of" in gpu.disagreement(reference, wrong, case, device)
    assert "out of registers" in gpu.disagreement(reference, dies, case, device)
    assert "float16 values differ" in gpu.disagreement(
        passes._gated, lambda g, u, a: passes._gated(g, u, a) * 1.01, passes.gated_example, device
    )


def test_every_spelling_agrees_with_its_meaning_on_its_own_case(flash: None):
    """The cases by which a GPU decides, run here."""
    assert len(gpu.REGISTERED) == 16
    for name in gpu.REGISTERED:
        assert gpu.tried(name, torch.device("cpu")) == "", name


def test_every_kernel_compiles_for_gpus(tmp_path: Path):
    """As it would be launched, for a GPU that is not there: the interpreter takes more than the
    compiler."""
    script = Path(__file__).parents[1] / "tools" / "compile_kernels.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["wrong"] == [] and len(report["kernels"]) == 13


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_to_its_end():
    """Every line of bench/gpu.py, tiny, on this CPU: what is measured on a card must not die of a
    slip."""
    script = Path(__file__).parents[2] / "bench" / "gpu.py"
    done = subprocess.run(
        [sys.executable, script, "--rehearse", "--json"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert all(
        report[name]
        for name in ("limits", "check", "kernels", "optimizer", "steps", "70b", "context")
    )
    assert "failed" not in done.stdout and "DIFFERS" not in done.stdout

"""Tests of `planning.search`."""

import json
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.cli import run
from halfbyte.config.options import PlanConfig
from halfbyte.errors import DoesNotFit
from halfbyte.planning.budget import CARDS
from halfbyte.planning.search import Planner

from ..helpers import geometry


def test_what_does_not_fit_is_told_with_ways_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = geometry(tmp_path / "m", hidden_size=1024, intermediate_size=2816, num_attention_heads=8)
    small = ["--fit-to", "16MiB", "--device", "cuda", "--max_length", "2048"]
    assert run(["plan", str(path), *small, "--json"]) == 3
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert not found["fits"] and found["exit_code"] == 3
    assert any(
        choice["change"] == {"max_length": 1024} and choice["loses"] for choice in found["choices"]
    )
    assert "it does not fit" in captured.err and "ways out" in captured.err


@pytest.mark.slow
def test_the_search_finds_the_fastest_that_fits(tmp_path: Path):
    path = geometry(tmp_path)
    common: dict[str, Any] = {
        "model": str(path),
        "device": "cuda",
        "max_length": 2048,
        "dtype": "bfloat16",
        "judge": False,  # which is left out where it alone would not fit
    }
    loose = halfbyte.plan(**common, fit_to="rtx-4090")
    assert loose.budget_bytes == CARDS["rtx-4090"] << 20 and loose.fits
    assert loose.choices[0].change["kept_activations"] == "all", (
        "the most is kept where there is room"
    )
    for choice in loose.choices:
        change = choice.change
        assert (
            change["per_device_train_batch_size"] * change["gradient_accumulation_steps"] == 16
        ), "the same global batch"
        assert choice.relative_time >= 1
    least = min(choice.peak_bytes for choice in loose.choices)
    tight = halfbyte.plan(**common, fit_to=f"{least * 1.03 / 2**20}MiB")
    assert tight.fits and tight.peak_bytes <= least * 1.01
    cut = halfbyte.plan(**common, fit_to=f"{least * 0.99 / 2**20}MiB")
    assert cut.fits and cut.choices[0].change["max_length"] < 2048 and "cut" in cut.choices[0].loses
    never = halfbyte.plan(**common, fit_to="300MiB")
    assert not never.fits and never.choices
    with pytest.raises(DoesNotFit, match="does not fit"):
        never.check()


def test_more_of_anything_is_never_less_memory(tmp_path: Path):
    path = geometry(tmp_path)
    base: dict[str, Any] = {"model": str(path), "max_length": 256, "dtype": "bfloat16"}
    planner = Planner(path, PlanConfig(**base), None)
    least = planner.plan().tensor_bytes
    for more in (
        {"max_length": 512},
        {"per_device_train_batch_size": 2},
        {"lora_r": 32},
        {"kept_activations": "attention"},
        {"gradient_checkpointing": False},
        {"load_in_4bit": False},
        {"optim": "adamw_torch"},
        {"bnb_4bit_use_double_quant": False},
    ):
        assert planner.plan(**more).tensor_bytes > least, more
    levels = [
        planner.plan(kept_activations=keep).tensor_bytes
        for keep in ("none", "attention", "mlp_in", "all")
    ]
    assert levels == sorted(levels)


@pytest.mark.slow
def test_rows_that_may_not_be_cut_are_not(middling_model: tuple[Path, Path]):
    """over_length error: a smaller max_length is no way out, and the search does not take it."""
    model, rows = middling_model
    common: dict[str, Any] = {
        "model": str(model),
        "data": str(rows),
        "max_length": 2048,
        "device": "cuda",
    }
    tight = halfbyte.plan(**common, fit_to="680MiB", over_length="error")
    assert not tight.fits and all("max_length" not in choice.change for choice in tight.choices)
    assert any(
        "max_length" in choice.change for choice in halfbyte.plan(**common, fit_to="680MiB").choices
    )

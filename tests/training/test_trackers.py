"""Rows of a training in trackers: TensorBoard's files read back by TensorBoard; the others by
stand-ins of theirs."""

import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.errors import Interrupted, NonFiniteError, UsageError
from halfbyte.progress import Reporter
from halfbyte.run.facts import facts
from halfbyte.training.step import Stepper
from halfbyte.training.trackers import Trackers


def train(
    stories: Path, home: Path, reporter: Reporter | None = None, **options: Any
) -> halfbyte.Run:
    home.mkdir(exist_ok=True)
    data = home / "rows.jsonl"
    data.write_text(
        "\n".join(json.dumps({"prompt": f"{i} is", "completion": f" number {i}"}) for i in range(8))
    )
    settings = {
        "max_steps": 4,
        "num_samples": 0,
        "eval_split": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 2,
    }
    return halfbyte.train(
        str(stories),
        data,
        output_dir=str(home / "run"),
        reporter=reporter,
        **{**settings, **options},
    )


def test_tensorboard_holds_every_row_once_also_after_a_resume(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """wandb takes no step again that it has, and trackio shows both: that is said."""
    monkeypatch.setitem(sys.modules, "wandb", Stand().module("wandb"))
    said: list[str] = []
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    def stop(row: dict[str, Any], total: int) -> None:
        if row["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stories, tmp_path, Reporter(on_step=stop), report_to="tensorboard,wandb")
    run = train(
        stories,
        tmp_path,
        Reporter(say=said.append),
        report_to="tensorboard,wandb",
        resume_from_checkpoint="auto",
    )
    assert sum("wandb was told of the steps after 2 stays there" in line for line in said) == 1
    assert not any("tensorboard was told" in line for line in said)
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    rows = run.read("metrics.jsonl")
    for key in ("loss", "lr", "grad_norm", "tokens_per_s", "memory_bytes"):
        logged = events.Scalars(f"train/{key}")
        assert [event.step for event in logged] == [row["step"] for row in rows] == [1, 2, 3, 4]
        for event, row in zip(logged, rows, strict=True):
            assert event.value == pytest.approx(row[key], rel=1e-6)
    evaluated = run.read("eval.jsonl")
    assert [event.step for event in events.Scalars("eval/loss")] == [
        row["step"] for row in evaluated
    ]


class Stand:
    """Records what is asked of wandb or trackio."""

    def __init__(self, fails: bool = False) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.fails = fails

    def module(self, name: str) -> types.ModuleType:
        module = types.ModuleType(name)
        module.init = self.init  # pyright: ignore[reportAttributeAccessIssue]
        return module

    def init(self, **settings: Any) -> "Stand":
        self.asked.append(("init", settings))
        return self

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.fails:
            raise ConnectionError("no server")
        self.asked.append(("log", (step, numbers)))

    def finish(self, exit_code: int | None = None) -> None:
        self.asked.append(("finish", exit_code))


def test_wandb_and_trackio_get_the_rows(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stands = {"wandb": Stand(), "trackio": Stand()}
    for name, stand in stands.items():
        monkeypatch.setitem(sys.modules, name, stand.module(name))
    run = train(stories, tmp_path, report_to="wandb, trackio")
    for stand in stands.values():
        assert stand.asked[0][0] == "init" and stand.asked[-1][0] == "finish"
        assert (
            stand.asked[0][1]["name"].startswith("run-")
            and stand.asked[0][1]["config"]["lora_r"] == 16
        )
        logged = {
            step: numbers for what, (step, numbers) in stand.asked[1:-1] if "train/loss" in numbers
        }
        assert {step: numbers["train/loss"] for step, numbers in logged.items()} == {
            row["step"]: row["loss"] for row in run.read("metrics.jsonl")
        }


def test_a_training_that_failed_is_no_success_there(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand = Stand()
    monkeypatch.setitem(sys.modules, "wandb", stand.module("wandb"))

    def stop(row: dict[str, Any], total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stories, tmp_path / "a", Reporter(on_step=stop), report_to="wandb")
    with pytest.raises(NonFiniteError):
        train(
            stories,
            tmp_path / "b",
            report_to="wandb",
            learning_rate=1e37,
            max_grad_norm=0,
            optim="adamw_torch",
        )
    train(stories, tmp_path / "c", report_to="wandb")
    codes = [code for what, code in stand.asked if what == "finish"]
    assert codes[0] and codes[1] and codes[2] == 0


def test_names_are_the_environments(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stand = Stand()
    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, stand.module(name))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_NAME", "first")
    monkeypatch.setenv("TRACKIO_PROJECT", "theirs")
    train(stories, tmp_path, report_to="wandb,trackio")
    first, second = (settings for what, settings in stand.asked if what == "init")
    assert (first["project"], first["name"]) == ("mine", "first")
    assert second["project"] == "theirs" and second["name"].startswith("run-")
    stand.asked.clear()
    named = {"project": "given", "run_name": "that one"}
    train(stories, tmp_path / "named", report_to="wandb,trackio", **named)
    for _, settings in (each for each in stand.asked if each[0] == "init"):
        assert (settings["project"], settings["name"]) == ("given", "that one")


def test_a_restart_from_nothing_stands_once_in_tensorboard(tmp_path: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in (5, 2):  # the first ended before it saved anything
        trackers = Trackers(["tensorboard"], tmp_path, lambda line: None)
        trackers.start({}, 0, "run")
        for step in range(1, steps + 1):
            trackers.log({"step": step, "loss": float(steps)})
        trackers.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 2.0), (2, 2.0)]


def test_a_row_is_the_mean_of_its_steps_also_over_a_resume(stories: Path, tmp_path: Path):
    every = train(stories, tmp_path / "every", max_steps=6).read("metrics.jsonl")
    whole = train(stories, tmp_path / "whole", max_steps=6, logging_steps=4)

    def stop(row: dict[str, Any], total: int) -> None:
        if row["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stories, tmp_path / "cut", Reporter(on_step=stop), max_steps=6, logging_steps=4)
    cut = train(
        stories, tmp_path / "cut", max_steps=6, logging_steps=4, resume_from_checkpoint="auto"
    )
    losses = [row["loss"] for row in every]
    for run in (whole, cut):
        rows = run.read("metrics.jsonl")
        assert [row["step"] for row in rows] == [4, 6]
        assert rows[0]["loss"] == pytest.approx(sum(losses[:4]) / 4, rel=1e-12)
        assert rows[1]["loss"] == pytest.approx(sum(losses[4:]) / 2, rel=1e-12)
        assert run.info()["first_loss"] == losses[0]
        assert facts(run)["first_loss"] == losses[0]


def test_the_first_loss_is_the_first_that_is_a_number(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A step that was skipped has none."""
    honest = Stepper.run

    def run(self: Stepper, step: int, batches: Any) -> dict[str, Any]:
        row = honest(self, step, batches)
        return row if step else {**row, "loss": None}

    monkeypatch.setattr(Stepper, "run", run)
    made = train(stories, tmp_path / "run", max_steps=3)
    losses = [row["loss"] for row in made.read("metrics.jsonl")]
    assert losses[0] is None
    assert made.info()["first_loss"] == losses[1]


def test_a_row_says_how_many_of_its_steps_were_skipped(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Its loss is the mean of the others, which look as if nothing had happened."""
    stand = Stand()
    monkeypatch.setitem(sys.modules, "wandb", stand.module("wandb"))
    honest = Stepper.run

    def run(self: Stepper, step: int, batches: Any) -> dict[str, Any]:
        row = honest(self, step, batches)
        return {**row, "loss": None} if step in (0, 1) else row

    monkeypatch.setattr(Stepper, "run", run)
    made = train(stories, tmp_path, max_steps=6, logging_steps=3, report_to="wandb")
    first, second = made.read("metrics.jsonl")
    assert first["skipped"] == 2 and first["loss"] is not None and "skipped" not in second
    told = [row for what, row in stand.asked if what == "log"]
    assert [row["train/skipped"] for _, row in told if "train/skipped" in row] == [2]


def test_a_tracker_that_fails_does_not_fail_the_training(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", Stand(fails=True).module("wandb"))
    said: list[str] = []
    run = train(stories, tmp_path, Reporter(say=said.append), report_to="wandb")
    assert len(run.read("metrics.jsonl")) == 4
    assert sum("no server" in line and "goes on without it" in line for line in said) == 1


def test_a_resumed_run_is_the_same_one_there(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also when a signal comes while a tracker is at work."""
    stand = Stand()
    monkeypatch.setitem(sys.modules, "wandb", stand.module("wandb"))

    def stop(row: dict[str, Any], total: int) -> None:
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        train(stories, tmp_path, Reporter(on_step=stop), report_to="wandb")
    train(stories, tmp_path, report_to="wandb", resume_from_checkpoint="auto")
    first, second = (settings for what, settings in stand.asked if what == "init")
    assert first["id"] == second["id"] and second["resume"] == "allow"
    trackers = Trackers([], tmp_path, lambda line: None)

    def interrupted() -> None:
        raise Interrupted("now", signal.SIGINT)

    with pytest.raises(Interrupted):
        trackers._guarded("wandb", interrupted)


def test_what_is_not_there_is_known_at_once(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="not installed"):
        train(stories, tmp_path, report_to="wandb")
    with pytest.raises(UsageError, match="tensorbord"):
        train(stories, tmp_path, report_to="tensorbord")
    assert not (tmp_path / "run" / "checkpoints").exists()

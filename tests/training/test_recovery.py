"""Memory that runs out: what is given up, in which order, and what is said and written of it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halfbyte.engine import reductions
from halfbyte.engine.reductions import REDUCTIONS
from halfbyte.errors import StorageError
from halfbyte.training import recovery as module
from halfbyte.training.recovery import Recovery, exhausted

from .fakes import FakeLearner, micro_batch, promise_for


def recovery_of(tmp_path: Path, learner: Any, lines: list[str], info: Any = None) -> Recovery:
    promise = promise_for(tmp_path, lines)
    promise.monitor.learner = None
    return Recovery(learner, promise, info=info)


def test_work_begins_anew_with_less_until_it_goes_through(tmp_path: Path):
    """Two rows of 200 tokens: apart first, then in tiles, halved each time."""
    learner, lines, needed = FakeLearner(), [], 60
    recovery = recovery_of(tmp_path, learner, lines)

    def work() -> str:
        largest = max(len(part.input_ids) for _, part in learner.parts(batch))
        if min(largest, learner.tokens_per_tile or largest) > needed:
            raise MemoryError("can't allocate memory: 1 GB\nand more")
        return "done"

    batch = micro_batch(200, 200)
    assert recovery.with_less(4, [batch], work) == "done"
    assert learner.tokens_per_pass == 200 and learner.tokens_per_tile == 50
    assert learner.calls.count("forget") == 3  # what a failed pass left is thrown away each time
    assert lines[0] == (
        "step 5: memory ran out (can't allocate memory: 1 GB); from here on micro-batches go "
        "through the model in parts of at most 200 tokens"
    )
    rows = [json.loads(line) for line in (tmp_path / "run/memory.jsonl").read_text().splitlines()]
    assert [row["change"] for row in rows] == [
        {"tokens_per_pass": 200},
        {"tokens_per_tile": 100},
        {"tokens_per_tile": 50},
    ]
    assert recovery.promise.config.tokens_per_tile == 50
    assert [change["by_memory"] for change in recovery.info["changes"]] == [True] * 3


def test_where_nothing_is_left_it_ends(tmp_path: Path):
    learner = FakeLearner(packing=False)
    learner.tiles = False

    def work() -> None:
        raise MemoryError("out of memory")

    with pytest.raises(MemoryError, match="out of memory"):
        recovery_of(tmp_path, learner, []).with_less(0, [micro_batch(300)], work)


def test_other_errors_pass(tmp_path: Path):
    def work() -> None:
        raise ValueError("no memory question")

    learner = FakeLearner()
    with pytest.raises(ValueError, match="no memory"):
        recovery_of(tmp_path, learner, []).with_less(0, [micro_batch(3)], work)
    assert not learner.calls


def test_a_full_disk_leaves_the_next_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(learner: Any, parts: Any) -> None:
        raise StorageError("cannot lay 3 MiB aside")

    table = tuple(replace(r, while_running=full) if r.option == "paging" else r for r in REDUCTIONS)
    monkeypatch.setattr(module, "REDUCTIONS", table)
    lines: list[str] = []
    recovery = recovery_of(tmp_path, FakeLearner(), lines)
    assert recovery.take_less(0, [micro_batch(40, 40)], "too little")
    assert lines[0] == "cannot lay 3 MiB aside: left as it is" and "parts of at most" in lines[1]


def test_room_is_made_by_prediction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    learner, lines = FakeLearner(), []
    recovery = recovery_of(tmp_path, learner, lines)
    plan: Any = SimpleNamespace(live_bytes=lambda tokens: tokens * 1000)
    recovery.promise.plan = plan
    monkeypatch.setattr(module, "headroom", lambda device: 150_000)
    recovery.make_room(2, micro_batch(100, 100))
    assert learner.tokens_per_pass == 100
    assert "200 tokens need" in lines[0] and "are left" in lines[0]
    monkeypatch.setattr(module, "headroom", lambda device: None)  # a system that does not say
    recovery.make_room(3, micro_batch(400))
    assert learner.tokens_per_pass == 100


def test_the_error_names_phase_state_and_ways_out(tmp_path: Path):
    promise = promise_for(tmp_path)
    promise.monitor.now = "step 7"
    error = exhausted(promise, "out of memory", "the state after step 6 is saved", None)
    assert error.exit_code == 3 and "step 7; the state after step 6 is saved" in error.what
    assert error.ways_out[-2:] == ("close what else uses memory", "or a smaller model")


def test_every_reduction_that_is_applied_is_said():
    for reduction in REDUCTIONS:
        applied = reduction.while_running is not reductions._not_while_running
        if applied or reduction.at_start is not reductions._not_at_all:
            assert reduction.sentence(64), reduction.option

"""Which checkpoint counts as the best, and what a result that cannot be written leaves."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halfbyte.errors import StorageError
from halfbyte.run.directory import EVALS, Run
from halfbyte.training import saving
from halfbyte.training.saving import best_step, save_result


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
        config: Any = SimpleNamespace(model="acme/base", revision=None)
        save_result(run, learner, SimpleNamespace(), {}, config)  # pyright: ignore[reportArgumentType]
    assert caught.value.ways_out[0] == "free space"
    assert "--resume_from_checkpoint auto" in caught.value.ways_out[1]
    assert [path.name for path in run.adapter.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]

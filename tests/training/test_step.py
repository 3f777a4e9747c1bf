"""One step on a learner that computes nothing: sums, rows, what is not finite."""

import json
import math
from pathlib import Path

import pytest

from halfbyte.errors import NonFiniteError
from halfbyte.training.step import Stepper

from .fakes import FakeLearner, micro_batch, promise_for


def test_a_row_says_what_the_step_was(tmp_path: Path):
    promise = promise_for(tmp_path, lr_scheduler_type="constant", warmup_ratio=0.0)
    learner = FakeLearner(loss=1.5, norm=0.25)
    row = Stepper(learner, promise, 10).run(3, [micro_batch(5, 3), micro_batch(4)])  # pyright: ignore[reportArgumentType]
    # the mean is over supervised tokens of the whole batch: the first of each row predicts nothing
    assert row["loss"] == pytest.approx(1.5) and row["supervised_tokens"] == 4 + 2 + 3
    assert row["step"] == 4 and row["tokens"] == 12 and row["passes"] == 2
    assert row["grad_norm"] == 0.25 and row["lr"] == promise.config.learning_rate
    assert learner.calls == ["accumulate 0", "accumulate 1", "update", "forget"]


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf)])
def test_what_is_not_finite_is_never_an_update(tmp_path: Path, loss: float, norm: float):
    learner = FakeLearner(loss=loss, norm=norm)
    stopping = Stepper(learner, promise_for(tmp_path), 10)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NonFiniteError) as caught:
        stopping.run(0, [micro_batch(5)])
    assert "update" not in learner.calls and caught.value.where == "r:0"
    skipping = Stepper(learner, promise_for(tmp_path, on_nonfinite="skip"), 10)  # pyright: ignore[reportArgumentType]
    row = skipping.run(1, [micro_batch(5)])
    assert row["loss"] is None and row["grad_norm"] is None and "update" not in learner.calls
    lines = (tmp_path / "run/nonfinite.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_parameters_that_an_update_made_infinite_are_never_saved(tmp_path: Path):
    learner = FakeLearner()
    learner.finite = False
    stepper = Stepper(learner, promise_for(tmp_path), 10)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NonFiniteError, match="made parameters infinite") as caught:
        stepper.run(0, [micro_batch(5)])
    assert caught.value.exit_code == 7 and stepper.updating, "nothing may be saved any more"


def test_gradients_that_overflow_in_fp16_take_the_same_rows_again(tmp_path: Path):
    learner, lines = FakeLearner(norm=math.inf), []
    learner.scale.active = True

    def lower() -> bool:
        learner.scale.value /= 2
        learner.norm = 1.0 if learner.scale.value == 0.25 else math.inf
        return True

    learner.scale.lower = lower
    row = Stepper(learner, promise_for(tmp_path, lines), 10).run(0, [micro_batch(5)])  # pyright: ignore[reportArgumentType]
    assert learner.calls.count("accumulate 0") == 3 and row["loss_scale"] == 0.25
    assert "loss scale 0.5" in lines[0] and "loss scale 0.25" in lines[1]

"""Tests of `engine.lr_schedule`."""

import pytest

from halfbyte.config.options import TrainConfig
from halfbyte.engine.lr_schedule import learning_rate


def test_schedules():
    config = TrainConfig(model="m", data="d", learning_rate=1.0, warmup_steps=2)
    assert [learning_rate(config, s, 6) for s in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = config.model_copy(update={"lr_scheduler_type": "cosine"})
    assert learning_rate(cosine, 4, 6) == pytest.approx(0.5)
    constant = config.model_copy(update={"lr_scheduler_type": "constant"})
    assert learning_rate(constant, 5, 6) == 1.0

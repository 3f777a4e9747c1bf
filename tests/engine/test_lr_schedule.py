"""Tests of `engine.lr_schedule`."""

import pytest
import torch
from transformers import get_scheduler

from halfbyte.config.options import TrainConfig
from halfbyte.engine.lr_schedule import learning_rate, warmup_steps


def config(**options) -> TrainConfig:
    return TrainConfig(model="m", data="d", learning_rate=1e-3, **options)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
def test_every_rate_is_transformers(name: str, warmup: int):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=23)
    ours = config(lr_scheduler_type=name, warmup_steps=warmup)
    for step in range(23):
        assert learning_rate(ours, step, 23) == pytest.approx(schedule.get_last_lr()[0], abs=1e-18)
        optimizer.step()
        schedule.step()


def test_no_warm_up_is_none():
    assert warmup_steps(config(warmup_steps=0), 100) == 0
    assert warmup_steps(config(), 100) == 3
    assert learning_rate(config(warmup_steps=0), 0, 100) == 1e-3
    assert warmup_steps(config(lr_scheduler_type="constant"), 100) == 0

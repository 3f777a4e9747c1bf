"""The learning rate of each step, as transformers' schedules of the same names have it."""

import math

from ..config.options import TrainConfig


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of step 0, 1, ...: a linear warm-up from 0 on, then linear or half-cosine to zero,
    or constant (transformers.optimization)."""
    warmup = warmup_steps(config, total)
    if step < warmup:
        return config.learning_rate * step / warmup
    done = (step - warmup) / max(total - warmup, 1)
    if config.lr_scheduler_type in ("constant", "constant_with_warmup"):
        return config.learning_rate
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (1 - done)


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Steps of warm-up: as many as are asked for, else by ``warmup_ratio``; ``constant`` has
    none."""
    if config.lr_scheduler_type == "constant":
        return 0
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(config.warmup_ratio * total)

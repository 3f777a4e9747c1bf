"""The learning rate of each step."""

import math

from ..config.options import TrainConfig


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """The rate of step 0, 1, ...: a linear warm-up, then linear or half-cosine to zero, or
    constant."""
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(total - warmup, 1)
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (1 - done)

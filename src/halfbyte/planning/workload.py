"""The largest micro-batch of a training, and how many of all kinds there are."""

import math
from dataclasses import dataclass

from ..config.options import TrainConfig
from ..data.batches import EVAL_TOKENS, MicroBatch, coarse_length, collate, largest_pass
from ..data.dataset import Data, schedule_of
from ..data.encoder import TokenizedExample
from ..engine.evaluate import largest_group
from ..engine.generate import SAMPLE_TOKENS, prompts_at_once


@dataclass(frozen=True)
class Work:
    """The largest micro-batch of a training, and how many of all kinds there are.

    batch: what is rehearsed. tokens: of an optimizer step, on average. passes: forward and
    backward, of a step. steps: of the training. eval_tokens: of an evaluation's largest batch, 0
    without one. sample_tokens: of the prompts that are answered together, and their answers; 0
    without any. lengths: how many there are of passes, each as `coarse_length` has it.
    """

    batch: MicroBatch
    tokens: float
    passes: int
    steps: int
    eval_tokens: int = 0
    sample_tokens: int = 0
    lengths: int = 1


def work_of(config: TrainConfig, data: Data | None, context: int | None = None) -> Work:
    """The work that options and data make; rows of max_length (and no longer than context) without
    data."""
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if data is None:
        length = min(config.max_length, context or config.max_length)
        row = TokenizedExample("plan", [0] * length, [True] * length)
        rows, passes = config.per_device_train_batch_size, config.gradient_accumulation_steps
        if config.tokens_per_pass:
            together = min(rows, max(1, config.tokens_per_pass // length))
            rows, passes = together, passes * -(-rows // together)
        batch = collate([row], [0] * rows)
        steps = max(config.max_steps, 0)
        # whether rows are held out by default depends on how many there are
        evaluated = max(EVAL_TOKENS, length) if config.eval_split != 0 else 0
        asked = [length] * config.num_samples
        sampled = _sample_tokens(asked, len(batch.input_ids))
        return Work(batch, per_step * length, passes, steps, evaluated, sampled)
    schedule = schedule_of(config, data)
    epoch = schedule.epoch(0)
    largest, parts = largest_pass(data.train.rows, schedule, config.tokens_per_pass)
    passes = config.gradient_accumulation_steps * parts
    steps = (
        config.max_steps
        if config.max_steps > 0
        else math.ceil(config.num_train_epochs * len(epoch))
    )
    return Work(
        largest,
        data.train.tokens / len(epoch),
        passes,
        steps,
        sum(len(row.input_ids) for row in largest_group(data.held_out)),
        _sample_tokens(
            [len(ids) for _, ids, _ in data.questions(config.num_samples)], len(largest.input_ids)
        ),
        _lengths(int(data.train.rows.lengths.min()), len(largest.input_ids)),
    )


def _lengths(shortest: int, longest: int) -> int:
    """How many lengths of a pass there can be, each as `coarse_length` has it."""
    count, length = 1, coarse_length(shortest)
    while length < longest:
        count, length = count + 1, coarse_length(length + 1)
    return count


def _sample_tokens(prompts: list[int], at_once: int) -> int:
    """Of the largest group of prompts (by their lengths) that is answered together."""
    groups = prompts_at_once([[0] * length for length in prompts], at_once)
    return max((len(g) * (max(map(len, g)) + SAMPLE_TOKENS) for g in groups), default=0)

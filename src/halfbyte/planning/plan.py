"""Does it fit, and what if not: memory and time of a training, before any weight is read."""

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from .. import ops
from ..adapters.initial import begin_with_adapter
from ..config.hf_objects import config_of
from ..config.options import PlanConfig, TrainConfig
from ..data.dataset import read_data
from ..files import hub
from ..files.model_config import read_config
from ..memory.process import TRAIN_MMAP_THRESHOLD, set_mmap_threshold
from ..model.defaults import with_plain_defaults
from ..ops import cpu
from ..progress import Progress, no_progress
from ..quantization.bnb_format import check_quantization
from ..quantization.load import with_stored_form
from ..quantization.tensor import quantize
from .memory_plan import CALL_SECONDS, MemoryPlan, auto_in_words
from .search import Planner


def products_per_second(dtype: torch.dtype, tokens: int) -> float:
    """Floating-point operations per second of a 4-bit product on this CPU, by trying one of 2048 x
    2048."""
    width = 2048
    weight = quantize(torch.full((width, width), 0.01, dtype=torch.bfloat16))
    x = torch.full((max(16, min(tokens, 512)), width), 0.5, dtype=dtype)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        ops.linear_4bit(x, weight.parts, width)
        times.append(time.perf_counter() - began)
    return 2 * x.numel() * width / statistics.median(times[1:])


def timed(plan: MemoryPlan, dtype: torch.dtype) -> MemoryPlan:
    """The plan with an estimate of the training's time on this machine."""
    if plan.device != "cpu" or not plan.steps:
        return plan
    step = (
        plan.flop / products_per_second(dtype, plan.tokens)
        + plan.calls * CALL_SECONDS
        + plan.moving_seconds
    )
    return replace(plan, seconds=step * plan.steps)


@with_plain_defaults
def plan(
    *config: Any,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = no_progress,
    **options: Any,
) -> MemoryPlan:
    """Bytes and time of a training, without its weights.

    Args:
        config: a `TrainConfig`; or a model and, if there is one, a data file, then whatever there
            is of ``BitsAndBytesConfig``, ``LoraConfig`` and ``SFTConfig`` or ``TrainingArguments``.
        options: by name (fit_to="24GiB", ...), above all others. Without data, rows of max_length
            are planned for.

    Raises:
        HalfbyteError: the model or the data is refused. That it does not fit is no error here: see
            ``fits``, `check`.
    """
    kind = TrainConfig if any(type(thing) is TrainConfig for thing in config) else PlanConfig
    wanted = config_of(kind, config, options)
    with (
        cpu.using(wanted.kernels)
        if "kernels" in wanted.model_fields_set
        else contextlib.nullcontext()
    ):
        return _planned(wanted, say, progress)


def _planned(config: TrainConfig, say: Callable[[str], None], progress: Progress) -> MemoryPlan:
    set_mmap_threshold(TRAIN_MMAP_THRESHOLD)
    path = hub.base_of(config, weights=False)
    check_quantization(path, getattr(read_config(path), "quantization_config", None))
    config = with_stored_form(begin_with_adapter(config, path), path)
    data = read_data(config.data, config, path, say=say, progress=progress) if config.data else None
    if data is not None:
        data.renderer.rest()
    planner = Planner(path, config, data, progress)
    if config.fit_to:
        return timed(planner.fit(), planner.dtype)
    change, found = planner.resolve_auto()
    for line in auto_in_words(change):
        say(line)
    if not found.fits:
        found = replace(found, choices=planner.ways_out(found))
    return timed(found, planner.dtype)

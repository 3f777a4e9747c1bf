"""Ways of needing less memory, in one table: planner, error text and recovery iterate it.

A reduction says what it changes, when it is allowed, how a running training applies it, what it is
called for people, and what it costs. The order is the one in which they are tried: those that
change no number come first, the cheapest of them first; then those by which sums are added in
another order; last those that train something else, which nobody chooses but the user.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..config.options import UNPAGED, TrainConfig
from ..data.batches import MicroBatch
from ..memory.offload import OffloadPool
from ..memory.recompute import recompute_layers
from ..model.host_embedding import keep_on_host, why_not
from ..ops.dequantized import DequantBuffer
from .learner import Learner
from .paged_optimizers import PagedAdamW, PagedAdamW8bit

Change = dict[str, Any]

TILE, LEAST_TILE = 512, 32
"""Tokens that MLPs run on at a time where nothing else fits: at first, and at least."""
LENGTH_STEP = 128
"""Rows are cut in steps of so many tokens."""


@dataclass(frozen=True)
class Situation:
    """What a plan knows beside the options.

    Attributes:
        device: "cpu" or "cuda".
        embedding_may_move: whether the embedding table could lie in host memory.
        longest: tokens of the longest row.
        largest: tokens of the largest pass.
        length: tokens that rows are cut at.
    """

    device: str
    embedding_may_move: bool
    longest: int
    largest: int
    length: int


def _not_at_all(config: TrainConfig, situation: Situation) -> Change | None:
    return None


def _not_while_running(learner: Learner, parts: Sequence[MicroBatch]) -> Change | None:
    return None


def _time_only(config: TrainConfig) -> str:
    return ""


@dataclass(frozen=True)
class Reduction:
    """One way of needing less memory.

    Attributes:
        option: the option it changes (of several, the first).
        sentence: what it is called for people, from the option's new value.
        at_start: the change that a training makes by itself where its plan does not fit; None: not
            allowed, or done already.
        as_advice: the change that is named as a way out; None: none is.
        while_running: apply it to a training, given the parts that go through the model; returns
            the change, None where nothing was left to change.
        costs: what it costs besides time, "" for nothing.
        moved: what lies elsewhere with it, "" for nothing.
    """

    option: str
    sentence: Callable[[Any], str] = lambda value: ""
    at_start: Callable[[TrainConfig, Situation], Change | None] = _not_at_all
    as_advice: Callable[[TrainConfig, Situation], Change | None] = _not_at_all
    while_running: Callable[[Learner, Sequence[MicroBatch]], Change | None] = _not_while_running
    costs: Callable[[TrainConfig], str] = _time_only
    moved: str = ""


# --- what may be changed, and when ----------------------------------------------------------------


def _where(allowed: bool, **change: Any) -> Change | None:
    return change if allowed else None


def _one_row(config: TrainConfig, situation: Situation) -> Change | None:
    rows, together = config.per_device_train_batch_size, config.gradient_accumulation_steps
    change = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": rows * together}
    return _where(rows > 1, **change)


def _page(config: TrainConfig, situation: Situation) -> Change | None:
    return _where(config.optim in UNPAGED and config.paging == "auto", paging="always")


def _page_now(learner: Learner, parts: Sequence[MicroBatch]) -> Change | None:
    optimizer = learner.optimizer
    if not isinstance(optimizer, PagedAdamW8bit | PagedAdamW) or optimizer.paged:
        return None
    optimizer.page_out()
    return {"paging": "always"}


def _dequantize_one_by_one(learner: Learner, parts: Sequence[MicroBatch]) -> Change | None:
    if type(learner.dequant_buffer) is DequantBuffer:
        return None
    learner.dequant_buffer = DequantBuffer()
    return {"dequantized_weights": "product"}


def _move_embedding(learner: Learner, parts: Sequence[MicroBatch]) -> Change | None:
    if learner.config.embedding_offloading == "never" or why_not(learner.model):
        return None
    keep_on_host(learner.model)
    return {"embedding_offloading": "always"}


def _keep_inputs_alone(learner: Learner, parts: Sequence[MicroBatch]) -> Change | None:
    run = learner.recompute
    if run is None or run.keep == "none":
        return None
    run.keep_nothing()
    recompute_layers(learner.model, run)
    return {"kept_activations": "none"}


def _offload(config: TrainConfig, situation: Situation) -> Change | None:
    recomputed = config.gradient_checkpointing
    return _where(
        recomputed and config.activation_offloading == "auto", activation_offloading="always"
    )


def _offload_anyway(config: TrainConfig, situation: Situation) -> Change | None:
    recomputed = config.gradient_checkpointing
    return _where(
        recomputed and config.activation_offloading != "always", activation_offloading="always"
    )


def _offload_now(learner: Learner, parts: Sequence[MicroBatch]) -> Change | None:
    run = learner.recompute
    if (
        run is None
        or run.inputs.away is not None
        or learner.config.activation_offloading == "never"
    ):
        return None
    pool = OffloadPool(run.layers, learner.directory)
    pool.prepare(run.inputs)
    run.inputs = pool
    return {"activation_offloading": "always"}


def _may_stream(config: TrainConfig, situation: Situation) -> bool:
    return situation.device == "cpu" and config.load_in_4bit


def _split(learner: Learner, parts: Sequence[MicroBatch]) -> Change | None:
    if not learner.abilities.packing or not any(len(part.rows) > 1 for part in parts):
        return None
    learner.tokens_per_pass = max(len(part.input_ids) for part in parts) // 2
    return {"tokens_per_pass": learner.tokens_per_pass}


def _tile(learner: Learner, parts: Sequence[MicroBatch]) -> Change | None:
    now, largest = learner.tokens_per_tile, max(len(part.input_ids) for part in parts)
    tile = now // 2 if now else min(TILE, largest // 2)
    return _where(tile >= LEAST_TILE and learner.tile(tile), tokens_per_tile=tile)


def _shorter_rows(config: TrainConfig, situation: Situation) -> Change | None:
    allowed = situation.length > LENGTH_STEP and config.over_length != "error"
    return _where(allowed, max_length=max(LENGTH_STEP, situation.length // 2))


def _shorter_rows_cost(config: TrainConfig) -> str:
    return "longer rows are cut" if config.over_length == "truncate" else "longer rows are left out"


REDUCTIONS: tuple[Reduction, ...] = (
    Reduction(
        "gradient_checkpointing",
        as_advice=lambda c, s: _where(not c.gradient_checkpointing, gradient_checkpointing=True),
    ),
    Reduction("per_device_train_batch_size", as_advice=_one_row),
    Reduction(
        "paging",
        lambda value: "the optimizer's states leave memory",
        at_start=_page,
        as_advice=_page,
        while_running=_page_now,
        moved="optimizer states",
    ),
    Reduction(
        "dequantized_weights",
        lambda value: "no weight stays dequantized beyond its product",
        as_advice=lambda c, s: _where(
            c.dequantized_weights != "product", dequantized_weights="product"
        ),
        while_running=_dequantize_one_by_one,
    ),
    Reduction(
        "embedding_offloading",
        lambda value: "the embedding table lies in host memory",
        at_start=lambda c, s: _where(
            c.embedding_offloading == "auto" and s.embedding_may_move, embedding_offloading="always"
        ),
        as_advice=lambda c, s: _where(
            c.embedding_offloading != "always" and s.embedding_may_move,
            embedding_offloading="always",
        ),
        while_running=_move_embedding,
        moved="the embedding table",
    ),
    Reduction(
        "kept_activations",
        lambda value: "layers keep their inputs alone",
        as_advice=lambda c, s: _where(
            c.kept_activations not in ("none", "auto"), kept_activations="none"
        ),
        while_running=_keep_inputs_alone,
    ),
    Reduction(
        "activation_offloading",
        lambda value: "layer inputs wait elsewhere",
        at_start=_offload,
        as_advice=_offload_anyway,
        while_running=_offload_now,
        moved="layer inputs",
    ),
    Reduction(
        "weight_streaming",
        lambda value: "4-bit weights stay in their file",
        at_start=lambda c, s: _where(
            _may_stream(c, s) and c.weight_streaming == "auto", weight_streaming="always"
        ),
        as_advice=lambda c, s: _where(
            _may_stream(c, s) and c.weight_streaming != "always", weight_streaming="always"
        ),
        moved="weights",
    ),
    Reduction(
        "tokens_per_pass",
        lambda tokens: f"micro-batches go through the model in parts of at most {tokens:,} tokens",
        at_start=lambda c, s: _where(
            not c.tokens_per_pass and s.longest < s.largest, tokens_per_pass=s.longest
        ),
        while_running=_split,
    ),
    Reduction(
        "tokens_per_tile",
        lambda tokens: f"MLPs run on {tokens:,} tokens at a time",
        at_start=lambda c, s: _where(
            not c.tokens_per_tile and s.longest > 2 * TILE, tokens_per_tile=TILE
        ),
        while_running=_tile,
    ),
    Reduction(
        "load_in_4bit",
        as_advice=lambda c, s: _where(not c.load_in_4bit and not c.full, load_in_4bit=True),
        costs=lambda c: "the base is rounded to 4 bits",
    ),
    Reduction(
        "full",
        as_advice=lambda c, s: _where(c.full, full=False, load_in_4bit=True),
        costs=lambda c: "an adapter is trained instead of every parameter",
    ),
    Reduction(
        "bnb_4bit_use_double_quant",
        as_advice=lambda c, s: _where(
            c.load_in_4bit and not c.bnb_4bit_use_double_quant, bnb_4bit_use_double_quant=True
        ),
        costs=lambda c: "scales are rounded to 8 bits",
    ),
    Reduction(
        "optim",
        as_advice=lambda c, s: _where(
            c.optim in ("adamw_torch", "paged_adamw_32bit"), optim="paged_adamw_8bit"
        ),
        costs=lambda c: "optimizer states are rounded to 8 bits",
    ),
    Reduction(
        "lora_r",
        as_advice=lambda c, s: _where(not c.full and c.lora_r > 8, lora_r=c.lora_r // 2),
        costs=lambda c: "the adapter is smaller",
    ),
    Reduction("max_length", as_advice=_shorter_rows, costs=_shorter_rows_cost),
)


def moved(change: Change) -> list[str]:
    """What lies elsewhere than in the memory that is computed in, with these options."""
    return [r.moved for r in REDUCTIONS if r.moved and change.get(r.option) == "always"]

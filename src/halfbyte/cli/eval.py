"""``halfbyte eval MODEL --data FILE``."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..config.options import DataOptions, ModelOptions
from ..config.verbs import EvalConfig
from . import console
from .options import Verb

if TYPE_CHECKING:
    from ..data.dataset import Data
    from ..run.source import Source


def evaluate(record: EvalConfig) -> dict[str, Any]:
    """Loss, perplexity and exact match on held-out rows; for a run, its base beside it."""
    from ..data.dataset import data_lines, read_data
    from ..engine.selftest import self_test
    from ..files import hub
    from ..run.load import load, rows_as_in, run_renderer
    from ..run.source import Source, held_in, is_adapter, run_at

    run = run_at(record.model)
    adapter = run is None and is_adapter(record.model)
    source = Source.open(record.model, base_at=record.base) if run or adapter else None
    # every row is evaluated: what a shared configuration holds out is for training
    options = rows_as_in(run, record.model_copy(update={"eval_split": 0.0}))
    own = run is not None and record.chat_template is None
    base = source.base if source else hub.base_of(record)
    # read before the model, so that bad rows are known at once
    data = read_data(
        record.data,
        options,
        base,
        say=console.say,
        progress=console.progress,
        renderer=run_renderer(run, options) if run and own else _renderer(source, options),
        training=False,
    )
    for line in data_lines(data, "evaluated"):
        console.say(line)
    rows = data.train.rows[: record.max_rows or None]
    model, _ = load(record.model, progress=console.progress, **_given(record))
    measure = functools.partial(_measure, record, data, rows, self_test(model).packing)
    held = held_in(model)
    if source is None:
        found, tuned = measure(model), None
    else:
        found, tuned = _both(source, model, record, measure)
    _show(found, tuned, len(rows), held)
    if source is not None and not source.full:
        console.following("merge", record.model, raw="--onto trained -o merged")
    else:
        console.following("train", record.model, raw="--data my.jsonl")
    return {
        "model": record.model,
        "data": record.data,
        "rows": len(rows),
        "held": held,
        "base": found,
        "tuned": tuned,
        "counts": data.counts(),
    }


def _given(record: EvalConfig) -> dict[str, Any]:
    """How the model is to be held, as far as that was said."""
    fields = record.model_fields_set
    keys = (*ModelOptions.model_fields, "base")
    return {key: getattr(record, key) for key in keys if key in fields}


def _measure(
    record: EvalConfig, data: "Data", rows: Sequence[Any], packed: bool, model: Any
) -> dict[str, Any]:
    from ..engine.evaluate import score

    generate, progress = record.generate, console.progress
    return score(model, data, rows, packed=packed, generate=generate, progress=progress).as_dict()


def _renderer(source: "Source | None", options: DataOptions) -> Any:
    """The renderer of an adapter that PEFT wrote, which may bring its own tokenizer."""
    from ..data.dataset import make_renderer

    return None if source is None or source.run else make_renderer(source.tokenizer(), options)


def _both(
    source: "Source", model: Any, record: EvalConfig, measure: Callable[[Any], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The scores of an adapter's base and of what it makes of it; of a full fine-tuning's base and
    of the run."""
    from ..adapters.peft_files import adapter_off
    from ..quantization.load import load_base

    tuned = measure(model)
    if not source.full:
        with adapter_off(model):
            return measure(model), tuned
    del model
    held = ModelOptions(**{**source.holding.holding(), **_given(record)})
    return measure(load_base(source.base, held, console.progress)[0]), tuned


def _show(found: dict[str, Any], tuned: dict[str, Any] | None, rows: int, held: str) -> None:
    def shown(key: str, unknown: str, form: str) -> list[str]:
        sides = [side for side in (found, tuned) if side]
        return [unknown if side[key] is None else format(side[key], form) for side in sides]

    console.table(
        f"{rows:,} rows, {found['tokens']:,} supervised tokens",
        ["", f"{'base' if tuned else 'model'}, {held}", *(["tuned"] if tuned else [])],
        [
            ["loss", *shown("loss", "not finite", ".4f")],
            ["perplexity", *shown("perplexity", "-", ".2f")],
            *(
                [["perplexity without end", *shown("perplexity_without_end", "-", ".2f")]]
                if found["perplexity_without_end"] is not None
                else []
            ),
            ["exact match", *shown("exact_match", "-", ".1%")],
        ],
    )


command = Verb("eval", EvalConfig, evaluate, positional=("model",))

"""``halfbyte eval MODEL --data FILE``."""

from typing import Any

from ..config.options import DataOptions, ModelOptions
from ..config.verbs import EvalConfig
from ..run.directory import Run, is_run
from . import console
from .options import Verb


def evaluate(record: EvalConfig) -> dict[str, Any]:
    """Loss, perplexity and exact match on held-out rows; for a run, its base beside it."""
    from ..adapters.peft_files import adapter_off
    from ..data.dataset import data_lines, read_data
    from ..engine.evaluate import score
    from ..engine.selftest import self_test
    from ..files import hub
    from ..quantization.load import load_base
    from ..run.load import load, run_renderer

    given = {
        key: getattr(record, key)
        for key in ModelOptions.model_fields
        if key in record.model_fields_set
    }
    run = Run.open(record.model) if is_run(record.model) else None
    renderer = None
    # every row given is evaluated: what a shared configuration holds out is for training
    options: DataOptions = record.model_copy(update={"eval_split": 0.0})
    if run is not None:
        trained = run.config()
        kept = ("max_length", "over_length", "completion_only_loss", "assistant_only_loss")
        given_here = {
            key: getattr(trained, key) for key in kept if key not in record.model_fields_set
        }
        options = options.model_copy(update=given_here)
        if record.chat_template is None:
            renderer = run_renderer(run, options)
    base = hub.resolve(run.info()["base"]["path"] if run else record.model, record.revision)
    # read before the model, so that bad rows are known at once
    data = read_data(
        record.data,
        options,
        base,
        say=console.say,
        progress=console.progress,
        renderer=renderer,
        training=False,
    )
    for line in data_lines(data, "evaluated"):
        console.say(line)
    rows = data.train.rows[: record.max_rows or None]
    model, _ = load(record.model, progress=console.progress, **given)
    packed = self_test(model).packing

    def measure(tested: Any) -> dict[str, Any]:
        return score(
            tested, data, rows, packed=packed, generate=record.generate, progress=console.progress
        ).as_dict()

    tuned = None
    if run is None:
        found = measure(model)
    else:
        tuned = measure(model)
        if run.config().full:
            del model
            held = ModelOptions(**{**run.config().holding(), **given})
            found = measure(load_base(base, held, console.progress)[0])
        else:
            with adapter_off(model):
                found = measure(model)
    console.table(
        f"{len(rows):,} rows, {found['tokens']:,} supervised tokens",
        ["", "base", *(["tuned"] if tuned else [])],
        [
            [label, *(show(side) for side in (found, tuned) if side)]
            for label, show in (
                ("loss", lambda s: "not finite" if s["loss"] is None else f"{s['loss']:.4f}"),
                (
                    "perplexity",
                    lambda s: "-" if s["perplexity"] is None else f"{s['perplexity']:.2f}",
                ),
                (
                    "exact match",
                    lambda s: "-" if s["exact_match"] is None else f"{s['exact_match']:.1%}",
                ),
            )
        ],
    )
    if run is not None and not run.config().full:
        console.say(f"next: halfbyte merge {record.model} --onto trained -o merged")
    else:
        console.say(f"next: halfbyte train {record.model} --data my.jsonl")
    return {
        "model": record.model,
        "data": record.data,
        "rows": len(rows),
        "base": found,
        "tuned": tuned,
        "counts": data.counts(),
    }


command = Verb("eval", EvalConfig, evaluate, positional=("model",))

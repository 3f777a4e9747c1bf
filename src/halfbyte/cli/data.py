"""``halfbyte data check FILE --model MODEL``."""

from typing import Any

import click

from ..config.aliases import TOGETHER
from ..config.verbs import DataCheckConfig
from . import console
from .options import Verb, flags_of


def check(record: DataCheckConfig) -> dict[str, Any]:
    """What of a data source will be trained, token by token; every bad row named. Reads no
    weights."""
    import numpy

    from ..data.dataset import data_lines, read_data
    from ..files import hub
    from ..run.load import rows_as_in, run_renderer
    from ..run.source import run_at

    run = run_at(record.model)
    base = hub.resolve(run.info()["base"]["path"]) if run else hub.base_of(record)
    renderer, options = None, rows_as_in(run, record)
    if run is not None and record.chat_template is None:
        renderer = run_renderer(run, options)
    data = read_data(
        record.data, options, base, say=console.say, progress=console.progress, renderer=renderer
    )
    for line in data_lines(data):
        console.say(line)
    train = data.train
    lengths = train.rows.lengths
    counts: dict[str, Any] = {
        **data.counts(),
        "masked_tokens": train.tokens - train.supervised,
        "tokens_cut_off": train.tokens_cut,
        "max_length": data.max_length,
        "longest": int(lengths.max()),
        "median_length": int(numpy.median(lengths)),
        "form": data.format,
    }
    console.table(
        f"{record.data} as {record.model} reads it",
        ["", "count"],
        [
            [key.replace("_", " "), f"{value:,}"]
            for key, value in counts.items()
            if isinstance(value, int)
        ],
    )
    for where in (train.dropped_unsupervised + train.dropped_long)[:10]:
        console.say(f"left out: {where}")
    for row in train.rows[: record.rows]:
        console.say(f"{row.where}:")
        console.show_row(data.renderer.pieces(row))
    named = [word for source in record.data.split(TOGETHER) for word in ("--data", source)]
    model = run.info()["base"]["name"] if run else record.model
    console.following("train", model, *named, *flags_of(record, ("data", "model", "rows")))
    return {"data": record.data, "model": record.model, **counts}


@click.group("data")
def command() -> None:
    """Look at training data before training on it."""


command.add_command(Verb("check", DataCheckConfig, check, positional=("data",)))

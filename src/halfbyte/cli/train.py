"""``halfbyte train MODEL --data FILE``."""

from typing import Any

from ..config.options import TrainConfig
from . import console
from .options import Verb


def train(record: TrainConfig) -> dict[str, Any]:
    """Fine-tune MODEL (a Hub id, a local directory, or `demo`) on rows of a file or a Hub data
    set."""
    from ..progress import Reporter
    from ..training.trainer import train

    with console.steps() as shown:
        run = train(
            record, reporter=Reporter(console.say, console.progress, shown.update, console.show_row)
        )
    rows = run.metrics()
    finite = [row for row in rows if row["loss"] is not None]
    if len(finite) > 1:
        console.say(
            f"loss {finite[0]['loss']:.3f} -> {finite[-1]['loss']:.3f} in {rows[-1]['step']} steps"
        )
    if skipped := len(run.read("nonfinite.jsonl")):
        console.say(
            f"{skipped} of {rows[-1]['step']} steps were not finite and were left out: "
            "nonfinite.jsonl"
        )
    console.samples(run.samples())
    console.say(f"the {'model' if record.full else 'adapter'} is in {run.adapter}")
    console.say(f'next: halfbyte chat {run.path} --prompt "..."')
    last = rows[-1] if rows else {}
    return {
        "run_dir": str(run.path),
        "adapter": str(run.adapter),
        "steps": last.get("step"),
        "loss": last.get("loss"),
    }


command = Verb("train", TrainConfig, train, positional=("model",))

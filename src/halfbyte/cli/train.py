"""``halfbyte train MODEL --data FILE``."""

from typing import Any

from ..config.options import TrainConfig
from . import console
from .options import Verb


def train(record: TrainConfig) -> dict[str, Any]:
    """Fine-tune MODEL (a Hub id, a local directory, or `demo`) on rows of a file or a Hub data
    set."""
    from ..progress import Reporter
    from ..run.directory import NONFINITE
    from ..run.facts import facts
    from ..training.trainer import train

    with console.steps() as shown:
        run = train(
            record, reporter=Reporter(console.say, console.progress, shown.update, console.show_row)
        )
    known = facts(run)
    curve = known["curve"]
    finite = [row for row in curve if row["loss"] is not None]
    if len(finite) > 1:
        console.say(
            f"loss {known['first_loss']:.3f} -> {finite[-1]['loss']:.3f} in {curve[-1]['step']} "
            "steps"
        )
    if known["skipped"]:
        console.say(
            f"{known['skipped']} of {known['steps']} steps were not finite and were left out: "
            f"{NONFINITE}"
        )
    console.samples(known["samples"])
    console.say(f"the {'model' if record.full else 'adapter'} is in {run.adapter}")
    console.following("chat", run.path, raw='--prompt "..."')
    last = curve[-1] if curve else {"step": None, "loss": None}
    return {
        "run_dir": str(run.path),
        "adapter": str(run.adapter),
        "steps": last["step"],
        "loss": last["loss"],
    }


command = Verb("train", TrainConfig, train, positional=("model",), short={"o": "output_dir"})

"""``halfbyte checkpoint list RUN`` and ``halfbyte checkpoint verify RUN``."""

from pathlib import Path
from typing import Any

import click

from ..config.verbs import CheckpointConfig
from ..errors import ModelError
from ..run.directory import is_run
from . import console
from .options import Verb


def _found(record: CheckpointConfig) -> list[dict[str, Any]]:
    from ..run.checkpoint import listed
    from ..run.directory import Run

    if not is_run(record.run):
        raise ModelError(f"{record.run} is not a run directory: it has no run.json")
    run = Run(Path(record.run).expanduser())
    run.refuse_foreign()
    losses = {row["step"]: row["loss"] for row in run.read("eval.jsonl")}
    rows = []
    for path, wrong in listed(run.checkpoints):
        step = int(path.name.removeprefix("step-"))
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        rows.append(
            {
                "path": str(path),
                "step": step,
                "bytes": size,
                "held_out_loss": losses.get(step),
                "damage": wrong,
            }
        )
    return rows


def show(record: CheckpointConfig) -> dict[str, Any]:
    """The checkpoints of RUN, every file compared with its manifest."""
    rows = _found(record)
    console.table(
        f"{len(rows)} checkpoints in {record.run}",
        ["step", "MiB", "held-out loss", "state"],
        [
            [
                f"{row['step']:,}",
                f"{row['bytes'] / 2**20:.2f}",
                "-" if row["held_out_loss"] is None else f"{row['held_out_loss']:.4f}",
                row["damage"] or "valid",
            ]
            for row in rows
        ],
    )
    valid = [row for row in rows if not row["damage"]]
    if valid:
        console.say(f"a resume goes on from step {valid[-1]['step']}")
    console.say("next: repeat the training's command with --resume_from_checkpoint auto")
    return {"run": record.run, "checkpoints": rows}


def verify(record: CheckpointConfig) -> dict[str, Any]:
    """Compare every file of every checkpoint of RUN with its manifest; fails if one is damaged."""
    result = show(record)
    if damaged := [row for row in result["checkpoints"] if row["damage"]]:
        raise ModelError(
            f"{len(damaged)} of {len(result['checkpoints'])} checkpoints are damaged",
            found="; ".join(row["damage"] for row in damaged),
            ways_out=[
                "a resume takes the newest valid one and sets these aside (damaged-step-...)"
            ],
        )
    return result


@click.group("checkpoint")
def command() -> None:
    """Look at what a run can be resumed from."""


command.add_command(Verb("list", CheckpointConfig, show, positional=("run",)))
command.add_command(Verb("verify", CheckpointConfig, verify, positional=("run",)))

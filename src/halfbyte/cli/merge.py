"""``halfbyte merge RUN --onto trained|original -o DIR``."""

from pathlib import Path
from typing import Any

from ..config.verbs import MergeConfig
from . import console
from .options import Verb


def merge(record: MergeConfig) -> dict[str, Any]:
    """Add the adapter of RUN into the weights, write a model every tool loads, and verify it."""
    from ..exporters.merge import merge
    from ..exporters.receipt import HEAD, advice, lines, table
    from ..files.publish import publish, reserve

    repository = reserve(record.hub_model_id, record.hub_private_repo) if record.push_to_hub else ""
    receipt = merge(
        record.run,
        record.output_dir,
        onto=record.onto,
        max_noise=record.max_noise,
        min_agreement=record.min_agreement,
        base=record.base,
        requantize=record.requantize,
        min_survival=record.min_survival,
        device=record.device,
        progress=console.progress,
        say=console.say,
    )
    for line in lines(receipt):
        console.say(line)
    console.table(
        f"on {receipt.rows} rows {receipt.rows_are}, beside the run in fp32", HEAD, table(receipt)
    )
    for line in advice(receipt):
        console.say(line)
    console.say(f"the merged model is in {record.output_dir}")
    if repository:
        again = f"hf upload {repository} {record.output_dir}"
        console.say(
            "published: "
            f"{publish(Path(record.output_dir), repository, 'merged with halfbyte', again)}"
        )
    console.following("chat", record.output_dir, raw='--prompt "..."')
    return {"output_dir": record.output_dir, **receipt.as_dict()}


command = Verb("merge", MergeConfig, merge, positional=("run",), short={"o": "output_dir"})

"""``halfbyte export RUN --to peft|hf|bnb-4bit -o DIR``."""

from pathlib import Path
from typing import Any

from ..config.verbs import ExportConfig
from . import console
from .options import Verb

OPENS = {
    "peft": 'PeftModel.from_pretrained(base, "{0}")',
    "hf": 'AutoModelForCausalLM.from_pretrained("{0}", dtype="auto")',
    "bnb-4bit": 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{0}"), '
    '"{0}/adapter")',
}


def export(record: ExportConfig) -> dict[str, Any]:
    """Write RUN in the form another tool takes."""
    from ..exporters.export import export
    from ..files.publish import publish, reserve

    repository = reserve(record.hub_model_id, record.hub_private_repo) if record.push_to_hub else ""
    found = export(
        record.run,
        record.output_dir,
        record.to,
        base=record.base,
        progress=console.progress,
        say=console.say,
    )
    console.say(f"{record.to}: in {record.output_dir}")
    if repository:
        again = f"hf upload {repository} {record.output_dir}"
        console.say(
            "published: "
            f"{publish(Path(record.output_dir), repository, 'exported with halfbyte', again)}"
        )
    console.say(f"next, in Python: {OPENS[record.to].format(record.output_dir)}")
    return found


command = Verb("export", ExportConfig, export, positional=("run",), short={"o": "output_dir"})

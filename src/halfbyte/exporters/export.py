"""A run in the form another tool takes.

    peft      the adapter alone, as PEFT, vLLM and others load it beside its base
    hf        one model in 16 bits, the adapter added in and verified (`merge`)
    bnb-4bit  the base in the very 4 bits of the training, for transformers and bitsandbytes, and
              the adapter beside it: what runs there is the model that was trained, bit for bit in
              its weights

The directory appears when it is complete; a failure leaves none.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..adapters.peft_config import CONFIG
from ..config.options import ModelOptions
from ..errors import ModelError, UsageError
from ..files import atomic, hub
from ..files.companions import copy_companions
from ..files.hub import TEMPLATES
from ..files.safetensors import Checkpoint
from ..model.defaults import with_plain_defaults
from ..progress import Progress, no_progress
from ..quantization.bnb_format import quantized_names
from ..quantization.load import load_base
from ..quantization.writer import quantize
from ..run.card import CARD, export_card
from ..run.directory import ADAPTER_FACTS, Run, files_of_result, refuse_changed_result
from ..run.load import refuse_other_base
from ..run.source import base_of_run
from .merge import merge

FORMATS = ("peft", "hf", "bnb-4bit")


@with_plain_defaults
def export(
    run: str | Path,
    output_dir: str | Path,
    to: str,
    *,
    base: str | None = None,
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write a run for another tool.

    Args:
        to: one of `FORMATS`.
        base: the base's directory or Hub id, where it is not where the run found it.

    Returns:
        What was written: ``to``, ``output_dir``, and what there is to know of it.

    Raises:
        UsageError: output_dir is not empty, or the run has nothing of the kind.
        ModelError: the run or its base is refused.
        VerificationError: as `exporters.merge.merge`.
    """
    source, target = Run.open(run), Path(output_dir).expanduser().absolute()
    refuse_changed_result(source.adapter)
    if to not in FORMATS:
        raise UsageError(f"cannot export to {to!r}", expected=", ".join(FORMATS))
    if source.config().full and to != "hf":
        raise UsageError(
            "a full fine-tuning has no adapter", ways_out=[f"its model is in {source.adapter}"]
        )
    if to == "hf" and not source.config().full:
        receipt = merge(source.path, target, base=base, progress=progress, say=say)
        return {"to": to, "output_dir": str(target), **receipt.as_dict()}
    with atomic.new_directory(target) as building:
        # of a full fine-tuning, in place of the adapter, the model
        write = _result if source.config().full else _WRITERS[to]
        facts = write(source, building, progress, final=target, base_at=base)
    return {"to": to, "output_dir": str(target), **facts}


def _result(
    source: Run, target: Path, progress: Progress = no_progress, **others: Any
) -> dict[str, Any]:
    if not source.adapter.is_dir():
        raise ModelError(f"{source.path} has no result yet", ways_out=["finish the training"])
    names = [*files_of_result(source.adapter), ADAPTER_FACTS, CARD]
    for name in (name for name in names if (source.adapter / name).is_file()):
        target.mkdir(exist_ok=True)
        shutil.copyfile(source.adapter / name, target / name)
    if (source.adapter / TEMPLATES).is_dir():
        shutil.copytree(source.adapter / TEMPLATES, target / TEMPLATES)
    return {"bytes": sum(f.stat().st_size for f in target.rglob("*") if f.is_file())}


def _base_and_adapter(
    source: Run, target: Path, progress: Progress, final: Path, base_at: str | None
) -> dict[str, Any]:
    """The base in its 4 bits, with the tokenizer and the card of the run; and in ``adapter/`` the
    adapter, which names the directory above it by its final path.

    (In one directory transformers would take the adapter's file for the model's own.)
    """
    config, info = source.config(), source.info()
    if not config.load_in_4bit:
        raise UsageError("this run's base was not in 4 bits", ways_out=["--to hf", "or --to peft"])
    options = ModelOptions(**config.holding())
    base = base_of_run(source, base_at)
    if quantized_names(set(Checkpoint(base).entries)):
        for file in {file for pattern in hub.HUB_PATTERNS for file in base.glob(pattern)}:
            shutil.copyfile(file, target / file.name)
    else:
        quantize(base, options, target, progress)
    options.weight_streaming = "never"
    digest = load_base(target, options, progress)[1].digest
    refuse_other_base(digest, info["base"]["digest"], info["base"]["path"])
    facts = _result(source, target / "adapter")
    described = atomic.read_json(target / "adapter" / CONFIG)
    atomic.write_json(
        target / "adapter" / CONFIG,
        {**described, "base_model_name_or_path": str(final), "revision": None},
    )
    copy_companions(target / "adapter", target)
    shutil.copyfile(
        target / "adapter" / "generation_config.json", target / "generation_config.json"
    )
    atomic.write_bytes(target / CARD, export_card(source, info).encode())
    return {**facts, "digest": digest}


_WRITERS = {"peft": _result, "bnb-4bit": _base_and_adapter}
"""What is written as it is; "hf" is a merge, with a receipt."""

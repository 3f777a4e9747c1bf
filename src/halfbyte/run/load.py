"""A model directory or a run to a model and its tokenizer; an adapter goes on no other base than
its own."""

from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from ..adapters.converted import plain_lora
from ..adapters.peft_files import load_adapter
from ..config.hf_objects import options_of
from ..config.options import DataOptions, ModelOptions
from ..data.chat_template import template_digest
from ..data.renderer import Renderer
from ..errors import ModelError, UsageError
from ..files import atomic, hub
from ..files.model_config import computed_by, declared_ends, differences
from ..model.architecture import choose_device
from ..model.defaults import with_plain_defaults
from ..progress import Progress, no_progress
from ..quantization.hf_quantizer import make_saveable
from ..quantization.load import load_base, with_stored_form
from .directory import TEMPLATES_AS_TRAINED, Run, adapter_facts, refuse_changed_result
from .source import (
    as_stored,
    base_of_adapter,
    base_of_run,
    held_for,
    is_adapter,
    run_at,
    tokenizer_directory,
)


def run_renderer(
    run: Run, options: DataOptions, clock: datetime | Literal["run"] | None = "run"
) -> Renderer:
    """The renderer a run was trained with: its tokenizer and template; the masks of the options.

    Args:
        clock: what a template that asks for the time sees; by default the time of the run.
    """
    return Renderer(
        run_tokenizer(run),
        assistant_only=options.assistant_only_loss,
        completion_only=options.completion_only_loss,
        clock=run.clock() if clock == "run" else clock,
        turns=options.turns,
        parse_control_tokens=options.parse_control_tokens,
        ends=declared_ends(run.adapter),
        template_kwargs=options.chat_template_kwargs,
    )


def rows_as_in(run: Run | None, options: DataOptions) -> DataOptions:
    """How rows are read: as the run's were, unless it was said otherwise."""
    if run is None:
        return options
    trained = run.config()
    kept = ("max_length", "over_length", "completion_only_loss", "assistant_only_loss")
    kept += ("turns", "drop_roles", "parse_control_tokens", "chat_template_kwargs")
    as_before = {key: getattr(trained, key) for key in kept if key not in options.model_fields_set}
    return options.model_copy(update=as_before)


@with_plain_defaults
def load(
    model_or_run: str | Path, *objects: Any, progress: Progress = no_progress, **changes: Any
) -> tuple[Any, Any]:
    """A transformers model, quantized, and its tokenizer; with the adapter, if it is a run or an
    adapter.

    ``save_pretrained`` of a model without adapter writes what transformers and bitsandbytes open.

    Args:
        model_or_run: Hub id, model directory, run directory, or an adapter that PEFT wrote. A
            merged model is held as it is stored.
        objects: a ``BitsAndBytesConfig``.
        changes: fields of `config.options.ModelOptions`, above it; a run's base is held as it was
            in training unless changed here. ``base``: where a run's or an adapter's base is, if not
            where it says.

    Raises:
        ModelError, UsageError: as `load_base` and `adapters.peft_files.load_adapter`.
    """
    model, tokenizer = _load(model_or_run, objects, progress, changes)
    make_saveable(model)
    return model, tokenizer


def _load(
    model_or_run: str | Path, objects: tuple[Any, ...], progress: Progress, changes: dict[str, Any]
) -> tuple[Any, Any]:
    given = options_of(objects, ())
    if unfit := sorted(given.keys() - ModelOptions.model_fields.keys()):
        raise UsageError(
            "only a BitsAndBytesConfig says how a model is held",
            found=f"{', '.join(unfit[:5])}, ...",
        )
    changes = {**given, **changes}
    base_at = changes.pop("base", None)
    run = run_at(model_or_run)
    if run is None and is_adapter(model_or_run):
        return _load_adapter(Path(model_or_run).expanduser(), base_at, changes, progress)
    if run is None:
        path = hub.resolve(
            str(model_or_run), changes.get("revision"), subfolder=changes.get("subfolder")
        )
        options = with_stored_form(ModelOptions(**as_stored(path, changes)), path)
        model, _ = load_base(path, options, progress)
        return model, hub.load_tokenizer(path)
    info, trained = run.info(), run.config()
    refuse_changed_result(run.adapter)
    options = ModelOptions(**{**trained.holding(), **changes})
    if "weight_streaming" not in changes and (
        not options.load_in_4bit or choose_device(options.device).type != "cpu"
    ):
        options.weight_streaming = "never"  # what was streamed there cannot be here
    if trained.full:
        model, _ = load_base(run.adapter, options, progress)
    else:
        base, way = base_of_run(run, base_at, options.revision), "allow_other_base"
        with_stored_form(ModelOptions(**changes), base)  # refuses what it is not
        if not changes.get("allow_other_base"):
            refuse_other_config(base, info["base"].get("computed_by"), way)
        model, report = load_base(base, options, progress)
        if options.same_quantization(trained) and not changes.get("allow_other_base"):
            refuse_other_base(report.digest, info["base"]["digest"], info["base"]["path"], way)
        load_adapter(model, run.adapter)
        model.eval()
    return model, run_tokenizer(run)


def _load_adapter(
    path: Path, base_at: str | None, changes: dict[str, Any], progress: Progress
) -> tuple[Any, Any]:
    """An adapter that PEFT wrote, on the base it names, or one that was given."""
    base = base_of_adapter(path, changes.get("revision"), base_at)
    options = held_for(ModelOptions(**changes), path, base)
    model, report = load_base(base, options, progress)
    if not options.allow_other_base and options.load_in_4bit:
        refuse_foreign_adapter(path, report.digest, str(base))
    load_adapter(model, plain_lora(path, base))
    model.eval()
    return model, hub.load_tokenizer(tokenizer_directory(path, base))


def refuse_foreign_adapter(path: Path, digest: str, base: str) -> None:
    """Raise ModelError if an adapter says that it was trained on another base than the one of this
    digest."""
    if facts := adapter_facts(path):
        before = facts.get("base_digest", digest)
        refuse_other_base(digest, before, base, "--allow_other_base true")


def run_tokenizer(run: Run) -> Any:
    """The tokenizer of a run, with the chat template it was trained with.

    Raises:
        ModelError: the template beside the adapter is another one, or the result has changed.
    """
    refuse_changed_result(run.adapter, weights=False)
    tokenizer = hub.load_tokenizer(run.adapter)
    if (kept := run.path / TEMPLATES_AS_TRAINED).is_file():
        named = atomic.read_json(kept)
        tokenizer.chat_template = named["default"] if set(named) == {"default"} else named
    expected = adapter_facts(run.adapter).get("template_sha256")
    if template_digest(tokenizer.chat_template) != expected:
        raise ModelError(
            f"the chat template in {run.adapter} is not the one this adapter was trained with",
            ways_out=[
                "bring back chat_template.jinja of the training",
                "or train again with the new template",
            ],
        )
    return tokenizer


def refuse_other_config(path: Path, expected: dict[str, Any] | None, allow: str = "") -> None:
    """Raise ModelError, naming the keys, if the base in a directory computes something else with
    its weights than the one an adapter was trained on.

    Args:
        expected: `model_config.computed_by` of that; None where a release did not record it.
        allow: how the caller is told that it is as good, if it can be.
    """
    if expected is None:
        return
    if wrong := differences(expected, computed_by(path)):
        raise ModelError(
            f"the base in {path} is not the one this adapter was trained on: its configuration "
            "has changed since",
            found="; ".join(f"{key}: {a!r} then, {b!r} now" for key, (a, b) in wrong.items())[
                :2000
            ],
            ways_out=[
                "bring back the base's config.json and generation_config.json",
                "or train again on this one",
                *([f"or {allow}, if you know that it is as good"] if allow else []),
            ],
        )


def refuse_other_base(found: str, expected: str, path: str, allow: str = "") -> None:
    """Raise ModelError if the base is not the one an adapter was trained on. allow: how the caller
    is told that it is as good, if it can be."""
    if found != expected:
        raise ModelError(
            f"the base in {path} is not the one this adapter was trained on: its weights have "
            "changed since",
            found=f"digest {found[:16]}",
            expected=f"digest {expected[:16]}",
            ways_out=[
                "bring back the base of the training",
                "or train again on this one",
                *([f"or {allow}, if you know that it is as good"] if allow else []),
            ],
        )

"""Configuration objects of transformers, PEFT and TRL where options of ours are wanted.

A script that has a ``BitsAndBytesConfig``, a ``LoraConfig`` and an ``SFTConfig`` (or
``TrainingArguments``) passes them as they are. They are recognized by the names of their classes,
so none of these packages is imported here. What an object says and we do not do is an error if it
would change what is trained, and left out if it would not.
"""

from collections.abc import Mapping
from os import PathLike
from typing import Any

from ..errors import UsageError
from . import peft_settings, trainer_settings
from .aliases import OPTIMIZERS
from .build import build
from .options import RULES, Options, OptionsT

_NEUTRAL: dict[str, Mapping[str, tuple[Any, ...]]] = {
    "BitsAndBytesConfig": {"load_in_8bit": (False,)},
    "LoraConfig": peft_settings.NEUTRAL,
    "TrainingArguments": {},  # `trainer_settings`
}
"""Settings that would change what is trained and have no counterpart here: the values that change
nothing."""

SAME = frozenset(name for name, rules in RULES.items() if rules.in_trainer)
"""Fields of a trainer's arguments that are options of ours."""

WHOLE_ROWS = 1 << 30
"""Longer than any model's context, to which rows are cut in any case."""


_THEIR_PROJECT = "huggingface"
"""What transformers calls a project that nobody named."""
_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant_with_warmup",
}


def options_of(
    things: tuple[Any, ...], names: tuple[str, ...] = ("model", "data")
) -> dict[str, Any]:
    """Options that positional arguments stand for: strings and paths by their order, objects by
    their class.

    Args:
        names: the options that strings and paths are, in order.

    Raises:
        UsageError: an object of another class, too many strings, or a setting without a
            counterpart.
    """
    options: dict[str, Any] = {}
    objects: dict[str, dict[str, Any]] = {}
    left = list(names)
    for thing in things:
        if isinstance(thing, str | PathLike):
            if not left:
                raise UsageError(
                    f"{thing!r} is one name too many", expected=", ".join(names) or "none"
                )
            options[left.pop(0)] = str(thing)
            continue
        classes = [c.__name__ for c in type(thing).__mro__]
        kind = next((name for name in _NEUTRAL if name in classes), None)
        if kind == "TrainingArguments" and classes[0] != kind and "SFTConfig" not in classes:
            kind = None  # of a trainer for something else
        if kind is None:
            raise UsageError(
                f"a {type(thing).__name__} says nothing here", expected=", ".join(_NEUTRAL)
            )
        _refuse_unknown(kind, thing)
        objects[kind] = _READERS[kind](thing)
    for kind in _NEUTRAL:  # what a trainer computes in stands above what 4-bit layers are said to
        options.update(objects.get(kind, {}))
    return options


def config_of(cls: type[OptionsT], things: tuple[Any, ...], options: dict[str, Any]) -> OptionsT:
    """A configuration: one that is given as it is, or one of positional arguments and options by
    name."""
    ours = [thing for thing in things if isinstance(thing, Options)]
    others = tuple(
        thing for thing in things if thing is not None and not isinstance(thing, Options)
    )
    if len(ours) == 1 and isinstance(ours[0], cls) and not others and not options:
        return ours[0]
    given: dict[str, Any] = {}
    for thing in ours:
        given.update(thing.model_dump(exclude_unset=True))
    return build(cls, {**given, **options_of(others), **options})


def _refuse_unknown(kind: str, thing: Any) -> None:
    given = {name: getattr(thing, name, neutral[0]) for name, neutral in _NEUTRAL[kind].items()}
    wrong = {
        name: repr(value) for name, value in given.items() if value not in _NEUTRAL[kind][name]
    }
    if kind == "LoraConfig":  # settings of PEFT's other methods among them
        wrong |= {
            name: repr(value)
            for name, value in peft_settings.changed(thing).items()
            if name not in peft_settings.READ
        }
    if kind == "TrainingArguments":
        wrong |= trainer_settings.undone(thing, SAME)
    if wrong:
        raise UsageError(
            f"a setting of this {type(thing).__name__} has no counterpart here, and would change "
            "what is trained or what becomes of it",
            found=", ".join(f"{name}={value}" for name, value in wrong.items()),
        )


def _of_bitsandbytes(thing: Any) -> dict[str, Any]:
    skipped = thing.llm_int8_skip_modules
    if skipped is not None and set(skipped) != {"lm_head"}:  # an empty one: the head in 4 bits, too
        raise UsageError(
            "the layers held in 4 bits cannot be chosen here",
            found=f"llm_int8_skip_modules {sorted(skipped)}",
            ways_out=["leave it out: layers are held in 4 bits, and the head is not"],
        )
    found: dict[str, Any] = {
        "load_in_4bit": thing.load_in_4bit,
        "bnb_4bit_quant_type": thing.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": thing.bnb_4bit_use_double_quant,
    }
    if thing.load_in_4bit and thing.bnb_4bit_compute_dtype is not None:
        found["dtype"] = str(thing.bnb_4bit_compute_dtype).removeprefix("torch.")
    return found


def _of_lora(thing: Any) -> dict[str, Any]:
    targets = thing.target_modules
    if targets is None:
        raise UsageError(
            "this LoraConfig leaves target_modules to PEFT",
            ways_out=['target_modules="all-linear"'],
        )
    whole = set(thing.modules_to_save or ())
    tied = getattr(thing, "ensure_weight_tying", False) or not whole & MAY_BE_TIED
    return {
        "lora_r": thing.r,
        "lora_alpha": thing.lora_alpha,
        "lora_dropout": thing.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else ",".join(sorted(targets)),
        "use_rslora": thing.use_rslora,
        "rank_pattern": dict(thing.rank_pattern or {}),
        "alpha_pattern": dict(thing.alpha_pattern or {}),
        "use_dora": thing.use_dora,
        "modules_to_save": ",".join(thing.modules_to_save or ()),
        # PEFT trains a copy of each, tied or not
        **({} if tied else {"tie_word_embeddings": False}),
    }


MAY_BE_TIED = {"lm_head", "embed_tokens", "wte", "embed_in", "embed_out", "word_embeddings"}
"""What embeddings and heads are called."""


def _of_trainer(thing: Any) -> dict[str, Any]:
    found = {name: value for name in SAME if (value := getattr(thing, name, None)) is not None}
    checkpointing = getattr(thing, "activation_checkpointing", None)
    if checkpointing is not None:
        found["gradient_checkpointing"] = checkpointing
    if getattr(thing, "max_length", 0) is None:
        found["max_length"] = WHOLE_ROWS
    if "save_total_limit" in found:
        found["save_total_limit"] = max(2, found["save_total_limit"])
    if getattr(thing, "eval_strategy", "no") == "steps" and thing.eval_steps:
        found["eval_steps"] = thing.eval_steps
    for name in ("logging_steps", "save_steps", "eval_steps"):
        if not float(found.get(name, 1)).is_integer():
            del found[name]  # a share of the training, which changes nothing that is trained
    for name, known in (("optim", OPTIMIZERS), ("lr_scheduler_type", _SCHEDULES)):
        value = getattr(thing, name)
        value = getattr(value, "value", value)
        if value not in known:
            raise UsageError(
                f"{name} {value} has no counterpart here",
                expected=", ".join(sorted(set(known.values()))),
            )
        found[name] = known[value]
    warmup = thing.warmup_steps or 0
    ratio = warmup if 0 < warmup < 1 else getattr(thing, "warmup_ratio", None) or 0.0
    if warmup >= 1 or not ratio:
        found["warmup_steps"] = int(warmup)
    found["warmup_ratio"] = ratio
    reports = getattr(thing, "report_to", None) or []
    reports = [reports] if isinstance(reports, str) else list(reports)
    known = ("tensorboard", "wandb", "trackio", "none", "all")
    if unknown := [name for name in reports if name not in known]:
        raise UsageError(
            f"report_to {', '.join(unknown)} has no counterpart here", expected=", ".join(known)
        )
    found["report_to"] = ",".join(reports) or "none"
    if getattr(thing, "project", _THEIR_PROJECT) != _THEIR_PROJECT:
        found["project"] = thing.project
    if getattr(thing, "push_to_hub", False):
        private = getattr(thing, "hub_private_repo", None)
        found.update(
            push_to_hub=True, hub_model_id=thing.hub_model_id, hub_private_repo=private is not False
        )
    if thing.bf16 or thing.fp16:
        found["dtype"] = "bfloat16" if thing.bf16 else "float16"
    if getattr(thing, "use_cpu", False):
        found["device"] = "cpu"
    found["eval_split"] = 0.0  # its trainer trains on every row it is given
    return found


_READERS = {
    "BitsAndBytesConfig": _of_bitsandbytes,
    "LoraConfig": _of_lora,
    "TrainingArguments": _of_trainer,
}

"""What a resumed run must share with the run it goes on from, and what may change."""

import difflib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..config.options import ADDED_LATER, FREE_ON_RESUME, NEVER_ON_RESUME, UNPAGED
from ..errors import ModelError, UsageError
from ..files.model_config import differences


@dataclass(frozen=True)
class Rule:
    """How this release computes what another computed otherwise.

    Attributes:
        number: 1 where a checkpoint does not say.
        says: what the newest number means, for people.
        applies: whether a training, by its record, depends on it.
    """

    number: int
    says: str
    applies: Callable[[dict[str, Any]], bool]


def _in_8_bits(info: dict[str, Any]) -> bool:
    return info["config"]["optim"] in ("adamw_8bit", "paged_adamw_8bit")


RULES = {
    "arithmetic": Rule(
        2,
        "in 16 bits 1 / tokens is not rounded",
        lambda info: info["compute_dtype"] != "float32",
    ),
    "optimizer_codes": Rule(
        2, "8-bit AdamW stores no second moment as zero that is not", _in_8_bits
    ),
    "optimizer_states": Rule(
        2,
        "embeddings and heads have 32-bit states beside 8-bit ones",
        lambda info: (
            _in_8_bits(info) and bool(info["config"]["full"] or info["config"]["modules_to_save"])
        ),
    ),
    "masters": Rule(
        2,
        "a full fine-tuning in 16 bits updates fp32 masters",
        lambda info: info["config"]["full"] and info["compute_dtype"] != "float32",
    ),
    "decay": Rule(
        2,
        "norms and biases are not decayed, as transformers' trainer does not",
        lambda info: (
            info["config"]["weight_decay"] > 0
            and bool(info["config"]["full"] or info["config"]["modules_to_save"])
        ),
    ),
    "order": Rule(
        2, "packed sequences come in random order", lambda info: info["config"]["packing"]
    ),
    "split": Rule(
        2,
        "held-out rows are told apart by what is left of them when they are cut",
        lambda info: bool(info["config"]["eval_split"] and info["data"].get("rows_cut", 0)),
    ),
    "passes": Rule(
        2,
        "rows that the model rotates differently never share a pass",
        lambda info: info.get("passes_apart", False),
    ),
    "rates": Rule(
        2,
        "the warm-up begins at 0, as transformers' does, and constant has none",
        lambda info: info.get("warmup_steps", 0) > 0 or _was_constant(info["config"]),
    ),
}
"""What changes the course of a training with a release, by its name in checkpoints and for
``allow_change``."""


RENDERED = ("rows", "tokens", "supervised_tokens")
"""Counts of a record's data that tell whether this release makes other rows of the same file."""

RESHAPING = ("optimizer_states", "masters", "decay")
"""Rules by which a state has another form."""


def _was_constant(config: dict[str, Any]) -> bool:
    """Whether releases before rule 2 would have warmed up, as no schedule says now."""
    asked = config["warmup_steps"] is None and config["warmup_ratio"]
    return config["lr_scheduler_type"] == "constant" and bool(asked)


def rules_of(info: dict[str, Any]) -> dict[str, int | None]:
    """The number of every rule that a training depends on, None for others."""
    known = {**info, "config": {**ADDED_LATER, **info["config"]}}
    return {name: rule.number if rule.applies(known) else None for name, rule in RULES.items()}


def fingerprint(info: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a resumed run to go on as the unbroken one would; the base's digest is
    compared apart."""
    settings = {
        key: value
        for key, value in info["config"].items()
        if key not in FREE_ON_RESUME and not (key in ADDED_LATER and value == ADDED_LATER[key])
    }
    settings["optim"] = UNPAGED.get(settings["optim"], settings["optim"])
    # as it was said before there was "none"
    if settings["warmup_steps"] == 0:
        settings["warmup_ratio"] = 0.0
    settings["warmup_steps"] = settings["warmup_steps"] or 0
    return {
        **settings,
        "data": info["data"]["sha256"],
        "template": info["template_sha256"],
        "tokenizer": info["tokenizer_sha256"],
        "base_config": info["base"].get("computed_by") if "base" in info else None,
        "rendered": rendered(info),
        "total_steps": info["total_steps"],
        "compute_dtype": info["compute_dtype"],
        "threads": info["machine"]["threads"],
        "machine": info["machine"]["device"],
        "kernel_path": info["machine"]["kernel_path"],
        **{name: info["versions"][name] for name in ("torch", "transformers")},
        **rules_of(info),
    }


def tokenizer_digest(renderer: Any) -> str:
    """sha256 of the tokenizer of a `data.renderer.Renderer`, whole."""
    return hashlib.sha256(renderer.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def rendered(info: dict[str, Any]) -> list[int | None]:
    """What rows were made of the data, by a record of any release."""
    return [info["data"].get(key) for key in RENDERED]


def _told(key: str, before: Any, now: Any) -> str:
    """A difference for people: of mappings what differs in them."""
    if isinstance(before, dict) and isinstance(now, dict) and key == "base_config":
        inner = differences(before, now).items()
        return f"{key}: " + ", ".join(f"{name} {a!r} then, {b!r} now" for name, (a, b) in inner)
    says = f" ({RULES[key].says})" if key in RULES else ""
    return f"{key}: {before!r} then, {now!r} now{says}"


def _read_from(keys: list[str], info: dict[str, Any]) -> str:
    """The places of what differs, where that is read from files."""
    base, data = info.get("base", {}).get("path", ""), info.get("data", {}).get("source", "")
    places = {
        base: {"base_config", "template", "tokenizer", "rendered"},
        data: {"data", "rendered"},
    }
    return ", ".join(place for place, read in places.items() if place and read & {*keys})


def changes_since(state: dict[str, Any], info: dict[str, Any], allowed: set[str]) -> list[str]:
    """What differs from the checkpoint's training and was allowed to, a line each.

    Raises:
        ModelError: something differs that was not allowed, or that no resume can change; names all
            of it.
    """
    before, now = state["fingerprint"], fingerprint(info)
    # of a release that had no such rule
    before = {**{name: 1 for name, number in rules_of(info).items() if number}, **before}
    if not before.get("base_config"):  # of a release that did not record it
        now = {**now, "base_config": None}
    differ = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    known = before.keys() | now.keys() | {"base"}
    if unknown := sorted(allowed - known - FREE_ON_RESUME):  # what is free needs no leave
        close = difflib.get_close_matches(unknown[0], sorted(known), n=1)
        raise UsageError(
            f"allow_change names {unknown[0]!r}, which is nothing that can change",
            ways_out=[f"did you mean {close[0]!r}?"] if close else [],
        )
    lines = {key: _told(key, before.get(key), now.get(key)) for key in differ}
    refused = [key for key in differ if key not in allowed or key in NEVER_ON_RESUME]
    if refused:
        free = [key for key in refused if key not in NEVER_ON_RESUME]
        ways = ["repeat the command as it was", "or start anew in another --output_dir"]
        if free and len(free) == len(refused):
            ways.insert(
                1,
                "or accept the change, and a result that is not bit-exact: --allow_change "
                f"{','.join(free)}",
            )
        raise ModelError(
            "the checkpoint belongs to another training than this command describes",
            where=_read_from(refused, info),
            found="; ".join(lines[key] for key in refused),
            ways_out=ways,
        )
    return list(lines.values())

"""What a resumed run must share with the run it goes on from, and what may change."""

import difflib
from typing import Any

from ..config.options import ADDED_LATER, FREE_ON_RESUME, NEVER_ON_RESUME, UNPAGED
from ..errors import ModelError, UsageError

ARITHMETIC = 2
"""Raised when a release computes the same training in 16 bits with other last bits. 2: 1 / tokens
is not rounded."""


def fingerprint(info: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a resumed run to go on as the unbroken one would; the base's digest is
    compared apart."""
    settings = {
        key: value
        for key, value in info["config"].items()
        if key not in FREE_ON_RESUME and not (key in ADDED_LATER and value == ADDED_LATER[key])
    }
    settings["optim"] = UNPAGED.get(settings["optim"], settings["optim"])
    return {
        **settings,
        "data": info["data"]["sha256"],
        "template": info["template_sha256"],
        "tokenizer": info["tokenizer_sha256"],
        "total_steps": info["total_steps"],
        "compute_dtype": info["compute_dtype"],
        "threads": info["machine"]["threads"],
        "machine": info["machine"]["device"],
        "kernel_path": info["machine"]["kernel_path"],
        **{name: info["versions"][name] for name in ("torch", "transformers")},
        "arithmetic": None if info["compute_dtype"] == "float32" else ARITHMETIC,
    }


def changes_since(state: dict[str, Any], info: dict[str, Any], allowed: set[str]) -> list[str]:
    """What differs from the checkpoint's training and was allowed to, a line each.

    Raises:
        ModelError: something differs that was not allowed, or that no resume can change; names all
            of it.
    """
    before, now = state["fingerprint"], fingerprint(info)
    differ = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    known = before.keys() | now.keys() | {"base"}
    if unknown := sorted(allowed - known - FREE_ON_RESUME):  # what is free needs no leave
        close = difflib.get_close_matches(unknown[0], sorted(known), n=1)
        raise UsageError(
            f"allow_change names {unknown[0]!r}, which is nothing that can change",
            ways_out=[f"did you mean {close[0]!r}?"] if close else [],
        )
    lines = {key: f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in differ}
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
            found="; ".join(lines[key] for key in refused),
            ways_out=ways,
        )
    return list(lines.values())

"""A run directory as plain data: everything there is to tell of a training, read in one place.

The model card and the command line tell from it; nothing here is a sentence or a picture.
"""

import contextlib
from typing import Any

from ..errors import HalfbyteError
from ..files.atomic import read_json
from .directory import EVALS, MEMORY, METRICS, NONFINITE, PLAN_JSON, QUANT_JSON, Run


def facts(run: Run, info: dict[str, Any] | None = None) -> dict[str, Any]:
    """What is known of a run; what is not known is None or empty.

    Args:
        info: what `run.json` holds, or is about to.

    Returns:
        ``config``, ``base``, ``data``, ``versions``, ``machine``, ``changes``, ``steps`` as in
        run.json; ``hashes`` of base, data, template and tokenizer; ``curve``: step, loss, lr,
        grad_norm of each logged step; ``evals``: rows of eval.jsonl; ``held_out``: the first and
        the last finite loss of these; ``memory``: bytes planned and measured at the peak, and by
        phase; ``judged``: what it learned and forgot; ``samples``: answers before and after;
        ``skipped``: steps that were not finite and were left out; ``quantization``: relative error
        of each tensor, largest first.

    Raises:
        ModelError: run.json is damaged.
    """
    info = run.info() if info is None else info
    evals = run.read(EVALS)
    finite = [row for row in evals if row.get("loss") is not None]
    return {
        "config": info["config"],
        "base": info["base"],
        "data": info["data"],
        "versions": info.get("versions", {}),
        "machine": info.get("machine", {}),
        "changes": info.get("changes", []),
        "steps": info.get("total_steps"),
        "hashes": {
            "base": info["base"].get("digest"),
            "data": info["data"].get("sha256"),
            "template": info.get("template_sha256"),
            "tokenizer": info.get("tokenizer_sha256"),
        },
        "curve": [
            {key: row.get(key) for key in ("step", "loss", "lr", "grad_norm")}
            for row in run.read(METRICS)
        ],
        "first_loss": _first_loss(run, info),
        "evals": evals,
        "held_out": (finite[0], finite[-1]) if len(finite) > 1 else None,
        "memory": _memory(run),
        "judged": info.get("judged"),
        "samples": run.samples(),
        "skipped": len(run.read(NONFINITE)),
        "quantization": _quantization(run),
    }


def _first_loss(run: Run, info: dict[str, Any]) -> float | None:
    """Of the first step; of runs of earlier releases, of the first row."""
    logged = (row["loss"] for row in run.read(METRICS) if row.get("loss") is not None)
    return info.get("first_loss") or next(logged, None)


def _memory(run: Run) -> dict[str, Any]:
    plan: dict[str, Any] = {}
    with contextlib.suppress(HalfbyteError):
        plan = read_json(run.path / PLAN_JSON)
    measured: dict[str, int] = {}
    for row in run.read(MEMORY):
        if "measured_bytes" in row:
            phase = row["phase"]
            measured[phase] = max(measured.get(phase, 0), row["measured_bytes"])
    planned = plan.get("phases", {})
    return {
        "planned": plan.get("peak_bytes", 0),
        "measured": max(measured.values(), default=0),
        "phases": {
            name: {"planned": planned.get(name), "measured": measured.get(name)}
            for name in {**planned, **measured}
        },
    }


def _quantization(run: Run) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with contextlib.suppress(HalfbyteError, KeyError):
        found = [
            {"name": tensor["name"], "relative_mse": tensor["relative_mse"]}
            for tensor in read_json(run.path / QUANT_JSON)["tensors"]
            if "relative_mse" in tensor
        ]
    return sorted(found, key=lambda tensor: -tensor["relative_mse"])

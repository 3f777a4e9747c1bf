"""``halfbyte plan MODEL``: does it fit, before anything is downloaded."""

import shlex
from typing import TYPE_CHECKING, Any

from ..config.options import PlanConfig
from . import console
from .options import Verb

if TYPE_CHECKING:
    from ..planning.memory_plan import MemoryPlan


def plan(record: PlanConfig) -> dict[str, Any]:
    """Memory and time of a training from MODEL's config.json alone; --data for real lengths,
    --fit-to to search."""
    from ..planning.plan import plan

    found = plan(record, say=console.say, progress=console.progress)
    show(found, record.fit_to is not None and found.fits)
    enough = [choice.flags() for choice in found.choices if choice.fits]
    if found.fits or enough:
        changed = f" {enough[0]}" if enough else ""
        given = [f"--{name} {_typed(getattr(record, name))}" for name in sorted(_repeated(record))]
        options = " ".join([f"--data {record.data or 'rows.jsonl'}", *given])
        console.say(f"next: halfbyte train {record.model} {options}{changed}")
    else:
        console.say(
            "next: halfbyte plan with a smaller model, or --fit-to the memory of another machine"
        )
    return {**found.as_dict(), "exit_code": 0 if found.fits else 3}


def _typed(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else shlex.quote(str(value))


def _repeated(record: PlanConfig) -> set[str]:
    """Options that were given and that a training needs again."""
    from ..config.options import SEARCHED

    again = record.model_fields_set - {"model", "data", "fit_to", "force"}
    return again - set(SEARCHED) if record.fit_to else again


def show(plan: "MemoryPlan", searched: bool) -> None:
    """The plan as tables."""
    from ..planning.budget import RESERVE, gib

    where = {"cpu": "this machine's memory", "cuda": "the GPU's memory"}[plan.device]
    console.say(
        f"{plan.parameters:,} parameters, {plan.quantized_parameters:,} of them in 4 bits, "
        f"{plan.lora_parameters:,} in "
        f"the adapter; {plan.tokens:,} tokens in the largest micro-batch"
    )
    held = sorted(
        (part for part in plan.ledger if part.where == "device"), key=lambda part: -part.bytes
    )
    rows = [[part.part, gib(part.bytes)] for part in held]
    console.table(
        f"{where}, at the peak of a step",
        ["part", "bytes"],
        [*rows, ["together", gib(plan.phases["step"])]],
    )
    phases = [[phase, gib(size)] for phase, size in plan.phases.items()]
    console.table(
        "peak of each phase (merge, chat and export are commands of their own)",
        ["phase", "bytes"],
        phases,
    )
    others = [
        [part.part, part.where, gib(part.bytes)] for part in plan.ledger if part.where != "device"
    ]
    console.table("elsewhere", ["part", "where", "bytes"], others)
    if plan.choices:
        (_show_search if searched else _show_ways_out)(plan)
    if plan.seconds is not None:
        console.say(
            f"estimated time: {duration(plan.seconds)} for {plan.steps:,} steps, at this "
            "machine's speed now"
        )
    if plan.budget_bytes:
        verdict = "it fits" if plan.fits else "it does not fit"
        budget = f"{gib(plan.budget_bytes)}, {RESERVE:.0%} of which stay free"
        console.say(f"peak {gib(plan.peak_bytes)} of {budget}: {verdict}")


def _show_ways_out(plan: "MemoryPlan") -> None:
    from ..planning.budget import gib

    rows = [
        [
            choice.flags(),
            gib(choice.peak_bytes),
            "yes" if choice.fits else "no",
            choice.loses or "time only",
        ]
        for choice in plan.choices
    ]
    console.table("ways out, each by itself", ["change", "peak", "fits", "costs"], rows)


def _show_search(plan: "MemoryPlan") -> None:
    """What was tried, the plan first."""
    from ..planning.budget import gib

    rows = []
    for choice in plan.choices:
        change = choice.change
        some = change.get("kept_layers", -1)
        rows.append(
            [
                str(change["kept_activations"]) + (f" in {some} layers" if some >= 0 else ""),
                f"{change['per_device_train_batch_size']} x "
                f"{change['gradient_accumulation_steps']}",
                gib(choice.peak_bytes),
                f"{choice.relative_time:.2f}",
                "yes" if choice.fits else "no",
                choice.loses or _moved(change) or "nothing",
            ]
        )
    columns = ["kept activations", "micro-batch x accumulation", "peak", "time", "fits", "loses"]
    console.table("what was tried; the first is taken", columns, rows)


def _moved(change: dict[str, Any]) -> str:
    """What of a plan does not lie in memory, and how it is cut."""
    from ..engine.reductions import moved

    words = moved(change)
    tiled = (
        f"MLPs {change['tokens_per_tile']} tokens at a time"
        if change.get("tokens_per_tile")
        else ""
    )
    return "; ".join(filter(None, [f"out of memory: {', '.join(words)}" if words else "", tiled]))


def duration(seconds: float) -> str:
    """For people: two figures are enough for an estimate."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


command = Verb("plan", PlanConfig, plan, positional=("model",), short={"o": "output_dir"})

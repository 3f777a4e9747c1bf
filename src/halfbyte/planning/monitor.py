"""The peak of each phase of a training, measured beside what was planned: rows of
``memory.jsonl``."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..engine.learner import Learner
from ..engine.paged_optimizers import is_paged
from ..memory.process import Peak
from .parts import on_device, sizes

DRIFT = 0.05
"""Share of the plan by which a measurement may be above it before it is said aloud."""


class PeakMonitor:
    """Measures the peak of each phase, beside what was planned for it: rows of ``memory.jsonl``.

    Args:
        planned: bytes of each phase, as they would be measured; empty without a plan.
        append: takes a row.
        say: takes a line for people.
    """

    def __init__(
        self,
        device: torch.device,
        planned: dict[str, int],
        append: Callable[[dict[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        self.peak, self.planned, self.append, self.say = Peak(device), planned, append, say
        self.learner: Learner | None = None
        self.now = "the start"
        self.highest: dict[str, int] = {}

    @contextlib.contextmanager
    def phase(self, name: str, step: int) -> Iterator[None]:
        """Measure what is done within this block; where it fails, ``now`` still names it."""
        self.now = name if name in ("load", "rehearsal") else f"{name}, step {step}"
        self.peak.restart()
        yield
        self.note(name, step, self.peak.bytes())

    def note(self, name: str, step: int, found: int) -> None:
        """A phase took so many bytes at its peak. Written if it is the phase's first or its
        highest."""
        before = self.highest.get(name, 0)
        if found <= before * 1.01:
            return
        self.highest[name] = found
        planned = self.planned.get(name)
        parts = sizes(on_device(self.learner)) if self.learner is not None else {}
        row = {
            "phase": name,
            "step": step,
            "measured_bytes": found,
            "planned_bytes": planned,
            "parts": parts,
        }
        optimizer: Any = None if self.learner is None else self.learner.optimizer
        if optimizer is not None and is_paged(optimizer):
            states = sum(t.nbytes for t in optimizer.state_tensors().values())
            row["paged"] = {
                "optimizer states": states,
                "of them in memory": optimizer.resident_bytes(),
            }
        self.append(row)
        if planned and found > planned * (1 + DRIFT):
            self.say(
                f"memory: {name} took {found / 2**20:,.0f} MiB, {found / planned - 1:.0%} more "
                f"than the {planned / 2**20:,.0f} MiB planned"
            )

    def line(self) -> str:
        """What became of the plan, "" where there was none or nothing could be measured."""
        found = max(self.highest.values(), default=0)
        planned = max(
            (self.planned[name] for name in self.highest if name in self.planned), default=0
        )
        if not found or not planned:
            return ""
        return (
            f"memory: {found / 2**20:,.0f} MiB at the peak, {planned / 2**20:,.0f} planned "
            f"({found / planned - 1:+.1%})"
        )

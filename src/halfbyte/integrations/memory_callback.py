"""`MemoryCallback`: a plan's bytes beside measured ones, in transformers' Trainer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..planning.memory_plan import MemoryPlan
from ..planning.monitor import PeakMonitor
from ..progress import to_stderr
from ..run.directory import MEMORY


class MemoryCallback(TrainerCallback):
    """Measures a trainer's memory beside the plan: ``memory.jsonl`` in its output directory, and a
    line at the end.

    In ``callbacks=[MemoryCallback(plan)]`` it comes after what reports to trackers; `first_in` puts
    it before, and then ``memory_bytes`` and ``memory_planned_bytes`` are in what they log.

    Args:
        plan: from `halfbyte.plan`, of the same training by halfbyte's own trainer; None: measured
            only.
        say: takes lines for people: more than was planned, and the last.
    """

    def __init__(
        self, plan: MemoryPlan | None = None, say: Callable[[str], None] = to_stderr
    ) -> None:
        self.plan, self.say = plan, say
        self.monitor: PeakMonitor | None = None

    def first_in(self, trainer: Any) -> "MemoryCallback":
        """Before every other callback of a trainer."""
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(each for each in callbacks if each is not self)]
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        file = Path(args.output_dir) / MEMORY
        file.parent.mkdir(parents=True, exist_ok=True)

        def append(row: dict[str, Any]) -> None:
            with file.open("a") as stream:
                stream.write(json.dumps(row) + "\n")

        self.monitor = PeakMonitor(
            torch.device(args.device),
            {} if self.plan is None else self.plan.measurable(),
            append,
            self.say,
        )
        self.monitor.peak.restart()

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.monitor is not None:
            self.monitor.note("step", state.global_step, self.monitor.peak.bytes())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        if self.monitor is not None and logs is not None:
            logs["memory_bytes"] = self.monitor.peak.bytes()
            if planned := self.monitor.planned.get("step"):
                logs["memory_planned_bytes"] = planned
            self.monitor.peak.restart()

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.monitor is not None and (line := self.monitor.line()):
            self.say(line)

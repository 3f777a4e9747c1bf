"""What was planned for a training, and what becomes of it: the options as they are now, the plan
that is measured against, and the monitor that measures.

It is there before anything is loaded and outlives a failure, so that memory which runs out can be
told with the plan at hand.
"""

from dataclasses import replace
from typing import Any

import torch

from ..config.options import REORDERING, TrainConfig
from ..errors import HalfbyteError
from ..files import atomic
from ..planning.memory_plan import MemoryPlan, in_words
from ..planning.monitor import PeakMonitor
from ..planning.search import Planner, ways_in_words
from ..progress import Reporter
from ..run.directory import MEMORY, PLAN_JSON, Run


class Promise:
    """The plan of a run and the options it is for.

    Attributes:
        config: the options as they are now; what is left to `auto`, what fits and what memory made
            of the run change them.
        given: those that reorder sums, as they were asked for.
        planner: plans anew under other options; None where the model cannot be planned.
        plan: what is measured against; None where nothing is.
        forced: the plan that did not fit, where the training was forced.
        monitor: measures the peak of each phase beside ``plan``.
    """

    def __init__(self, config: TrainConfig, run: Run, reporter: Reporter) -> None:
        self.config, self.run, self.reporter = config, run, reporter
        self.given = {name: getattr(config, name) for name in REORDERING}
        self.planner: Planner | None = None
        self.plan: MemoryPlan | None = None
        self.forced: MemoryPlan | None = None
        self.foresees = True
        self.waiting: list[dict[str, Any]] | None = []
        self.monitor = PeakMonitor(torch.device("cpu"), {}, self.append, reporter.say)

    def append(self, row: dict[str, Any]) -> None:
        """A row of memory.jsonl; rows wait until that file is cut to the steps that are resumed."""
        if self.waiting is None:
            self.run.append(MEMORY, row)
        else:
            self.waiting.append(row)

    def write_waiting(self) -> None:
        """Write the rows that waited; from here on each is written at once."""
        waiting, self.waiting = self.waiting or [], None
        for row in waiting:
            self.run.append(MEMORY, row)

    def change(self, options: dict[str, Any]) -> None:
        """Go on with other options than were given."""
        self.config = self.config.model_copy(update=options)
        if self.planner is not None:
            self.planner.config = self.config

    def hold(self, plan: MemoryPlan) -> None:
        """Measure against this plan from here on, and write it to plan.json."""
        self.plan = plan
        atomic.write_json(self.run.path / PLAN_JSON, plan.as_dict())
        self.monitor.planned = plan.measurable()

    def plan_again(self) -> None:
        """Plan for the options as they are now; where that fails, nothing is foreseen from here
        on."""
        if self.planner is None:
            return
        try:
            self.hold(self.planner.plan())
        except (HalfbyteError, RuntimeError, MemoryError):
            self.foresees = False

    def ways_out(self) -> list[str]:
        """Ways of needing less memory, in words; of a forced plan, what is left of its first
        ones."""
        ways = (
            []
            if self.plan is None or self.planner is None
            else ways_in_words(self.plan, self.planner)
        )
        if not ways and self.forced is not None:  # there may be no memory to plan in
            left = [
                choice
                for choice in self.forced.choices
                if any(getattr(self.config, name) != value for name, value in choice.change.items())
            ]
            ways = in_words(replace(self.forced, choices=tuple(left)))
        return ways

"""A step that cannot run out of memory: what happens before a pass for which too little is left,
and after one that failed.

Gradients are all that a pass changes, so after a failed one they are set to zero and those of the
step are begun anew, with the next of the reductions that is allowed (`engine.reductions`). None of
them changes a number but those that add in another order, which the run's record says.
"""

import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from ..config.options import REORDERING
from ..data.batches import MicroBatch
from ..engine.learner import Learner
from ..engine.reductions import REDUCTIONS, Change
from ..engine.selftest import recomputed_line
from ..errors import DoesNotFit, StorageError, first_line, is_exhaustion
from ..memory.process import headroom, return_freed
from ..planning.budget import gib
from ..planning.parts import on_device, sizes
from ..run.directory import MEMORY
from .interrupts import Interrupts
from .promise import Promise

Result = TypeVar("Result")


class Recovery:
    """Keeps a training within its memory.

    Args:
        learner: what is trained.
        promise: the plan, and the options as they are.
        interrupts: signals wait while a reduction is applied.
        info: the run's record (`run.json`), which says what changed; written where it is complete.
    """

    def __init__(
        self,
        learner: Learner,
        promise: Promise,
        interrupts: Interrupts | None = None,
        info: dict[str, Any] | None = None,
    ) -> None:
        self.learner, self.promise = learner, promise
        self.interrupts = interrupts or Interrupts()
        self.info = {} if info is None else info

    def make_room(self, step: int, batch: MicroBatch) -> None:
        """Before a micro-batch for which too little memory is left, go on with less."""
        promise = self.promise
        while promise.plan is not None and promise.foresees:
            largest = max(len(part.input_ids) for _, part in self.learner.parts(batch))
            run, left = self.learner.recompute, headroom(self.learner.device)
            need = promise.plan.live_bytes(largest) - (0 if run is None else run.inputs.held_bytes)
            if left is None or need <= left:
                return
            why = f"{largest:,} tokens need {gib(need)} and {gib(left)} are left"
            if not self.take_less(step, [batch], why):
                return  # it may do all the same

    def with_less(self, step: int, batches: list[MicroBatch], work: Callable[[], Result]) -> Result:
        """Do work that changes nothing but gradients; where memory runs out, begin it anew with
        less.

        Raises:
            MemoryError: it ran out, and there is nothing left to do with less.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if not is_exhaustion(error):
                    raise
                message = first_line(error)
                # and with them what the failed computation held
                traceback.clear_frames(error.__traceback__)
            self.learner.forget()
            return_freed()
            if not self.take_less(step, batches, f"memory ran out ({message[:120]})"):
                raise MemoryError(message)

    def take_less(self, step: int, batches: list[MicroBatch], why: str) -> bool:
        """Apply the first reduction that is left; False where none is.

        It is said, and written to memory.jsonl; one that may change last bits also to run.json.
        """
        with self.interrupts.noted():  # none of it is left half done
            parts = [part for batch in batches for _, part in self.learner.parts(batch)]
            for reduction in REDUCTIONS:
                try:
                    change = reduction.while_running(self.learner, parts)
                except StorageError as error:
                    self.promise.reporter.say(f"{error.what}: left as it is")
                    continue
                if change:
                    line = (
                        f"step {step + 1}: {why}; from here on "
                        f"{reduction.sentence(change[reduction.option])}"
                    )
                    self.promise.reporter.say(line)
                    self._record(step, change, why)
                    return True
        return False

    def _record(self, step: int, change: Change, why: str) -> None:
        promise, info = self.promise, self.info
        promise.append({"phase": "less", "step": step + 1, "why": why, "change": change})
        promise.change(change)
        for name in change.keys() & set(REORDERING):
            line = f"{name}: {change[name]} from here on, for {why}"
            info.setdefault("changes", []).append({"step": step, "change": line, "by_memory": True})
        if self.learner.recompute is not None:
            info.setdefault("found", {})["recomputed"] = recomputed_line(self.learner.recompute)
        if "base" in info:
            info["config"] = promise.config.model_dump()
            promise.run.write_info(info)
        promise.plan_again()


def exhausted(promise: Promise, message: str, state: str, held_by: Learner | None) -> DoesNotFit:
    """Return the error for memory that ran out.

    Args:
        message: what failed, in a line.
        state: what became of the training.
        held_by: whose memory is listed; None before there was a learner.
    """
    held = {} if held_by is None else sizes(on_device(held_by))
    largest = sorted(held.items(), key=lambda item: -item[1])[:4]
    listed = ", ".join(f"{part} {gib(size)}" for part, size in largest)
    return DoesNotFit(
        f"out of memory in this phase: {promise.monitor.now}; {state}",
        where=str(promise.run.path / MEMORY),
        found=(f"{message}; held: {listed}" if held else message)[:600],
        ways_out=[*promise.ways_out(), "close what else uses memory", "or a smaller model"],
        plan=None if promise.plan is None else promise.plan.as_dict(),
    )

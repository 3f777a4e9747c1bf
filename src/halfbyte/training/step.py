"""One optimizer step, as a paragraph (`Stepper.run`).

The loss of a step is the sum of cross-entropy over all supervised tokens of the global batch,
divided by their number: how the batch is cut into micro-batches cannot change it. Whatever is
random is a function of (seed, epoch, step, micro-batch, layer), so a resumed run goes on exactly as
it would have.
"""

import math
import time
from pathlib import Path
from typing import Any

import torch

from ..config.options import TrainConfig
from ..data.batches import MicroBatch
from ..engine.learner import Learner
from ..engine.lr_schedule import learning_rate
from ..errors import NonFiniteError
from ..memory.process import return_freed
from ..progress import Reporter
from ..run.directory import NONFINITE, Run
from .promise import Promise
from .recovery import Recovery
from .setup import build_learner


def stepper_for(config: TrainConfig, base: Path, run: Run) -> "Stepper":
    """Load a model and make it ready for single steps, without a plan and without files of a run.

    Args:
        config: what is trained, and how; ``max_steps`` is the length of the learning rate's
            schedule.
        base: the model's directory.
        run: where scratch files lie.
    """
    reporter = Reporter()
    learner, _ = build_learner(config, base, reporter)
    return Stepper(learner, Promise(config, run, reporter), config.max_steps)


class Stepper:
    """Makes optimizer steps.

    Args:
        learner: what is trained.
        promise: the options as they are, and the monitor of memory.
        total_steps: of the training, for the learning rate.
        recovery: keeps a step within its memory; None: one without a plan.

    Attributes:
        updating: whether the optimizer is in the middle of a step: nothing may be saved then.
    """

    def __init__(
        self,
        learner: Learner,
        promise: Promise,
        total_steps: int,
        recovery: Recovery | None = None,
    ) -> None:
        self.learner, self.promise, self.total_steps = learner, promise, total_steps
        self.recovery = recovery or Recovery(learner, promise)
        self.updating = self.warmed_up = False

    def run(self, step: int, batches: list[MicroBatch]) -> dict[str, Any]:
        """Make one step over a global batch; returns its row of metrics.jsonl.

        Raises:
            NonFiniteError: loss or gradients are not, and ``on_nonfinite`` is stop.
        """
        began, learner, monitor = time.perf_counter(), self.learner, self.promise.monitor
        phase = "step" if self.warmed_up else "first step"
        monitor.now = f"step {step + 1}"
        monitor.peak.restart()
        supervised = sum(batch.supervised for batch in batches)
        # nothing but gradients changes, and they are thrown away
        with self.recovery.interrupts.immediate(""):
            mean_loss, norm, passes = self._gradients(step, batches, supervised)
        rate = learning_rate(self.promise.config, step, self.total_steps)
        if finite := self._is_finite(step, mean_loss, norm, batches):
            self.updating = True
            learner.update(rate)
            self.updating = False
            learner.scale.stay()
            if not learner.is_finite():
                self.updating = True  # of what there is nothing may be saved
                raise self._lost(step, batches)
        learner.forget()
        peak = monitor.peak.bytes()
        monitor.note(phase, step + 1, peak)
        if not self.warmed_up:
            return_freed()  # what the first step took before its lasting blocks had their places
            self.warmed_up = True
        seconds, tokens = (
            time.perf_counter() - began,
            sum(len(batch.input_ids) for batch in batches),
        )
        return {
            "step": step + 1,
            "loss": mean_loss if finite else None,
            "lr": rate,
            "grad_norm": norm if finite else None,
            **({"loss_scale": learner.scale.value} if learner.scale.active else {}),
            "tokens": tokens,
            "supervised_tokens": supervised,
            "tokens_per_s": round(tokens / max(seconds, 1e-9), 2),
            "passes": passes,
            "memory_bytes": peak,
            "memory_planned_bytes": monitor.planned.get("step"),
        }

    def _gradients(
        self, step: int, batches: list[MicroBatch], supervised: int
    ) -> tuple[float, float, int]:
        """Add the step's gradients to zeros: mean loss, norm and number of passes. In fp16 the same
        rows go through again at a lower scale until the gradients are finite."""
        learner = self.learner
        while True:
            losses = self.recovery.with_less(
                step, batches, lambda: self._passes(step, batches, supervised)
            )
            total = torch.zeros((), dtype=torch.float32, device=learner.device)
            for loss in losses:
                total += loss
            mean_loss = float(total) / supervised
            norm = float(learner.clip())
            if math.isfinite(norm) or not math.isfinite(mean_loss) or not learner.scale.lower():
                return mean_loss, norm, len(losses)
            self.promise.reporter.say(
                f"step {step + 1}: gradients overflow in fp16; loss scale {learner.scale.value:g}"
            )
            learner.forget()

    def _passes(self, step: int, batches: list[MicroBatch], supervised: int) -> list[torch.Tensor]:
        """Every micro-batch forward and backward; the summed loss of each pass."""
        losses = []
        for number, batch in enumerate(batches):
            self.recovery.make_room(step, batch)
            losses += self.learner.accumulate(batch, supervised, step, number)
        return losses

    def _is_finite(self, step: int, loss: float, norm: float, batches: list[MicroBatch]) -> bool:
        """Whether the update may be made. A step that may not is written to nonfinite.jsonl with
        its rows."""
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        run = self.promise.run
        rows = _places(batches)
        run.append(
            NONFINITE, {"step": step + 1, "loss": str(loss), "grad_norm": str(norm), "rows": rows}
        )
        what = (
            f"step {step + 1} gave loss {loss} and gradient norm {norm}; the parameters were "
            "not updated"
        )
        if self.promise.config.on_nonfinite == "skip":
            self.promise.reporter.say(f"{what} (skipped; {len(run.read(NONFINITE))} so far)")
            return False
        raise NonFiniteError(
            what,
            where=_in_short(rows),
            ways_out=[
                "lower --learning_rate",
                f"look at these rows, all listed in {run.path / NONFINITE}",
                "--on_nonfinite skip leaves such steps out",
                "a checkpoint saved before is unharmed: --resume_from_checkpoint auto goes on "
                "from it",
            ],
        )

    def _lost(self, step: int, batches: list[MicroBatch]) -> NonFiniteError:
        """Parameters are infinite, though loss and gradients were not."""
        return NonFiniteError(
            f"the update of step {step + 1} made parameters infinite, or nearly so; they are not "
            "saved",
            where=_in_short(_places(batches)),
            ways_out=[
                "lower --learning_rate, --weight_decay",
                "a checkpoint saved before is unharmed: --resume_from_checkpoint auto goes on "
                "from it",
            ],
        )


def _places(batches: list[MicroBatch]) -> list[str]:
    return [where for batch in batches for where in batch.rows]


def _in_short(rows: list[str]) -> str:
    return ", ".join(rows[:8]) + (f" and {len(rows) - 8} more rows" if len(rows) > 8 else "")

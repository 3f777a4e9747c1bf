"""Training: set up (`training.setup`), steps (`training.step`), evaluation and samples, results.

`train` is the whole of it. `Trainer` is the loop over a complete set-up; what happens when memory
runs out is `training.recovery`, how a run goes on `training.resume`, signals are
`training.interrupts`.
"""

import contextlib
import functools
import math
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.modules_to_save import forget_casts, trainable_modules
from ..config.hf_objects import config_of
from ..config.options import TrainConfig
from ..data.batches import MicroBatch, collate, largest_pass
from ..data.formats import last_asked
from ..data.memory_rows import rows_in_memory, rows_name
from ..engine.evaluate import largest_group, mean_loss
from ..engine.generate import SAMPLE_SECONDS, SAMPLE_TOKENS, answers
from ..engine.judge import NEUTRAL_TOKENS, Judge, words
from ..errors import HalfbyteError, Interrupted, NonFiniteError, first_line, is_exhaustion
from ..files import atomic
from ..memory.process import TRAIN_MMAP_THRESHOLD, bounded, return_freed, set_mmap_threshold
from ..model import attention
from ..model.architecture import choose_device
from ..model.defaults import with_plain_defaults
from ..ops import cpu
from ..progress import Reporter
from ..quantization.original import OriginalWeights
from ..run.directory import EVALS, METRICS, NONFINITE, SAMPLES, Run
from .interrupts import NOTHING_LOST, ONLY_THE_RESULT, Abandoned, Interrupts
from .promise import Promise
from .recovery import Recovery, exhausted
from .rehearsal import rehearse
from .saving import publish_result, save_checkpoint, save_judgement, save_result
from .setup import Setup, set_up
from .step import Stepper
from .trackers import Trackers, tracker_names

_one_at_a_time = threading.RLock()
"""Trainings in several threads wait for each other: two at once would be no faster."""


@with_plain_defaults
def train(*config: Any, reporter: Reporter | None = None, **options: Any) -> Run:
    """Fine-tune a model as the configuration says; returns the run directory.

    Args:
        config: a `TrainConfig`; or a model and a data file, then whatever there is of
            ``BitsAndBytesConfig``, ``LoraConfig`` and ``SFTConfig`` or ``TrainingArguments``.
        reporter: where progress goes.
        options: by name, above all others.

    Raises:
        HalfbyteError: with the exit code of the command line.
    """
    # the reporter was the second argument once
    reporter = reporter or next((thing for thing in config if isinstance(thing, Reporter)), None)
    things = tuple(thing for thing in config if not isinstance(thing, Reporter))
    rows = rows_in_memory(options.get("data"))
    if rows is not None:
        options["data"] = rows_name(rows)
    wanted = config_of(TrainConfig, things, options)
    if "kernels" in wanted.model_fields_set:
        cpu.use(wanted.kernels)  # the plan and the record are of what will compute
    run = Run(Path(wanted.output_dir).expanduser())
    atomic.check_writable(run.path)
    run.refuse_foreign()
    # PyTorch's defaults, which transformers changes while it builds, are the process's
    with _one_at_a_time, run.locked():
        if rows is not None:
            wanted.data = str(run.path / rows_name(rows))
            atomic.write_bytes(Path(wanted.data), rows)
        return run_training(wanted, run, reporter)


def run_training(config: TrainConfig, run: Run, reporter: Reporter | None = None) -> Run:
    """Train in a run directory that the caller holds.

    Raises:
        DoesNotFit: it is planned not to, or memory ran out: names the phase, what is held, the ways
            out.
    """
    promise, trainers = Promise(config, run, _logged(reporter or Reporter(), run)), []
    on_cpu = choose_device(config.device).type == "cpu"
    try:
        # not on a GPU: its driver maps host memory for purposes of its own
        with bounded() if on_cpu else contextlib.nullcontext():
            _run(promise, trainers)
        return run
    except Exception as error:
        if not is_exhaustion(error):
            raise
        message = first_line(error)
        # and with them what the failed computation held
        traceback.clear_frames(error.__traceback__)
    return_freed()
    trainer: Trainer | None = trainers[0] if trainers else None
    learner = promise.monitor.learner
    if learner is not None:
        learner.forget()
    return_freed()
    state = "nothing was trained yet" if trainer is None else trainer.rescue()
    raise exhausted(promise, message, state, learner)


def _logged(reporter: Reporter, run: Run) -> Reporter:
    """The reporter, all of whose lines are in the run's log as well."""

    def say(line: str) -> None:
        run.log(line)
        reporter.say(line)

    def on_step(row: dict[str, Any], total: int) -> None:
        loss = "not finite, skipped" if row["loss"] is None else f"{row['loss']:.4f}"
        run.log(f"step {row['step']}/{total}  loss {loss}")
        reporter.on_step(row, total)

    return replace(reporter, say=say, on_step=on_step)


def _run(promise: Promise, trainers: list["Trainer"]) -> None:
    """Set up and train; the trainer is left in ``trainers`` where there is one."""
    config, run, say = promise.config, promise.run, promise.reporter.say
    set_mmap_threshold(TRAIN_MMAP_THRESHOLD)
    trackers = Trackers(tracker_names(config.report_to), run.path, say)
    interrupts = Interrupts()
    try:
        with interrupts:
            with interrupts.immediate(NOTHING_LOST):
                trainer = Trainer(set_up(promise, trackers), interrupts)
                trainers.append(trainer)
                trainer.before_the_first_step()
            trainer.loop()
            with interrupts.immediate(ONLY_THE_RESULT):
                trainer.finish()
        trainer.refuse_mostly_skipped()
        trainer.publish()
        if line := promise.monitor.line():
            say(line)
    except BaseException as error:
        trackers.close(getattr(error, "exit_code", 1) or 1)
        raise
    trackers.close()


class Trainer:
    """The loop over a complete set-up.

    Attributes:
        done: steps that were made. saved: steps that the newest checkpoint holds.
    """

    def __init__(self, setup: Setup, interrupts: Interrupts | None = None) -> None:
        self.setup, self.interrupts = setup, interrupts or Interrupts()
        self.run, self.promise, self.learner = setup.run, setup.promise, setup.learner
        self.data, self.reporter, self.total_steps = setup.data, setup.reporter, setup.total_steps
        self.recovery = Recovery(self.learner, self.promise, self.interrupts, setup.info)
        self.stepper = Stepper(self.learner, self.promise, self.total_steps, self.recovery)
        self.done = self.saved = setup.start

    def before_the_first_step(self) -> None:
        """Rehearse, evaluate and sample, as far as it was not done before a stop."""
        start = self.setup.start
        if self.promise.config.rehearse and start < self.total_steps:
            self._rehearse(start)
        # a stop can have come between a step and its evaluation
        if self._is_evaluated(start) and not any(
            row["step"] == start for row in self.run.read(EVALS)
        ):
            self.evaluate(start)
        if start == 0:
            self.sample(0)

    def loop(self) -> None:
        """Make the steps that are left, and save where it is due.

        Raises:
            Interrupted: by a signal; the state after the last step is saved.
        """
        setup, per_epoch = self.setup, self.setup.steps_per_epoch
        if setup.start >= self.total_steps:
            self.reporter.say(
                f"nothing left to do: {setup.start} of {self.total_steps} steps are done"
            )
            return
        with attention.packed(self.learner.model, self.learner.abilities.packing):
            epoch, steps = -1, []
            for step in range(setup.start, self.total_steps):
                if step // per_epoch != epoch:
                    epoch = step // per_epoch
                    steps = setup.schedule.epoch(epoch)
                batches = [collate(self.data.train.rows, rows) for rows in steps[step % per_epoch]]
                stopped = self._step(step, batches)
                self._save_if_due(stopped)
                if stopped and self.done != self.total_steps:
                    state = "the state is saved" if self.saved else "nothing was trained yet"
                    raise Interrupted(
                        f"interrupted after step {self.done}; {state}. "
                        "Repeat the command with --resume_from_checkpoint auto to go on",
                        self.interrupts.signal,
                    )

    def _step(self, step: int, batches: list[MicroBatch]) -> bool:
        """One step and its report; returns whether a signal asks to stop."""
        try:
            row = self.stepper.run(step, batches)
            self.done = step + 1
            row["epoch"] = round(self.done / self.setup.steps_per_epoch, 4)
            self._report(row)
        except Abandoned:
            self.learner.forget()
            return True
        return self.interrupts.signal != 0

    def _save_if_due(self, stopping: bool) -> None:
        due = self.done % self.promise.config.save_steps == 0 or self.done == self.total_steps
        if self.done > self.saved and (due or stopping):
            self.save()

    def save(self) -> None:
        """Save the state as it is, after step ``done``."""
        setup = self.setup
        with self._beside_the_steps("save", self.done):
            save_checkpoint(
                self.run, self.learner, self.promise, setup.info, self.done, self.total_steps
            )
        self.saved = self.done

    def rescue(self) -> str:
        """After memory ran out, save a step that was done if nothing was half done; what became of
        it."""
        state = (
            f"the checkpoint of step {self.saved} is as it was"
            if self.saved
            else "nothing was trained yet"
        )
        if self.done > self.saved and not self.stepper.updating:
            with contextlib.suppress(Exception):
                self.save()
                state = f"the state after step {self.done} is saved"
        return state

    def finish(self) -> None:
        """Write the result, and answer the sample questions again."""
        setup = self.setup
        with self._beside_the_steps("save", self.total_steps):
            save_result(self.run, self.learner, self.data.renderer, setup.info, self.promise.config)
        if self.promise.config.judge:
            self.judge()
        if not any(row["step"] == self.total_steps for row in self.run.read(SAMPLES)):
            self.sample(self.total_steps)

    def judge(self) -> None:
        """Hold the run against the model it was made of: into run.json and the card; a result that
        cannot be judged is a result all the same."""
        learner, setup, say = self.learner, self.setup, self.reporter.say
        plan = self.promise.plan
        if plan is not None and "judge" not in plan.phases:
            say("not held against the model it was made of: that takes more memory than planned")
            return
        base = Path(setup.info["base"]["path"])
        try:
            with self._beside_the_steps("judge", self.total_steps):
                judge = Judge(
                    learner.model,
                    OriginalWeights(
                        learner.model, base, [m for _, m in trainable_modules(learner.model)]
                    ),
                    learner.abilities.packing,
                    not self.promise.config.full,
                    max(self._largest_pass(), NEUTRAL_TOKENS),
                )
                tokenizer, progress = self.data.renderer.tokenizer, self.reporter.progress
                found = judge.judge(self.data.held_out, tokenizer, progress)
        except (HalfbyteError, RuntimeError) as error:
            if not isinstance(error, HalfbyteError) and not is_exhaustion(error):
                raise
            say(f"not judged beside the model it was made of: {first_line(error)}")
            return
        setup.info["judged"] = found.as_dict()
        save_judgement(self.run, setup.info)
        for line in words(found):
            say(line)

    def refuse_mostly_skipped(self) -> None:
        """Raise NonFiniteError where most of the steps were left out: what is there is as good as
        untrained."""
        skipped = len(self.run.read(NONFINITE))
        if 2 * skipped > self.total_steps:
            raise NonFiniteError(
                f"{skipped} of {self.total_steps} steps were not finite and were left out; what "
                f"the others made is in {self.run.adapter}",
                where=str(self.run.path / NONFINITE),
                ways_out=["lower --learning_rate", "--dtype float32", "look at the rows it names"],
            )

    def publish(self) -> None:
        """Upload the result, where that was asked for."""
        publish_result(self.run, self.promise, self.setup.repository, self.total_steps)

    def _rehearse(self, start: int) -> None:
        began, config = time.perf_counter(), self.promise.config
        batch, _ = largest_pass(self.data.train.rows, self.setup.schedule, config.tokens_per_pass)
        with self.promise.monitor.phase("rehearsal", start):
            held_out = largest_group(self.data.held_out)
            again = functools.partial(
                rehearse, self.learner, batch, held_out, self.run.path, config.model
            )
            self.recovery.with_less(start, [batch], again)
        return_freed()
        self.reporter.say(
            f"rehearsed: the largest pass ({len(batch.input_ids):,} tokens) and a save go through "
            f"({time.perf_counter() - began:.1f} s)"
        )

    def _report(self, row: dict[str, Any]) -> None:
        """A finished step into the run's files and onto the screen; evaluated where it is due."""
        done = row["step"]
        since = self.learner.since_logged
        since.append(row["loss"])
        if row["loss"] is not None and self.setup.info.get("first_loss") is None:
            self.setup.info["first_loss"] = row["loss"]
            self.run.write_info(self.setup.info)
        if done % self.promise.config.logging_steps == 0 or done == self.total_steps:
            finite = [loss for loss in since if loss is not None]
            # the mean since the row before, as transformers logs it
            logged = {**row, "loss": math.fsum(finite) / len(finite) if finite else None}
            if skipped := len(since) - len(finite):  # of which that mean knows nothing
                logged["skipped"] = skipped
            since.clear()
            self.run.append(METRICS, logged)
            self.setup.trackers.log(logged)
        self.reporter.on_step(row, self.total_steps)
        if self._is_evaluated(done):
            with self.interrupts.immediate(""):
                self.evaluate(done)

    @contextlib.contextmanager
    def _beside_the_steps(self, name: str, step: int) -> Iterator[None]:
        """A phase of its own, which begins without what the steps keep for each other."""
        return_freed()
        with self.promise.monitor.phase(name, step):
            yield
        forget_casts(self.learner.model)

    def _largest_pass(self) -> int:
        """Tokens of the largest pass of a step."""
        config = self.promise.config
        rows, schedule = self.data.train.rows, self.setup.schedule
        return len(largest_pass(rows, schedule, config.tokens_per_pass)[0].input_ids)

    def _is_evaluated(self, done: int) -> bool:
        every = self.promise.config.eval_steps
        return done in (0, self.total_steps) or bool(every and done % every == 0)

    def evaluate(self, step: int) -> None:
        """Loss on the held-out rows, where there are any: a row of eval.jsonl."""
        if not (rows := self.data.held_out):
            return
        model, packed = self.learner.model, self.learner.abilities.packing
        with self._beside_the_steps("eval", step):
            loss, tokens = mean_loss(model, rows, packed=packed, progress=self.reporter.progress)
        perplexity = math.exp(min(loss, 700)) if math.isfinite(loss) else None
        finite = loss if perplexity is not None else None
        row = {"step": step, "loss": finite, "perplexity": perplexity, "tokens": tokens}
        self.run.append(EVALS, row)
        self.setup.trackers.log(row, "eval")
        shown = (
            "not finite" if perplexity is None else f"loss {loss:.3f}, perplexity {perplexity:.1f}"
        )
        self.reporter.say(f"held out: {shown} after {step} steps")

    def sample(self, step: int) -> None:
        """Ask the same questions before and after training: rows of samples.jsonl."""
        renderer = self.data.renderer
        asked = self.data.questions(self.promise.config.num_samples)
        if not asked:
            return
        with self._beside_the_steps("samples", step):
            found = answers(
                self.learner.model,
                renderer,
                [ids for _, ids, _ in asked],
                SAMPLE_TOKENS,
                SAMPLE_SECONDS,
                at_once=self._largest_pass(),
            )
        for (row, ids, wanted), said in zip(asked, found, strict=True):
            question = renderer.tokenizer.decode(ids, skip_special_tokens=True).strip()
            sample = {"step": step, "where": row.where, "question": question, "expected": wanted}
            sample |= {"asked": last_asked(row.example), "answer": said.text}
            self.run.append(SAMPLES, {**sample, "stopped": said.stopped})

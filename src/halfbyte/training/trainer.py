"""Training: one optimizer step is one paragraph (`Trainer.step`).

The loss of a step is the sum of cross-entropy over all supervised tokens of the global batch, divided by their number:
how the batch is cut into micro-batches cannot change it. Whatever is random is a function of (seed, epoch, step,
micro-batch, layer), so a resumed run goes on exactly as it would have.

Everything that can fail for a reason outside the model (options, output directory, data, template) is checked before
the weights are read.
"""

import contextlib
import functools
import hashlib
import math
import os
import platform
import shutil
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ..adapters.initial import begin_with_adapter
from ..adapters.lora import lora_layers, target_names
from ..adapters.peft_files import restore_adapter, save_adapter
from ..config.hf_objects import config_of
from ..config.options import FITTED, MAY_CHANGE_BITS, OF_ADAPTER, TrainConfig
from ..data.batches import MicroBatch, collate, largest_pass
from ..data.dataset import data_lines, read_data, schedule_of, source_digest
from ..engine.evaluate import largest_group, mean_loss
from ..engine.generate import answers
from ..engine.learner import Learner
from ..engine.lr_schedule import learning_rate
from ..engine.reductions import LEAST_TILE, TILE
from ..engine.selftest import recomputed_line, self_test
from ..errors import (
    BusyError,
    DoesNotFit,
    HalfbyteError,
    Interrupted,
    ModelError,
    NonFiniteError,
    StorageError,
    UsageError,
    is_exhaustion,
)
from ..files import atomic, hub
from ..files.model_config import read_config
from ..files.publish import publish, reserve
from ..memory.process import LASTING, PASSING, allocate_apart, bounded, headroom, return_freed
from ..model import attention
from ..model.architecture import build_empty, choose_device, choose_dtype
from ..model.fusion import fuse
from ..ops import cpu, gpu
from ..planning.budget import gib
from ..planning.dry_run import CannotPlan
from ..planning.memory_plan import MemoryPlan, in_words, settled_in_words
from ..planning.monitor import Watch
from ..planning.resident import resident, sizes
from ..planning.search import Planner, ways_in_words
from ..progress import Reporter
from ..quantization.load import load_base
from ..quantization.weights import QuantReport
from ..run import checkpoint
from ..run.card import CARD, adapter_card
from ..run.directory import ADAPTER_FACTS, EVALS, MEMORY, METRICS, NONFINITE, PLAN_JSON, SAMPLES, Run
from ..run.fingerprint import changes_since, fingerprint
from ..run.load import refuse_foreign_adapter, refuse_other_base
from .interrupts import NOTHING_LOST, ONLY_THE_RESULT, Abandoned, Interrupts
from .recovery import Result
from .rehearsal import DIRECTORY, rehearse
from .saving import _generation_config
from .setup import _absolute, _loaded_line
from .trackers import Trackers, tracker_names

SAMPLE_TOKENS, SAMPLE_SECONDS = 96, 60.0
"""Longest sample answer, and the time after which sampling is cut off."""


def train(*config: Any, reporter: Reporter | None = None, **options: Any) -> Run:
    """Fine-tune a model as the configuration says; returns the run directory.

    Args:
        config: a `TrainConfig`; or a model and a data file, then whatever there is of ``BitsAndBytesConfig``,
            ``LoraConfig`` and ``SFTConfig`` or ``TrainingArguments``. options: by name, above all others.

    Raises:
        HalfbyteError: with the exit code of the command line.
    """
    # the reporter was the second argument once
    reporter = reporter or next((thing for thing in config if isinstance(thing, Reporter)), None)
    wanted = config_of(TrainConfig, tuple(thing for thing in config if not isinstance(thing, Reporter)), options)
    if "kernels" in wanted.model_fields_set:
        cpu.use(wanted.kernels)  # the plan and the record are of what will compute
    run = Run(Path(wanted.output_dir).expanduser())
    atomic.check_writable(run.path)
    with run.locked():
        return Trainer(wanted, run, reporter).run_all()


class Trainer:
    """Sets the pieces up in the order in which they can fail, then loops."""

    def __init__(self, config: TrainConfig, run: Run, reporter: Reporter | None = None) -> None:
        self.config, self.run, self.reporter = config, run, reporter or Reporter()
        self.total_steps = config.max_steps
        self.interrupts = Interrupts()
        self.clock: datetime | None = None
        self.planner: Planner | None = None
        self.plan: MemoryPlan | None = None
        self.forced: MemoryPlan | None = None
        self.watch = Watch(torch.device("cpu"), {}, lambda row: None, self.reporter.say)
        self.settled = self.updating = False
        self.done = self.saved = 0
        self.found: dict[str, str] = {}
        self.info: dict[str, Any] = {}
        self.given = {name: getattr(config, name) for name in MAY_CHANGE_BITS}
        self.foresees = True
        self.repository = ""
        self.trackers = Trackers([], run.path, self.reporter.say)

    def run_all(self) -> Run:
        """The whole training.

        Raises:
            DoesNotFit: it is planned not to, or memory ran out: names the phase, what is held and the ways out.
        """
        try:
            # not on a GPU: its driver maps host memory for purposes of its own
            with bounded() if choose_device(self.config.device).type == "cpu" else contextlib.nullcontext():
                try:
                    return self._run_all()
                finally:
                    self.trackers.close()
        except Exception as error:
            if not is_exhaustion(error):
                raise
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            traceback.clear_frames(error.__traceback__)  # and with them what the failed computation held
        raise self._exhausted(message)

    def _run_all(self) -> Run:
        allocate_apart(PASSING)
        with self.interrupts:
            with self.interrupts.immediate(NOTHING_LOST):
                start = self._set_up()
                if self.config.rehearse and start < self.total_steps:
                    self._rehearse(start)
                # a stop can have come between a step and its evaluation
                if self._is_evaluated(start) and not any(row["step"] == start for row in self.run.read(EVALS)):
                    self._evaluate(start)
                if start == 0:
                    self._sample(0)
            self._loop(start)
            with self.interrupts.immediate(ONLY_THE_RESULT):
                self.watch.now = "writing the result"
                self._save_result()
                if not any(row["step"] == self.total_steps for row in self.run.read(SAMPLES)):
                    self._sample(self.total_steps)
        self._publish()
        if line := self.watch.line():
            self.reporter.say(line)
        return self.run

    def _exhausted(self, message: str) -> DoesNotFit:
        """The error for memory that ran out. A step that was done is saved, if nothing was half done."""
        phase, learner = self.watch.now, self.watch.learner
        state = "nothing was trained yet" if not self.saved else f"the checkpoint of step {self.saved} is as it was"
        if learner is not None:
            learner.forget()
        return_freed()
        if learner is not None and self.done > self.saved and not self.updating:
            with contextlib.suppress(Exception):
                self._save(self.done)
                state = f"the state after step {self.done} is saved"
        held = {} if learner is None else sizes(resident(learner))
        largest = sorted(held.items(), key=lambda item: -item[1])[:4]
        ways = [] if self.plan is None or self.planner is None else ways_in_words(self.plan, self.planner)
        if not ways and self.forced is not None:  # there may be no memory to plan in: what is left of the first ways
            left = [c for c in self.forced.choices if any(getattr(self.config, k) != v for k, v in c.change.items())]
            ways = in_words(replace(self.forced, choices=tuple(left)))
        found = f"{message}; held: {', '.join(f'{part} {gib(size)}' for part, size in largest)}" if held else message
        return DoesNotFit(
            f"out of memory in this phase: {phase}; {state}",
            where=str(self.run.path / MEMORY),
            found=found[:600],
            ways_out=[*ways, "close what else uses memory", "or a smaller model"],
            plan=None if self.plan is None else self.plan.as_dict(),
        )

    def _set_up(self) -> int:
        """Everything before the first step, in the order in which it can fail; returns the steps already done."""
        config, say = self.config, self.reporter.say
        self.trackers = Trackers(tracker_names(config.report_to), self.run.path, say)
        resumed = self._find_checkpoint()
        if config.push_to_hub:
            self.repository = reserve(config.hub_model_id, config.hub_private_repo)
        base_path = hub.resolve(config.model, config.revision)
        if resumed is None:
            config = self.config = begin_with_adapter(config, base_path)
        elif config.adapter_name_or_path:  # what the run was begun with need not be there any more
            before = self.run.config()
            config = self.config = config.model_copy(update={name: getattr(before, name) for name in OF_ADAPTER})
        # a template that asks for the time sees the run's, so that a resumed run has the same ids
        self.clock = self.run.clock() if resumed else datetime.now()
        self.read_data(base_path)
        self._make_plan(base_path, resumed)
        config = self.config
        self.schedule = schedule_of(config, self.data)
        self.steps_per_epoch = len(self.schedule.epoch(0))
        if config.max_steps < 0:
            self.total_steps = math.ceil(config.num_train_epochs * self.steps_per_epoch)
        info = self._info(base_path)
        changes: list[str] = []
        start = 0
        allowed = {name.strip().replace("-", "_") for name in config.allow_change.split(",") if name.strip()}
        if resumed is not None:
            changes = changes_since(checkpoint.read_state(resumed), info, allowed)
            was = checkpoint.read_state(resumed).get("cut", {}).get("now", {})
            for name in sorted(was):
                if was[name] != (now := getattr(config, name)):
                    changes.append(f"{name}: {was[name]} then, {now} now")
        with self.watch.phase("load", start):
            report = self.build_model(base_path, begin=resumed is None)
        self.watch.learner = self.learner
        info["base"]["digest"], info["found"] = report.digest, self.found
        info["identity"] = uuid.uuid4().hex[:8]  # of the run, for trackers; none of its numbers depends on it
        if resumed is not None:
            before = checkpoint.read_state(resumed)["base_digest"]
            if "base" not in allowed:
                refuse_other_base(report.digest, before, str(base_path), "--allow_change base")
            elif before != report.digest:
                changes.append(f"base: digest {before[:16]} then, {report.digest[:16]} now")
            start = self._go_on(resumed, info, changes)
        one = checkpoint.bytes_needed(self.learner.model, self.learner.optimizer)
        checkpoint.refuse_full_disk(self.run.checkpoints, one, config.save_total_limit + bool(self.data.held_out))
        self.info = info
        self.run.write_info(info)
        atomic.write_json(self.run.path / "quant.json", report.as_dict())
        for file in (METRICS, EVALS, SAMPLES, NONFINITE, MEMORY):
            self.run.cut(file, start if resumed else -1)
        checkpoint.remove_unfinished(self.run.checkpoints)
        for leftover in (*self.run.path.glob(".adapter.*.tmp"), self.run.path / DIRECTORY):
            shutil.rmtree(leftover, ignore_errors=True)
        for row in self.measured:
            self.run.append(MEMORY, row)
        self.watch.append = lambda row: self.run.append(MEMORY, row)
        self.done = self.saved = start
        self.trackers.start(info["config"], start, info["identity"])
        return start

    def _go_on(self, resumed: checkpoint.Found, info: dict[str, Any], changes: list[str]) -> int:
        """Bring the learner to a checkpoint's state, and into ``info`` what the run has been; the steps it has done."""
        state, was, scale = checkpoint.read_state(resumed), self.run.info(), self.learner.scale
        self.learner.updates = checkpoint.restore(resumed, self.learner.model, self.learner.optimizer)
        scale.value, scale.good = state.get("loss_scale", (scale.value, scale.good))
        start = resumed.step
        # of what memory made of the run, what came after this checkpoint is undone with its steps
        earlier = [c for c in was.get("changes", []) if c["step"] < start or not c.get("by_memory")]
        info["changes"] = earlier + [{"step": start, "change": line} for line in changes]
        info["identity"] = was.get("identity", info["identity"])
        self.reporter.say(f"resumed from step {start} ({resumed.path}): {self._exactness(changes, earlier)}")
        return start

    def _make_plan(self, base_path: Path, resumed: checkpoint.Found | None) -> None:
        """Plan the memory; with ``fit_to`` take the options that fit, on a resume the ones the run began with.

        Raises:
            DoesNotFit: it does not, and ``force`` is not given.
        """
        say = self.reporter.say
        if resumed is not None:
            self._cut_as_before(checkpoint.read_state(resumed).get("cut"))
        config = self.config
        if resumed is not None and config.fit_to:
            before = self.run.config()
            # what is kept changes no result, and is settled anew
            kept = {"kept_activations", "kept_layers"}
            self._change({name: getattr(before, name) for name in FITTED if name not in kept})
        self.measured: list[dict[str, Any]] = []
        device = choose_device(config.device)
        self.watch = Watch(device, {}, self.measured.append, say)
        self.planner = planner = Planner(base_path, self.config, self.data, self.reporter.progress)
        if planner.budget.device != device.type:
            raise UsageError(
                f"--fit_to {config.fit_to} is a GPU, and this training would run on {device.type}",
                ways_out=[
                    "train where the card is",
                    "`halfbyte plan` plans for it from here",
                    "--fit_to 16GiB, or without",
                ],
            )
        try:
            if config.fit_to and resumed is None:
                plan = planner.fit()
                if plan.fits:
                    self._change(plan.choices[0].change)
                    planner.config, planner.data = self.config, self.data
                    say(f"to fit {config.fit_to}: {plan.choices[0].flags()}")
            else:
                change, plan = planner.settle()
                self._change(change)
                planner.config = self.config
                for line in settled_in_words(change):
                    say(line)
        except CannotPlan as error:
            if config.fit_to:
                raise
            say(f"{error.what} ({error.found}): it is measured instead")
            self.planner = None
            return
        if not plan.fits:
            plan = plan if plan.choices else replace(plan, choices=planner.ways_out(plan))
            if not config.force:
                plan.check()
            self.forced = plan
            say("the plan does not fit, and is forced")
        there = f" of {gib(plan.budget_bytes)}" if plan.budget_bytes else ""
        say(f"the plan: {gib(plan.peak_bytes)}{there} at the peak, {plan.tokens:,} tokens in the largest pass")
        self._promise(plan)

    def _promise(self, plan: MemoryPlan) -> None:
        """This plan is the one that is measured against."""
        self.plan = plan
        atomic.write_json(self.run.path / PLAN_JSON, plan.as_dict())
        self.watch.planned = plan.measurable()

    def _cut_as_before(self, cut: dict[str, dict[str, int]] | None) -> None:
        """How passes were cut at the checkpoint, unless the command asks for something else than it did then: what
        memory made of the run stays so."""
        if cut is not None:
            same = [name for name in MAY_CHANGE_BITS if cut["given"].get(name) == self.given[name]]
            self._change({name: cut["now"][name] for name in same})

    def _change(self, options: dict[str, Any]) -> None:
        """Train with other options than were given; shorter rows are read anew."""
        shorter = options.get("max_length", self.config.max_length) < self.config.max_length
        self.config = self.config.model_copy(update=options)
        if shorter:
            self.read_data(hub.resolve(self.config.model, self.config.revision))

    def _rehearse(self, start: int) -> None:
        began = time.perf_counter()
        batch, _ = largest_pass(self.data.train.rows, self.schedule, self.config.tokens_per_pass)
        with self.watch.phase("rehearsal", start):
            held_out = largest_group(self.data.held_out)
            again = functools.partial(rehearse, self.learner, batch, held_out, self.run.path, self.config.model)
            self._with_less(start, [batch], again)
        return_freed()
        self.reporter.say(
            f"rehearsed: the largest pass ({len(batch.input_ids):,} tokens) and a save go through "
            f"({time.perf_counter() - began:.1f} s)"
        )

    def _exactness(self, changes: list[str], earlier: list[dict[str, Any]]) -> str:
        """What a resumed run promises."""
        if changes:
            return "it will not end as the unbroken run would have: " + "; ".join(changes)
        if earlier:
            return "it goes on as the run did, which changed on its way: " + "; ".join(c["change"] for c in earlier)
        if self.learner.device.type != "cpu":
            return "not bit-exact: some of this device's kernels add in no fixed order"
        return "it will end with the same bytes as an unbroken run"

    # --- before the model ---

    def _find_checkpoint(self) -> checkpoint.Found | None:
        """The checkpoint to go on from; refuses an older run's directory unless asked to resume."""
        found, damaged = checkpoint.newest(self.run.checkpoints)
        for line in damaged:
            self.reporter.say(f"skipped a damaged checkpoint: {line}")
        if self.config.resume_from_checkpoint is None:
            if found or damaged or self.run.adapter.exists():
                raise BusyError(
                    f"{self.run.path} already holds a run",
                    ways_out=[
                        "continue it with --resume_from_checkpoint auto",
                        "or choose another --output_dir; the older run is left as it is",
                    ],
                )
            return None
        if found is None and (damaged or self.run.adapter.exists()):
            raise ModelError(
                f"{self.run.path} has no valid checkpoint to resume from, and is not begun anew over what is there",
                found="; ".join(damaged) or f"a finished adapter in {self.run.adapter}",
                ways_out=["train into another --output_dir", "or move these files away, if they are not wanted"],
            )
        return found

    def read_data(self, base_path: Path) -> None:
        """Rows, renderer and counts; shows what was decided. Needs no weights."""
        config, say = self.config, self.reporter.say
        if not config.full:
            # raises now rather than after loading
            target_names(build_empty(read_config(base_path)), config.target_modules)
        self.data = read_data(
            config.data, config, base_path, say=say, progress=self.reporter.progress, clock=self.clock
        )
        for line in data_lines(self.data):
            say(line)
        self.reporter.show_row(self.data.renderer.pieces(self.data.train.rows[0]))

    def _info(self, base_path: Path) -> dict[str, Any]:
        device = choose_device(self.config.device)
        return {
            "schema": 1,
            "config": self.config.model_dump(),
            "base": {"name": self.config.model, "path": str(base_path.resolve())},
            "compute_dtype": str(choose_dtype(self.config.dtype, device)).removeprefix("torch."),
            "data": {
                "source": _absolute(self.config.data),
                "sha256": source_digest(self.config.data, self.data.examples.values()),
                "form": self.data.form,
                **self.data.counts(),
            },
            "template_sha256": self.data.renderer.template_sha256,
            "tokenizer_sha256": hashlib.sha256(
                self.data.renderer.tokenizer.backend_tokenizer.to_str().encode()
            ).hexdigest(),
            "total_steps": self.total_steps,
            "clock": self.data.renderer.clock.isoformat(),
            "changes": [],
            "versions": {name: metadata.version(name) for name in ("halfbyte", "torch", "transformers", "safetensors")},
            "machine": {
                "platform": platform.platform(),
                "device": torch.cuda.get_device_name(device)
                if device.type == "cuda"
                else f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
                "threads": torch.get_num_threads(),
                "kernel_path": cpu.path_in_use() if device.type == "cpu" else gpu.path_in_use(),
            },
        }

    # --- the model ---

    def build_model(self, base_path: Path, begin: bool = True) -> QuantReport:
        """Load, test, adapt: everything `step` needs. begin: with the adapter that is named, if one is."""
        allocate_apart(LASTING)
        model, report = load_base(base_path, self.config, self.reporter.progress)
        named = self.config.adapter_name_or_path if begin else None
        adapter = None if named is None else hub.resolve_adapter(named)
        if adapter is not None and not self.config.allow_other_base:
            refuse_foreign_adapter(adapter, report.digest, str(base_path))
        self.reporter.say(_loaded_line(model, report.coverage, self.config.load_in_4bit))
        on_gpu = next(model.parameters()).device.type == "cuda"
        fused = fuse(model).line() if on_gpu or cpu.active() is not None else ""
        self.reporter.say(f"kernels: {gpu.why() if on_gpu else cpu.why()}")
        if fused:
            self._note("fused", fused)
        abilities = self_test(model)
        if not abilities.packing:
            self.reporter.say("rows are run one at a time: this model does not keep rows of one sequence apart")
        self.learner = Learner(model, self.config, abilities, self._note)
        if adapter is not None:
            restore_adapter(model, adapter)
        count = sum(p.numel() for p in self.learner.trained)
        self.reporter.say(f"training {count:,} parameters of {sum(p.numel() for p in model.parameters()):,}")
        return_freed()
        allocate_apart(PASSING)
        return report

    def _note(self, what: str, line: str) -> None:
        """Say what was found out about the model, and keep it for run.json."""
        self.reporter.say(line)
        self.found[what] = line

    def _publish(self) -> None:
        if self.config.push_to_hub:
            name, step = self.config.hub_model_id, self.total_steps
            to = "hf" if self.config.full else "peft"
            again = f"halfbyte export {self.run.path} --to {to} -o DIR --push_to_hub --hub_model_id {name}"
            where = publish(self.run.adapter, self.repository, f"{step} steps with halfbyte", again)
            self.reporter.say(f"published: {where}")

    # --- the loop ---

    def _loop(self, start: int) -> None:
        if start >= self.total_steps:
            self.reporter.say(f"nothing left to do: {start} of {self.total_steps} steps are done")
            return
        packed = attention.segments(self.learner.model) if self.learner.abilities.packing else contextlib.nullcontext()
        with packed:
            epoch, steps = -1, []
            for step in range(start, self.total_steps):
                if step // self.steps_per_epoch != epoch:
                    epoch = step // self.steps_per_epoch
                    steps = self.schedule.epoch(epoch)
                batches = [collate(self.data.train.rows, rows) for rows in steps[step % self.steps_per_epoch]]
                stopped = None
                try:
                    row = self.step(step, batches)
                    self.done = step + 1
                    row["epoch"] = round(self.done / self.steps_per_epoch, 4)
                    self._report(row)
                except Abandoned as error:
                    stopped = error
                    self.learner.forget()
                done = self.done
                last, stopping = done == self.total_steps, stopped is not None or self.interrupts.signal != 0
                if done > self.saved and (done % self.config.save_steps == 0 or last or stopping):
                    self._save(done)
                    self.saved = done
                if not last and stopping:
                    state = "the state is saved" if self.saved else "nothing was trained yet"
                    raise Interrupted(
                        f"interrupted after step {done}; {state}. "
                        "Repeat the command with --resume_from_checkpoint auto to go on",
                        self.interrupts.signal,
                    )

    def _report(self, row: dict[str, Any]) -> None:
        """A finished step into the run's files and onto the screen; evaluated where it is due."""
        done, config = row["step"], self.config
        if done % config.logging_steps == 0 or done == self.total_steps:
            self.run.append(METRICS, row)
            self.trackers.log(row)
        self.reporter.on_step(row, self.total_steps)
        if self._is_evaluated(done):
            with self.interrupts.immediate(""):
                self._evaluate(done)

    def _is_evaluated(self, done: int) -> bool:
        every = self.config.eval_steps
        return done in (0, self.total_steps) or bool(every and done % every == 0)

    def step(self, step: int, batches: list[MicroBatch]) -> dict[str, Any]:
        """One optimizer step over a global batch; returns its row of metrics.jsonl."""
        began = time.perf_counter()
        phase = "step" if self.settled else "first step"
        self.watch.now = f"step {step + 1}"
        self.watch.peak.restart()
        supervised = sum(batch.supervised for batch in batches)
        learner = self.learner
        with self.interrupts.immediate(""):  # nothing but gradients changes in here, and they are thrown away
            while True:
                losses = self._with_less(step, batches, lambda: self._gradients(step, batches, supervised))
                total = torch.zeros((), device=learner.device)
                for loss in losses:
                    total += loss
                mean_loss = float(total) / supervised
                norm = float(learner.clip())
                if math.isfinite(norm) or not math.isfinite(mean_loss) or not learner.scale.lower():
                    break
                self.reporter.say(f"step {step + 1}: gradients overflow in fp16; loss scale {learner.scale.value:g}")
                learner.forget()  # and the same rows again
        rate = learning_rate(self.config, step, self.total_steps)
        if finite := self._is_finite(step, mean_loss, norm, batches):
            self.updating = True
            learner.update(rate)
            self.updating = False
            learner.scale.stay()
        learner.forget()
        peak = self.watch.peak.bytes()
        self.watch.note(phase, step + 1, peak)
        if not self.settled:
            return_freed()  # what the first step took before its lasting blocks had their places
            self.settled = True
        seconds, tokens = time.perf_counter() - began, sum(len(batch.input_ids) for batch in batches)
        return {
            "step": step + 1,
            "loss": mean_loss if finite else None,
            "lr": rate,
            "grad_norm": norm if finite else None,
            **({"loss_scale": learner.scale.value} if learner.scale.active else {}),
            "tokens": tokens,
            "supervised_tokens": supervised,
            "tokens_per_s": round(tokens / seconds, 2),
            "passes": len(losses),
            "memory_bytes": peak,
            "memory_planned_bytes": self.watch.planned.get("step"),
        }

    def _gradients(self, step: int, batches: list[MicroBatch], supervised: int) -> list[torch.Tensor]:
        """The step's gradients, added to zeros; the summed loss of each pass."""
        losses = []
        for number, batch in enumerate(batches):
            self._make_room(step, batch)
            losses += self.learner.accumulate(batch, supervised, step, number)
        return losses

    # --- a step that cannot run out ---

    def _make_room(self, step: int, batch: MicroBatch) -> None:
        """Before a micro-batch for which too little memory is left, go on with less."""
        while self.plan is not None:
            largest = max(len(part.input_ids) for _, part in self.learner.parts(batch))
            run, left = self.learner.recompute, headroom(self.learner.device)
            need = self.plan.live_bytes(largest) - (0 if run is None else run.inputs.held_bytes)
            if left is None or need <= left or not self.foresees:
                return
            if not self._take_less(step, [batch], f"{largest:,} tokens need {gib(need)} and {gib(left)} are left"):
                return  # it may do all the same

    def _with_less(self, step: int, batches: list[MicroBatch], work: Callable[[], Result]) -> Result:
        """Work that changes nothing but gradients. Where memory runs out, it is begun anew with less.

        Raises:
            MemoryError: it ran out, and there is nothing left to do with less.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if not is_exhaustion(error):
                    raise
                message = (str(error).strip() or type(error).__name__).splitlines()[0]
                traceback.clear_frames(error.__traceback__)  # and with them what the failed computation held
            self.learner.forget()
            return_freed()
            if not self._take_less(step, batches, f"memory ran out ({message[:120]})"):
                raise MemoryError(message)

    def _take_less(self, step: int, batches: list[MicroBatch], why: str) -> bool:
        """Make one change by which a training needs less memory, the cheapest that is left; False if none is.

        It is said, and written to memory.jsonl; one that may change last bits also to run.json.
        """
        with self.interrupts.noted():  # none of it is left half done
            return self._take_one_less(step, batches, why)

    def _take_one_less(self, step: int, batches: list[MicroBatch], why: str) -> bool:
        learner = self.learner
        parts = [part for batch in batches for _, part in learner.parts(batch)]
        largest = max(len(part.input_ids) for part in parts)
        change: dict[str, Any]
        if self._if_the_disk_lets(learner.page_out):
            change, now = {"paging": "always"}, "the optimizer's states leave memory"
        elif learner.dequantize_one_by_one():
            change, now = {"dequantized_weights": "product"}, "no weight stays dequantized beyond its product"
        elif learner.offload_embedding():
            change, now = {"embedding_offloading": "always"}, "the embedding table lies in host memory"
        elif learner.keep_less():
            change, now = {"kept_activations": "none"}, "layers keep their inputs alone"
        elif self._if_the_disk_lets(learner.offload):
            change, now = {"activation_offloading": "always"}, "layer inputs wait elsewhere"
        elif learner.abilities.packing and any(len(part.rows) > 1 for part in parts):
            learner.tokens_per_pass = largest // 2
            change = {"tokens_per_pass": learner.tokens_per_pass}
            now = f"micro-batches go through the model in parts of at most {learner.tokens_per_pass:,} tokens"
        elif (tile := self._smaller_tile(largest)) >= LEAST_TILE and learner.tile(tile):
            change, now = {"tokens_per_tile": tile}, f"MLPs run on {tile:,} tokens at a time"
        else:
            return False
        self.reporter.say(f"step {step + 1}: {why}; from here on {now}")
        self.watch.append({"phase": "less", "step": step + 1, "why": why, "change": change})
        self._change(change)
        if change.keys() & MAY_CHANGE_BITS:
            ((name, value),) = change.items()
            line = f"{name}: {value} from here on, for {why}"
            self.info.setdefault("changes", []).append({"step": step, "change": line, "by_memory": True})
        if learner.recompute is not None:
            self.found["recomputed"] = recomputed_line(learner.recompute)
        if "base" in self.info:
            self.info["config"] = self.config.model_dump()
            self.run.write_info(self.info)
        self._plan_again()
        return True

    def _smaller_tile(self, largest: int) -> int:
        now = self.learner.tokens_per_tile
        return now // 2 if now else min(TILE, largest // 2)

    def _if_the_disk_lets(self, change: Callable[[], bool]) -> bool:
        try:
            return change()
        except StorageError as error:
            self.reporter.say(f"{error.what}: left as it is")
            return False

    def _plan_again(self) -> None:
        """What is needed now, after a change. Where it cannot be planned nothing is foreseen from here on."""
        if self.planner is None:
            return
        self.planner.config = self.config
        try:
            self._promise(self.planner.plan())
        except (HalfbyteError, RuntimeError, MemoryError):
            self.foresees = False

    def _is_finite(self, step: int, loss: float, norm: float, batches: list[MicroBatch]) -> bool:
        """Whether the update may be made. A step that may not is written to nonfinite.jsonl with its rows.

        Raises:
            NonFiniteError: it may not, and ``on_nonfinite`` is stop.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        rows = [where for batch in batches for where in batch.rows]
        self.run.append(NONFINITE, {"step": step + 1, "loss": str(loss), "grad_norm": str(norm), "rows": rows})
        what = f"step {step + 1} gave loss {loss} and gradient norm {norm}; the parameters were not updated"
        if self.config.on_nonfinite == "skip":
            self.reporter.say(f"{what} (skipped; {len(self.run.read(NONFINITE))} so far)")
            return False
        raise NonFiniteError(
            what,
            where=", ".join(rows[:8]) + (f" and {len(rows) - 8} more rows" if len(rows) > 8 else ""),
            ways_out=[
                "lower --learning_rate",
                f"look at these rows, all listed in {self.run.path / NONFINITE}",
                "--on_nonfinite skip leaves such steps out",
                "a checkpoint saved before is unharmed: --resume_from_checkpoint auto goes on from it",
            ],
        )

    def _evaluate(self, step: int) -> None:
        """Loss on the held-out rows, where there are any: a row of eval.jsonl."""
        if not (rows := self.data.held_out):
            return
        learner, show = self.learner, self.reporter.progress
        with self.watch.phase("eval", step):
            loss, tokens = mean_loss(learner.model, rows, packed=learner.abilities.packing, progress=show)
        perplexity = math.exp(min(loss, 700)) if math.isfinite(loss) else None
        finite = loss if perplexity is not None else None
        row = {"step": step, "loss": finite, "perplexity": perplexity, "tokens": tokens}
        self.run.append(EVALS, row)
        self.trackers.log(row, "eval")
        shown = "not finite" if perplexity is None else f"loss {loss:.3f}, perplexity {perplexity:.1f}"
        self.reporter.say(f"held out: {shown} after {step} steps")

    def _sample(self, step: int) -> None:
        """The same questions before and after training: rows of samples.jsonl."""
        asked = []
        for row in self.data.held_out + self.data.train.rows:
            if len(asked) >= self.config.num_samples:
                break
            if pair := self.data.question(row):
                asked.append((row, *pair))
        if not asked:
            return
        self.watch.now = f"sampling, step {step}"
        found = answers(
            self.learner.model, self.data.renderer, [ids for _, ids, _ in asked], SAMPLE_TOKENS, SAMPLE_SECONDS
        )
        for (row, ids, wanted), said in zip(asked, found, strict=True):
            question = self.data.renderer.tokenizer.decode(ids, skip_special_tokens=True).strip()
            sample = {"step": step, "where": row.where, "question": question, "expected": wanted}
            self.run.append(SAMPLES, {**sample, "answer": said.text, "stopped": said.stopped})

    def _save(self, step: int) -> None:
        state = {
            "total_steps": self.total_steps,
            "updates": self.learner.updates,
            "loss_scale": [self.learner.scale.value, self.learner.scale.good],
            "cut": {"given": self.given, "now": {name: getattr(self.config, name) for name in MAY_CHANGE_BITS}},
            "base_digest": self.info["base"]["digest"],
            "fingerprint": fingerprint(self.info),
        }
        keep = self.config.save_total_limit
        there = {path.name for path in checkpoint.directories(self.run.checkpoints)} | {f"step-{step:08d}"}
        rows = [row for row in self.run.read(EVALS) if f"step-{row['step']:08d}" in there]
        losses = {row["step"]: row["loss"] for row in rows if row["loss"] is not None}
        best = min(losses, key=lambda done: losses[done]) if losses else None
        learner, base = self.learner, self.config.model
        with self.watch.phase("save", step):
            checkpoint.save(self.run.checkpoints, step, learner.model, learner.optimizer, state, keep, base, best)

    def _save_result(self) -> None:
        """adapter/: what other tools load (a full fine-tuning: the whole model), whole or not there."""
        target = self.run.path / f".adapter.{os.getpid()}.tmp"
        try:
            target.mkdir(exist_ok=True)
            if any(True for _ in lora_layers(self.learner.model)):
                save_adapter(self.learner.model, target, self.config.model)
            else:
                self.learner.model.save_pretrained(target)
            tokenizer = self.data.renderer.tokenizer
            tokenizer.chat_template = self.data.renderer.template
            tokenizer.save_pretrained(target)
            facts = {"base_digest": self.info["base"]["digest"], "template_sha256": self.info["template_sha256"]}
            atomic.write_json(target / ADAPTER_FACTS, facts)
            atomic.write_bytes(target / CARD, adapter_card(self.run, self.info).encode())
            _generation_config(self.learner.model, self.data.renderer.stop_ids()).save_pretrained(target)
            atomic.sync(target)
            older = target.with_name(f".adapter.{os.getpid()}.old.tmp")
            if self.run.adapter.exists():
                self.run.adapter.rename(older)
            target.rename(self.run.adapter)
            shutil.rmtree(older, ignore_errors=True)
            atomic.sync(self.run.path)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"cannot write {self.run.adapter}: {getattr(error, 'strerror', None) or error}",
                ways_out=["free space; then repeat the command with --resume_from_checkpoint auto"],
            ) from error
        finally:
            shutil.rmtree(target, ignore_errors=True)

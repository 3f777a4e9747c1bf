"""Everything before the first step, in the order in which it can fail.

What can fail for a reason outside the model (options, output directory, data, template, plan) is
checked before the weights are read.
"""

import math
import platform
import shutil
import uuid
from dataclasses import dataclass, replace
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..adapters.initial import begin_with_adapter
from ..adapters.lora import target_names
from ..adapters.peft_files import restore_adapter
from ..config.aliases import TOGETHER
from ..config.options import TrainConfig
from ..config.unused import unused
from ..data.batches import Schedule
from ..data.dataset import (
    Data,
    data_lines,
    examples_of,
    read_data,
    schedule_of,
    source_digest,
)
from ..engine.learner import Learner
from ..engine.lr_schedule import warmup_steps
from ..engine.selftest import self_test
from ..errors import DataError, UsageError
from ..files import atomic, hub
from ..files.model_config import computed_by, read_config
from ..files.publish import reserve
from ..memory.process import (
    LOAD_MMAP_THRESHOLD,
    TRAIN_MMAP_THRESHOLD,
    return_freed,
    set_mmap_threshold,
)
from ..model.architecture import build_empty, choose_device, choose_dtype, router_losses
from ..model.fusion import fuse
from ..model.rope import pass_kind
from ..model.targets import experts
from ..model.wrappers import left_out
from ..ops import cpu, gpu
from ..planning.budget import gib
from ..planning.dry_run import CannotPlan
from ..planning.memory_plan import MemoryPlan, auto_in_words
from ..planning.monitor import PeakMonitor
from ..planning.search import Planner
from ..progress import Reporter, Say
from ..quantization.bnb_format import quantized_line
from ..quantization.load import load_base, with_stored_form
from ..quantization.weights import QuantReport
from ..run import checkpoint
from ..run.directory import EVALS, MEMORY, METRICS, NONFINITE, QUANT_JSON, SAMPLES, Run
from ..run.fingerprint import rules_of, tokenizer_digest
from ..run.load import refuse_foreign_adapter
from .promise import Promise
from .rehearsal import DIRECTORY
from .resume import Resume, find_checkpoint
from .trackers import Trackers


@dataclass(frozen=True)
class Setup:
    """A training that is ready for its first step.

    Attributes:
        run: the run directory, locked by the caller.
        promise: the options as they are, the plan, and the monitor.
        data, schedule: the rows, and which of them each step trains on.
        learner: model, adapter, optimizer; at the state of step ``start``.
        total_steps, steps_per_epoch: optimizer steps.
        start: steps that are done already.
        info: the run's record (`run.json`).
        repository: where the result is published, "" for nowhere.
        trackers: where metrics also go.
    """

    run: Run
    promise: Promise
    data: Data
    schedule: Schedule
    learner: Learner
    total_steps: int
    steps_per_epoch: int
    start: int
    info: dict[str, Any]
    repository: str
    trackers: Trackers

    @property
    def reporter(self) -> Reporter:
        return self.promise.reporter


def set_up(promise: Promise, trackers: Trackers) -> Setup:
    """Make a training ready, in the order in which it can fail.

    Args:
        promise: of the options as they were given; it is complete afterwards.

    Raises:
        HalfbyteError: with the exit code of the command line.
    """
    run, reporter = promise.run, promise.reporter
    for line in unused(promise.config):
        reporter.say(line)
    found = find_checkpoint(run, promise.config.resume_from_checkpoint, reporter.say)
    resume = None if found is None else Resume(found, run, promise.config.allow_change)
    repository = ""
    if promise.config.push_to_hub:
        repository = reserve(promise.config.hub_model_id, promise.config.hub_private_repo)
    base = hub.base_of(promise.config)
    if resume is None:
        promise.config = with_stored_form(begin_with_adapter(promise.config, base), base)
    else:
        promise.config = with_stored_form(promise.config, base)
        promise.change(resume.options_of_adapter(promise.config))
        promise.change(resume.options_of_data(promise.config))
    # a template that asks for the time sees the run's, so that a resumed run has the same ids
    clock = run.clock() if resume else datetime.now()
    data = _make_plan(promise, base, _rows(promise, base, resume, clock), resume, clock)
    # as it was decided: a resumed run holds out the same rows
    promise.change({"eval_split": data.share_held_out})
    config = promise.config
    if config.eval_steps and not data.held_out:
        reporter.say(f"eval_steps {config.eval_steps} is not used: no rows are held out")
    schedule = schedule_of(config, data)
    steps_per_epoch = len(schedule.epoch(0))
    total = (
        config.max_steps
        if config.max_steps > 0
        else math.ceil(config.num_train_epochs * steps_per_epoch)
    )
    info = record_of(config, base, data, total)
    if resume is not None:
        resume.compare(info, config)
    notes: dict[str, str] = {}
    # nor beside the weights: what will be asked is rendered now
    data.questions(config.num_samples)
    with promise.monitor.phase("load", 0 if resume is None else resume.found.step):
        learner, report = build_learner(config, base, reporter, notes, begin=resume is None)
    promise.monitor.learner = learner
    info["base"]["digest"], info["found"] = report.digest, notes
    # of the run, for trackers; none of its numbers depends on it
    info["identity"] = uuid.uuid4().hex[:8]
    start = 0
    if resume is not None:
        resume.compare_base(report.digest, str(base))
        start = resume.found.step
        reporter.say(resume.restore(learner, info))
    one = checkpoint.bytes_needed(learner.model, learner.optimizer)
    checkpoint.refuse_full_disk(run.checkpoints, one, config.save_total_limit + bool(data.held_out))
    logged = max((row["step"] for row in run.read(METRICS)), default=0) if resume else 0
    _begin_files(run, info, report, start if resume else -1, reporter.say)
    promise.write_waiting()
    trackers.start(info["config"], start, info["identity"], logged)
    return Setup(
        run=run,
        promise=promise,
        data=data,
        schedule=schedule,
        learner=learner,
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        start=start,
        info=info,
        repository=repository,
        trackers=trackers,
    )


# --- rows and plan --------------------------------------------------------------------------------


def _rows(promise: Promise, base: Path, resume: Resume | None, clock: datetime) -> Data:
    try:
        return read_rows(promise.config, base, promise.reporter, clock)
    except DataError as error:
        if resume is not None:
            resume.explain(error, promise.config, base)
        raise


def read_rows(
    config: TrainConfig, base: Path, reporter: Reporter, clock: datetime | None = None
) -> Data:
    """Read rows, renderer and counts, and show what was decided. Needs no weights.

    Args:
        base: the model's directory.
        clock: the time that a template sees.

    Raises:
        DataError, UsageError: as `data.dataset.read_data`, and for targets that match no layer.
    """
    if not config.full:  # raises now rather than after loading
        target_names(build_empty(read_config(base)), config.target_modules, config.target_experts)
    data = read_data(
        config.data, config, base, say=reporter.say, progress=reporter.progress, clock=clock
    )
    for line in data_lines(data):
        reporter.say(line)
    reporter.show_row(data.renderer.pieces(data.train.rows[0]))
    data.renderer.rest()  # no process with templates beside what is planned
    return data


def _make_plan(
    promise: Promise, base: Path, data: Data, resume: Resume | None, clock: datetime
) -> Data:
    """Plan the memory; with ``fit_to`` take the options that fit, on a resume those the run has.

    Returns:
        The data, read anew where its rows became shorter.

    Raises:
        DoesNotFit: it does not, and ``force`` is not given.
    """
    say, reporter = promise.reporter.say, promise.reporter

    def change(options: dict[str, Any]) -> Data:
        shorter = options.get("max_length", promise.config.max_length) < promise.config.max_length
        promise.change(options)
        return read_rows(promise.config, base, reporter, clock) if shorter else data

    if resume is not None:
        data = change(resume.options_as_before(promise))
    device = choose_device(promise.config.device)
    promise.monitor = PeakMonitor(device, {}, promise.append, say)
    planner = promise.planner = Planner(base, promise.config, data, reporter.progress)
    _refuse_other_device(promise.config, planner, device)
    try:
        if promise.config.fit_to and resume is None:
            plan = planner.fit()
            if plan.fits:
                planner.data = data = change(plan.choices[0].change)
                say(f"to fit {promise.config.fit_to}: {plan.choices[0].flags()}")
        else:
            decided, plan = planner.resolve_auto()
            promise.change(decided)
            for line in auto_in_words(decided):
                say(line)
    except CannotPlan as error:
        if promise.config.fit_to:
            raise
        say(f"{error.what} ({error.found}): it is measured instead")
        promise.planner = None
        return data
    _promise(promise, planner, plan)
    return data


def _refuse_other_device(config: TrainConfig, planner: Planner, device: torch.device) -> None:
    if planner.budget.device != device.type:
        raise UsageError(
            f"--fit_to {config.fit_to} is a GPU, and this training would run on {device.type}",
            ways_out=[
                "train where the card is",
                "`halfbyte plan` plans for it from here",
                "--fit_to 16GiB, or without",
            ],
        )


def _promise(promise: Promise, planner: Planner, plan: MemoryPlan) -> None:
    """Hold to a plan that fits, or was forced."""
    say = promise.reporter.say
    if not plan.fits:
        plan = plan if plan.choices else replace(plan, choices=planner.ways_out(plan))
        if not promise.config.force:
            plan.check()
        promise.forced = plan
        say("the plan does not fit, and is forced")
    there = f" of {gib(plan.budget_bytes)}" if plan.budget_bytes else ""
    say(
        f"the plan: {gib(plan.peak_bytes)}{there} at the peak, {plan.tokens:,} tokens in the "
        "largest pass"
    )
    promise.hold(plan)


# --- the record -----------------------------------------------------------------------------------


def record_of(config: TrainConfig, base: Path, data: Data, total_steps: int) -> dict[str, Any]:
    """What `run.json` says of a training before it is loaded."""
    device = choose_device(config.device)
    named = ("halfbyte", "torch", "transformers", "safetensors")
    on_gpu = device.type == "cuda"
    capability = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    info = {
        "schema": 1,
        "config": config.model_dump(),
        "base": {
            "name": config.model,
            "path": str(base.resolve()),
            "computed_by": computed_by(base),
        },
        "compute_dtype": str(choose_dtype(config.dtype, device)).removeprefix("torch."),
        "data": {
            "source": _absolute(config.data),
            "sha256": source_digest(examples_of(config.data, config)),
            "form": data.format,
            "rows_cut": data.rows_cut,
            **data.counts(),
        },
        "passes_apart": rotated_apart(base, data),
        "warmup_steps": warmup_steps(config, total_steps),
        "template_sha256": data.renderer.template_sha256,
        "tokenizer_sha256": tokenizer_digest(data.renderer),
        "total_steps": total_steps,
        "clock": data.renderer.clock.isoformat(),
        "changes": [],
        "versions": {name: metadata.version(name) for name in named},
        "machine": {
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name(device) if on_gpu else capability,
            "threads": torch.get_num_threads(),
            "kernel_path": gpu.path_in_use() if on_gpu else cpu.path_in_use(),
        },
    }
    return {**info, "rules": rules_of(info)}


def rotated_apart(base: Path, data: Data) -> bool:
    """Whether rows go through the model in passes of their own, by their lengths."""
    kind = pass_kind(read_config(base))
    lengths = {*data.train.rows.lengths.tolist(), *(len(row.input_ids) for row in data.held_out)}
    return len({kind(length) for length in lengths}) > 1


def _absolute(source: str) -> str:
    """The sources with absolute paths, so that later verbs find them from anywhere; a Hub id as it
    is."""
    found = []
    for name in source.split(TOGETHER):
        path = Path(name).expanduser()
        found.append(str(path.resolve()) if path.exists() else name)
    return TOGETHER.join(found)


def _begin_files(run: Run, info: dict[str, Any], report: QuantReport, steps: int, say: Say) -> None:
    """Write the record, cut rows past ``steps``, and remove what an interrupted save left."""
    run.write_info(info)
    atomic.write_json(run.path / QUANT_JSON, report.as_dict())
    for file in (METRICS, EVALS, SAMPLES, NONFINITE, MEMORY):
        if damaged := run.cut(file, steps):
            say(
                f"{run.path / file}: damaged lines {', '.join(map(str, damaged))} are set aside in "
                f"{file}.damaged"
            )
    checkpoint.remove_unfinished(run.checkpoints)
    shutil.rmtree(run.path / DIRECTORY, ignore_errors=True)
    atomic.remove_unfinished(run.path)


# --- the model ------------------------------------------------------------------------------------


def build_learner(
    config: TrainConfig,
    base: Path,
    reporter: Reporter,
    notes: dict[str, str] | None = None,
    begin: bool = True,
) -> tuple[Learner, QuantReport]:
    """Load, test, adapt: everything a step needs.

    Args:
        base: the model's directory.
        notes: takes what was found out about the model, a line each.
        begin: begin with the adapter that the options name, if they name one.

    Raises:
        ModelError, UsageError: the model is refused, or cannot be trained as the options say.
    """
    found = {} if notes is None else notes

    def note(what: str, line: str) -> None:
        reporter.say(line)
        found[what] = line

    set_mmap_threshold(LOAD_MMAP_THRESHOLD)
    model, report = load_base(base, config, reporter.progress)
    named = config.adapter_name_or_path if begin else None
    adapter = None if named is None else hub.resolve_adapter(named)
    if adapter is not None and not config.allow_other_base:
        refuse_foreign_adapter(adapter, report.digest, str(base))
    reporter.say(_loaded_line(model, report.coverage, config.load_in_4bit))
    on_gpu = next(model.parameters()).device.type == "cuda"
    fused = fuse(model).line() if on_gpu or cpu.active() is not None else ""
    reporter.say(f"kernels: {gpu.why() if on_gpu else cpu.why()}")
    if fused:
        note("fused", fused)
    abilities = self_test(model)
    if not abilities.packing:
        reporter.say(
            "rows are run one at a time: this model does not keep rows of one sequence apart"
        )
    if config.use_dora and config.lora_dropout:
        note(
            "DoRA's dropout",
            f"lora_dropout {config.lora_dropout:g} drops of the adapter's input alone; PEFT drops "
            "the base's in DoRA's changed part, too (the same in the mean)",
        )
    if line := router_losses(model.config):
        note("router losses", line)
    if line := left_out(model):
        note("text alone", line)
    if line := quantized_line(read_config(base)):
        note("stored form", line)
    if not config.full and not config.target_experts and (count := len(experts(model))):
        note(
            "experts",
            f"the experts' {count:,} matrices are frozen and take no adapter: --target_experts "
            "true adapts them, too",
        )
    learner = Learner(model, config, abilities, note)
    if adapter is not None:
        restore_adapter(model, adapter)
    count = sum(p.numel() for p in learner.trained)
    reporter.say(f"training {count:,} parameters of {sum(p.numel() for p in model.parameters()):,}")
    return_freed()
    set_mmap_threshold(TRAIN_MMAP_THRESHOLD)
    return learner, report


def _loaded_line(model: Any, coverage: float, load_in_4bit: bool) -> str:
    count = sum(p.numel() for p in model.parameters())
    held = (
        f"{coverage:.1%} of the weights in layers held in 4 bits"
        if load_in_4bit
        else "held unquantized"
    )
    dtype = str(model.config.dtype)[6:]
    return f"{type(model).__name__}: {count:,} parameters, {held}, computing in {dtype}"

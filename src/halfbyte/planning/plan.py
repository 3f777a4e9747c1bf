"""Does it fit, and what if not: memory and time of a training, before any weight is read.

The plan is a rehearsal without numbers. The model is built on the ``meta`` device, made trainable by the code that
trains (`learner.Learner`), and one micro-batch of the largest size goes forward, backward and through the optimizer
while every storage is counted (`ledger.TensorBytes`). Nothing is estimated by formula that code allocates; what no
tensor shows is added and named: the process or the GPU's context as it is, buffers of reading, and the allocator's
slack. Only ``config.json`` is needed; row lengths of real data and headers of real weights are used where they are.
"""

import contextlib
import math
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import ops
from ..config.hf_objects import config_of
from ..config.options import PlanConfig, TrainConfig
from ..data.batches import EVAL_TOKENS, MicroBatch, Schedule, collate, prepare
from ..data.dataset import Data, read_data
from ..data.renderer import Encoded
from ..engine.adamw8bit import is_paged
from ..engine.learner import Learner
from ..engine.selftest import Abilities
from ..errors import DataError, DoesNotFit, HalfbyteError, ModelError, UsageError
from ..exporters.merge import FP32_LIMIT
from ..files import hub
from ..memory.process import PASSING, allocate_apart, available, held_now, is_exhaustion
from ..model import attention
from ..model.architecture import Progress, choose_device, choose_dtype, empty_base, no_progress, read_config
from ..model.fusion import fuse
from ..model.host_embedding import host_table
from ..ops import cpu
from ..ops.library import device_type, planning_for
from ..quantization.load import begin_with_adapter
from ..quantization.tensor import NF4Tensor, quantize
from ..run import checkpoint
from .resident import RESIDENT, TensorBytes, elsewhere, resident, sizes, weights_by_part

MIB = 1 << 20
CARDS = {
    "rtx-3060": 12288,
    "rtx-3090": 24576,
    "rtx-4060": 8188,
    "rtx-4060-ti": 16380,
    "rtx-4070": 12282,
    "rtx-4080": 16376,
    "rtx-4090": 24564,
    "rtx-5090": 32607,
    "rtx-a6000": 49140,
    "rtx-6000-ada": 49140,
    "t4": 15360,
    "v100-16gb": 16384,
    "v100-32gb": 32768,
    "a10": 23028,
    "l4": 23034,
    "a40": 46068,
    "l40s": 46068,
    "a100-40gb": 40960,
    "a100-80gb": 81920,
    "h100": 81559,
    "h200": 143771,
}
"""Memory of a card as its driver reports it, MiB."""

CONTEXT_BYTES = 650_000_000
"""Of a CUDA process before its first tensor: context, modules, workspaces; 0.6 to 0.7 GB."""
GPU_SLACK = 0.05
"""Share of what comes and goes that PyTorch's caching allocator holds on top (assumed; blocks are 2 MiB and more)."""
PROCESS_GROWTH = 32 * MIB
"""What a process grows by while it loads and trains besides its tensors: code, compiled kernels, holes of the heap."""
RESERVE = 0.02
"""Share of a budget that is left free: a plan may be short by as much."""
READ_ROOM = 8 * MIB
CALL_SECONDS = 20e-6
"""One operation's way through Python and PyTorch."""
LENGTH_STEP = 128
DISK_RATE, HOST_RATE = 1e9, 25e9
"""Bytes a second assumed of a disk (less where the system has them in memory anyway), and of host memory to a GPU."""
UNASKED_SHARE = 0.5
"""Of the memory that is free, what a training may take for speed alone without being told what to fit into."""
TILE = 512
"""Tokens that MLPs run on at a time where nothing else fits."""
MOVED = {
    "paging": "optimizer states",
    "embedding_offloading": "the embedding table",
    "activation_offloading": "layer inputs",
    "weight_streaming": "weights",
}
"""Options that have something lie elsewhere than in the memory that is computed in, and what."""
FITTED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "kept_activations",
    "kept_layers",
    "max_length",
)
"""The options that fit_to chooses."""


class CannotPlan(ModelError):
    """The model cannot be built or run without numbers; it may train all the same."""


@dataclass(frozen=True)
class Part:
    """One line of the ledger. where: "device" (the memory the model computes in), "host" (of a GPU's run) or "disk"."""

    part: str
    bytes: int
    where: str = "device"


@dataclass(frozen=True)
class Choice:
    """A change of options, and what it makes of the plan. loses: what it costs besides time ("" if nothing)."""

    change: dict[str, Any]
    peak_bytes: int
    relative_time: float
    fits: bool
    loses: str = ""

    def flags(self) -> str:
        return " ".join(f"--{name} {str(value).lower()}" for name, value in self.change.items())


@dataclass(frozen=True)
class MemoryPlan:
    """Where the bytes of a training go.

    Attributes: ``ledger``: parts of device memory at the peak of a steady step, then host and disk. ``phases``: the
    peak of device memory in each, bytes. ``tensor_bytes``: of all tensors at the peak of a steady step. ``tokens``: of
    the largest micro-batch. ``moved_bytes``: to and from disk (GPU: host memory) in an optimizer step. ``seconds``: an
    estimate of the whole training, None where the machine is not this one.
    """

    model: str
    device: str
    ledger: tuple[Part, ...]
    phases: dict[str, int]
    tensor_bytes: int
    budget_bytes: int
    parameters: int
    lora_parameters: int
    quantized_parameters: int
    tokens: int
    flop: int
    calls: int
    moved_bytes: int = 0
    steps: int = 0
    seconds: float | None = None
    choices: tuple[Choice, ...] = field(default=())

    @property
    def peak_bytes(self) -> int:
        """Of device memory, over all phases of the training (merging is a command of its own)."""
        return max(size for phase, size in self.phases.items() if phase != "merge")

    @property
    def reserve_bytes(self) -> int:
        return int(self.budget_bytes * RESERVE)

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the reserve free (True where no budget is known)."""
        return not self.budget_bytes or self.peak_bytes + self.reserve_bytes <= self.budget_bytes

    @property
    def relative_time(self) -> float:
        """Of a step, in seconds of a machine that does 10^12 operations a second; for comparing plans."""
        return self.flop / 1e12 + self.calls * CALL_SECONDS + self.moving_seconds

    @property
    def moving_seconds(self) -> float:
        """Of a step, if nothing else is done meanwhile."""
        return self.moved_bytes / (HOST_RATE if self.device == "cuda" else DISK_RATE)

    def live_bytes(self, tokens: int) -> int:
        """What a pass of so many tokens takes beside what stays from step to step, at most."""
        fixed = self.bytes_of("logits chunk", "dequantized weights of a layer")
        live = self.tensor_bytes - self.bytes_of(*RESIDENT, "kernel scratch", "dequantized weight")
        return int(fixed + max(live - fixed, 0) * tokens / self.tokens)

    def bytes_of(self, *parts: str) -> int:
        return sum(part.bytes for part in self.ledger if part.part in parts)

    def measurable(self) -> dict[str, int]:
        """``phases`` as they would be measured: what a GPU holds outside of PyTorch's allocator left out."""
        outside = self.bytes_of("GPU context") if self.device == "cuda" else 0
        return {phase: size - outside for phase, size in self.phases.items()}

    def as_dict(self) -> dict[str, Any]:
        extra = {"peak_bytes": self.peak_bytes, "fits": self.fits, "reserve_bytes": self.reserve_bytes}
        choices = [{**asdict(choice), "flags": choice.flags()} for choice in self.choices]
        return {**asdict(self), **extra, "choices": choices}

    def check(self) -> None:
        """Raise DoesNotFit, with the choices as ways out, unless it fits."""
        if not self.fits:
            raise does_not_fit(self)


def in_words(plan: MemoryPlan) -> list[str]:
    """The choices of a plan as ways out: the flags, what they return, what they cost."""
    return [
        f"{choice.flags()}: {gib(plan.peak_bytes - choice.peak_bytes)} less"
        + ("" if choice.fits else " (not enough by itself)")
        + (f"; {choice.loses}" if choice.loses else "")
        for choice in plan.choices
    ]


def settled_in_words(change: dict[str, Any]) -> Iterator[str]:
    """What `Planner.settle` decided, where it is worth a line."""
    if away := [what for name, what in MOVED.items() if change.get(name) == "always"]:
        yield f"it does not fit otherwise: {', '.join(away)} stay out of memory and come when they are used"
    if tokens := change.get("tokens_per_pass"):
        yield f"it does not fit otherwise: micro-batches go through the model in parts of at most {tokens:,} tokens"
    if tokens := change.get("tokens_per_tile"):
        yield f"it does not fit otherwise: MLPs run on {tokens:,} tokens at a time"
    if change.get("kept_activations") == "all":
        some = change.get("kept_layers", -1)
        yield f"there is room: {'every layer keeps' if some < 0 else f'{some} layers keep'} its activations"


def ways_in_words(plan: MemoryPlan, planner: "Planner") -> list[str]:
    """Ways out of a plan that did not hold."""
    if plan.choices and not plan.fits:  # else they are what was tried
        return in_words(plan)
    try:
        return in_words(replace(plan, choices=planner.ways_out(plan)))
    except (HalfbyteError, MemoryError, RuntimeError):
        return []


def does_not_fit(plan: MemoryPlan) -> DoesNotFit:
    """The error for a plan over its budget."""
    parts = sorted((p for p in plan.ledger if p.where == "device"), key=lambda p: -p.bytes)[:4]
    over = plan.peak_bytes + plan.reserve_bytes - plan.budget_bytes
    return DoesNotFit(
        f"this does not fit: the training peaks at {gib(plan.peak_bytes)} and {gib(plan.budget_bytes)} are there, "
        f"of which {RESERVE:.0%} stay free: {gib(over)} too much",
        found=", ".join(f"{part.part} {gib(part.bytes)}" for part in parts),
        ways_out=[
            *in_words(plan),
            "a smaller model, or a machine with more memory",
            "--force true tries it all the same",
        ],
        plan=plan.as_dict(),
    )


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 100 * MIB else f"{count / MIB:.1f} MiB"


# --- what goes in -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The largest micro-batch of a training, and how many of all kinds there are.

    batch: what is rehearsed. tokens: of an optimizer step, on average. passes: forward and backward, of a step. steps:
    of the training. eval_tokens: of an evaluation's largest batch, 0 without one.
    """

    batch: MicroBatch
    tokens: float
    passes: int
    steps: int
    eval_tokens: int = 0


def work_of(config: TrainConfig, data: Data | None, context: int | None = None) -> Work:
    """The work that options and data make; rows of max_length (and no longer than context) without data."""
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    if data is None:
        length = min(config.max_length, context or config.max_length)
        row = Encoded("plan", [0] * length, [True] * length)
        rows, passes = config.per_device_train_batch_size, config.gradient_accumulation_steps
        if config.tokens_per_pass:
            together = min(rows, max(1, config.tokens_per_pass // length))
            rows, passes = together, passes * -(-rows // together)
        batch = collate([row], [0] * rows)
        steps = max(config.max_steps, 0)
        evaluated = max(EVAL_TOKENS, length) if config.eval_split else 0
        return Work(batch, per_step * length, passes, steps, evaluated)
    schedule = schedule_of(config, data)
    epoch = schedule.epoch(0)
    largest, parts = largest_pass(data.train.rows, schedule, config.tokens_per_pass)
    passes = config.gradient_accumulation_steps * parts
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * len(epoch))
    longest = max((len(row.input_ids) for row in data.held_out), default=0)
    return Work(
        largest,
        data.train.tokens / len(epoch),
        passes,
        steps,
        max(EVAL_TOKENS, longest) if longest else 0,
    )


def largest_pass(rows: Sequence[Encoded], schedule: Schedule, tokens_per_pass: int) -> tuple[MicroBatch, int]:
    """A pass no smaller, in tokens, than any of a training, and how many passes a largest micro-batch takes.

    Where micro-batches go in parts it is the longest row, and a row of padding up to the limit.
    """
    largest = collate(rows, schedule.largest())
    count = len(largest.input_ids)
    if not 0 < tokens_per_pass < count:
        return largest, 1
    longest = max(rows, key=lambda row: len(row.input_ids))
    most = min(count, max(tokens_per_pass, len(longest.input_ids)))
    lack = most - len(longest.input_ids)
    filler = [Encoded("padding", [0] * lack, [True] * lack)] if lack > 1 else []
    return collate([longest, *filler], range(1 + len(filler))), -(-count // most)


def schedule_of(config: TrainConfig, data: Data) -> Schedule:
    """Which rows each optimizer step trains on."""
    return Schedule(
        data.train.rows,
        config.seed,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        data.max_length if config.packing else None,
    )


# --- the rehearsal without numbers ------------------------------------------------------------------------------------


def plan_memory(
    model_config: Any,
    config: TrainConfig,
    work: Work,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    stored: hub.Checkpoint | None = None,
    runtime_bytes: int = 0,
    budget_bytes: int = 0,
) -> MemoryPlan:
    """The plan of one training.

    Args:
        model_config: a transformers configuration. device: "cpu" or "cuda". dtype: compute dtype. stored: the weights'
            headers, where they are at hand. runtime_bytes: of the process (or the GPU's context) before anything.

    Raises:
        CannotPlan: the model cannot be built or run without numbers. ModelError: it cannot be trained like this.
    """
    try:
        return _plan_memory(model_config, config, work, device, dtype, stored, runtime_bytes, budget_bytes)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        if is_exhaustion(error):
            raise
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CannotPlan("the memory of this model cannot be planned", found=message[:200]) from error


def _plan_memory(
    model_config: Any,
    config: TrainConfig,
    work: Work,
    device: str,
    dtype: torch.dtype,
    stored: hub.Checkpoint | None,
    runtime_bytes: int,
    budget_bytes: int,
) -> MemoryPlan:
    with planning_for(device):
        model = empty_base(model_config, config, dtype)
        base = sizes(weights_by_part(model))
        in_4bit = [p.numel() for p in model.parameters() if isinstance(p.data, NF4Tensor)]
        largest = max(in_4bit, default=0)
        quantized = sum(in_4bit)
        fuse(model)
        learner = Learner(model, config, Abilities(True, True, 0.0, 0.0), lambda what, line: None)
        parts, streamed = resident(learner), 0
        if config.weight_streaming == "always" and device == "cpu":
            streamed = sum(base.pop(part) for part in STREAMED)
            parts = {part: [] if part in STREAMED else tensors for part, tensors in parts.items()}
        with attention.segments(model):
            peaks, flop, calls = _run(learner, work, parts)
        held = sizes({**resident(learner), **{part: [] for part in STREAMED if streamed}})
    on_gpu = device == "cuda"
    away = _away(learner, streamed)
    step = max((peaks[phase] for phase in ("backward", "update")), key=lambda peak: peak.process)
    phases = {}
    for name, peak in (("step", step), ("eval", peaks.get("eval")), ("save", peaks["save"])):
        if peak is not None:
            slack = int(GPU_SLACK * (peak.tensors - sum(held.values()))) if on_gpu else PROCESS_GROWTH
            phases[name] = runtime_bytes + slack + (peak.tensors if on_gpu else peak.process)
    table = host_table(model)
    parameters = sum({id(p): p.numel() for p in model.parameters()}.values()) + (0 if table is None else table.numel())
    reading = _reading_bytes(stored, largest, dtype)
    # while it is loaded, and when what is trained has its gradients and the self-test has been (with one set of them)
    states = held["optimizer states"] if config.optim in ("adamw_8bit", "paged_adamw_8bit") else 0
    added = held["adapters"] + held["gradients"] + states
    load = runtime_bytes + sum(base.values()) + max(reading, added + (0 if on_gpu else PROCESS_GROWTH))
    phases = {"load": load, "first step": phases["step"], **phases}
    slack = phases["step"] - runtime_bytes - step.tensors
    adapters = held["adapters"] // 4
    ledger = [Part(part, step.parts.get(part, 0)) for part in (*held, *(p for p in step.parts if p not in held))]
    trained = held["adapters"] or sum(p.nbytes for p in learner.trained)
    one = trained + max(held["optimizer states"], away["paged optimizer states"])
    ledger += [
        Part("GPU context" if on_gpu else "the process before it", runtime_bytes),
        Part("allocator slack", slack),
        *(Part(part, size, "host" if on_gpu else "disk") for part, size in away.items()),
        Part("checkpoints", (config.save_total_limit + 2) * one, "disk"),
        Part("adapter" if adapters else "model", trained, "disk"),
        Part("the model's files", _file_bytes(stored, parameters), "disk"),
        *([Part("host process", held_now() + PROCESS_GROWTH + reading, "host")] if on_gpu else []),
    ]
    merged = parameters * (4 if parameters <= FP32_LIMIT else 2)
    phases["merge"] = runtime_bytes + sum(base.values()) + held["adapters"] + max(merged, reading)
    return MemoryPlan(
        config.model,
        device,
        tuple(part for part in ledger if part.bytes),
        phases,
        step.tensors,
        budget_bytes,
        parameters,
        adapters,
        quantized,
        len(work.batch.input_ids),
        int(flop * work.tokens / len(work.batch.input_ids)),
        calls * work.passes,
        2 * away["paged optimizer states"]
        + 2 * work.passes * (away["offloaded layer inputs"] + away["streamed weights"]),
        work.steps,
    )


@dataclass(frozen=True)
class _PeakOf:
    """tensors, process: bytes at the peak of a phase. parts: of the tensors."""

    tensors: int
    process: int
    parts: dict[str, int]


STREAMED = ("4-bit codes", "scales")
"""Parts that stay in a file with weight_streaming."""


def _away(learner: Learner, streamed: int) -> dict[str, int]:
    """Bytes that lie outside of the memory that is computed in, by part."""
    optimizer, run, table = learner.optimizer, learner.recompute, host_table(learner.model)
    inputs = 0
    if run is not None and run.inputs.away is not None and (inputs := run.inputs.nbytes):
        on_gpu = device_type(run.inputs.like) == "cuda"
        inputs = 1 << (inputs - 1).bit_length() if on_gpu else inputs  # pinned in one block: a power of two
    return {
        "streamed weights": streamed,
        "embedding table": 0 if table is None else table.nbytes,
        "paged optimizer states": checkpoint.state_bytes(optimizer) if is_paged(optimizer) else 0,
        "offloaded layer inputs": inputs,
    }


def _run(learner: Learner, work: Work, parts: dict[str, list[torch.Tensor]]) -> tuple[dict[str, _PeakOf], int, int]:
    """Each phase's peak, on top of what is resident; operations and calls of a pass."""
    found: dict[str, _PeakOf] = {}
    count = TensorBytes(parts, elsewhere(learner))

    def note(phase: str) -> None:
        found[phase] = _PeakOf(count.peak, count.process_peak, dict(count.at_peak))
        count.restart()

    with count:
        learner.update(1e-4)  # what an optimizer makes in its first step is there in every other
        count.restart()
        learner.accumulate(work.batch, max(work.batch.supervised, 1), 0, 0)
        flop, calls = count.flop, count.calls
        note("backward")
        learner.clip()
        learner.update(1e-4)
        learner.forget()
        note("update")
        note("save")
        if work.eval_tokens:
            row = Encoded("plan", [0] * work.eval_tokens, [True] * work.eval_tokens)
            learner.model.eval()
            with torch.no_grad():
                learner.loss(collate([row], [0]))
            note("eval")
    return found, flop, calls


def _reading_bytes(stored: hub.Checkpoint | None, largest_linear: int, dtype: torch.dtype) -> int:
    """What reading the weights takes beside them: the largest tensor that does not stay as it is in its file, and room
    to judge it. Others are read where they stay."""
    if stored is None:
        return READ_ROOM + 2 * largest_linear
    whole = max((e.nbytes for e in stored.entries.values() if e.dtype != dtype), default=0)  # read, then cast
    linear = stored.entries[max(stored.entries, key=lambda name: stored.entries[name].nbytes)]
    return READ_ROOM + max(whole, min(linear.nbytes, largest_linear * linear.dtype.itemsize))


def _file_bytes(stored: hub.Checkpoint | None, parameters: int) -> int:
    return sum(entry.nbytes for entry in stored.entries.values()) if stored else 2 * parameters


def outline(model_config: Any, tokens: int, device: str = "cuda", **options: Any) -> MemoryPlan:
    """The plan of one row of so many tokens for a configuration that lies nowhere, and nothing but its tensors."""
    config = PlanConfig(model=model_config.model_type, max_length=tokens, dtype="bfloat16", **options)
    return plan_memory(model_config, config, work_of(config, None), device=device)


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Memory to plan for. device: "cpu" or "cuda". bytes: 0 where nothing is known. runtime: taken before it starts."""

    device: str
    bytes: int
    runtime: int


def parse_size(text: str) -> int:
    """Bytes of "24GiB", "24 GB" or "24" (GiB).

    Raises:
        UsageError: neither a size nor the name of a card.
    """
    found = re.fullmatch(r"([\d.]+)\s*(GiB|GB|MiB|MB|G|M|)B?", text.strip(), re.IGNORECASE)
    unit = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "g": 2**30, "m": 2**20, "": 2**30}
    try:
        size = int(float(found.group(1)) * unit[found.group(2).lower()]) if found else 0
    except ValueError:
        size = 0
    if size <= 0:
        raise UsageError(
            f"fit_to must be a size or the name of a card, got {text!r}",
            expected=f"24GiB, 16GB, or one of {', '.join(CARDS)}",
        )
    return size


def budget_of(config: TrainConfig) -> Budget:
    """What there is to fit into: ``fit_to``, or what this machine has free now.

    A card's name plans for a GPU whether one is there or not; a size, for the device the options choose.
    """
    card = CARDS.get((config.fit_to or "").lower().replace("_", "-").replace(" ", "-"))
    if config.fit_to and card is not None:
        return Budget("cuda", card * MIB, CONTEXT_BYTES)
    device = torch.device(config.device) if config.device.startswith("cuda") else choose_device(config.device)
    if device.type == "cuda":
        if config.fit_to or not torch.cuda.is_available():
            return Budget("cuda", parse_size(config.fit_to) if config.fit_to else 0, CONTEXT_BYTES)
        # the context is there by the time that free memory can be asked for
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return Budget("cuda", free + CONTEXT_BYTES, CONTEXT_BYTES)
    runtime = held_now()
    if config.fit_to:
        return Budget("cpu", parse_size(config.fit_to), runtime)
    free = available()
    return Budget("cpu", 0 if free is None else free + runtime, runtime)


@dataclass
class Planner:
    """Plans of one model and one set of rows under changing options."""

    path: Path
    config: TrainConfig
    data: Data | None
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        self.model_config = read_config(self.path)
        self.budget = budget_of(self.config)
        self.dtype = _dtype_for(self.config, self.budget.device)
        self.context = getattr(self.model_config.get_text_config(), "max_position_embeddings", None)
        try:
            self.stored: hub.Checkpoint | None = hub.Checkpoint(self.path)
        except HalfbyteError:
            self.stored = None

    def plan(self, **change: Any) -> MemoryPlan:
        config = self.config.model_copy(update=change)
        return plan_memory(
            self.model_config,
            config,
            work_of(config, self._data_for(config), self.context),
            device=self.budget.device,
            dtype=self.dtype,
            stored=self.stored,
            runtime_bytes=self.budget.runtime,
            budget_bytes=self.budget.bytes,
        )

    def _data_for(self, config: TrainConfig) -> Data | None:
        """The data, rows cut where max_length is smaller than what they were read with."""
        if self.data is None or config.max_length >= self.data.max_length:
            return self.data
        limit, held_out = config.max_length, self.data.held_out
        train = prepare(self.data.train.rows, limit, config.over_length)
        held_out = prepare(held_out, limit, config.over_length).rows if held_out else []
        return replace(self.data, train=train, held_out=held_out, max_length=limit)

    def choice(self, plan: MemoryPlan, loses: str = "", **change: Any) -> Choice:
        other = self.plan(**change)
        return Choice(change, other.peak_bytes, other.relative_time / plan.relative_time, other.fits, loses)

    # --- what is left to us ---

    def settle(self) -> tuple[dict[str, Any], MemoryPlan]:
        """Options left to `auto`, decided, and the plan with them: what need not be in memory leaves it where the plan
        does not fit otherwise; where it does, layers keep their activations as far as there is room for speed alone.

        None of it changes a number but ``tokens_per_pass`` and ``tokens_per_tile``, which are last: they add in another
        order.
        """
        kept: dict[str, Any] = {"kept_activations": "none"} if self.config.kept_activations == "auto" else {}
        plan = self.plan()
        if plan.fits:
            return (self._most_layers({}, plan) if kept else None) or (kept, plan)
        change, relieved = self._relieved(kept, self._remedies())
        return (change, relieved) if relieved is not None else ({}, plan)

    def _relieved(
        self, change: dict[str, Any], remedies: Iterable[dict[str, Any]]
    ) -> tuple[dict[str, Any], MemoryPlan | None]:
        """A change, and of the remedies as many as it takes to fit; the plan of both, None where all are not enough."""
        for more in remedies:
            try:
                plan = self.plan(**{**change, **more})
            except UsageError:  # not for this model
                continue
            change = {**change, **more}
            if plan.fits:
                return change, plan
        return change, None

    def _remedies(self) -> Iterator[dict[str, Any]]:
        """Changes that a training may make by itself where it does not fit, the cheapest first."""
        c = self.config
        if c.optim in checkpoint.STATES and c.paging == "auto":
            yield {"paging": "always"}
        if c.embedding_offloading == "auto" and self._may_move_embedding():
            yield {"embedding_offloading": "always"}
        if c.gradient_checkpointing and c.activation_offloading == "auto":
            yield {"activation_offloading": "always"}
        if self.budget.device == "cpu" and c.load_in_4bit and c.weight_streaming == "auto":
            yield {"weight_streaming": "always"}
        data = self._data_for(c)
        longest = max(len(row.input_ids) for row in data.train.rows) if data is not None else c.max_length
        largest = len(work_of(c, data, self.context).batch.input_ids)
        if not c.tokens_per_pass and longest < largest:
            yield {"tokens_per_pass": longest}
        if not c.tokens_per_tile and longest > 2 * TILE:
            yield {"tokens_per_tile": TILE}

    def _may_move_embedding(self) -> bool:
        """Whether the embedding table could lie in host memory: beside a GPU, frozen, and read by nothing else."""
        trained = self.config.full or "embed" in self.config.modules_to_save
        tied = getattr(self.model_config.get_text_config(), "tie_word_embeddings", False)
        return self.budget.device == "cuda" and not trained and not tied

    def _most_layers(self, change: dict[str, Any], least: MemoryPlan) -> tuple[dict[str, Any], MemoryPlan] | None:
        """The plan in which as many layers keep all of their activations as there is room for; None if none do."""
        c = self.config
        if not c.gradient_checkpointing or not self.budget.bytes:
            return None
        share = 1.0 if c.fit_to else UNASKED_SHARE
        room = self.budget.runtime + int((self.budget.bytes - self.budget.runtime) * share)
        room = min(room, least.budget_bytes - least.reserve_bytes)
        layers = getattr(self.model_config.get_text_config(), "num_hidden_layers", 0)
        every = {**change, "kept_activations": "all", "kept_layers": c.kept_layers}
        most = self.plan(**every)
        if most.peak_bytes <= room:
            return every, most
        low, high = least.peak_bytes, most.peak_bytes
        layers = min(layers, c.kept_layers) if c.kept_layers >= 0 else layers
        count = int(layers * (room - low) / (high - low)) if high > low else 0
        while count > 0:
            some = {**every, "kept_layers": count}
            plan = self.plan(**some)
            if plan.peak_bytes <= room:
                return some, plan
            count = min(count - 1, int(count * (room - low) / max(plan.peak_bytes - low, 1)))
        return None

    # --- ways out ---

    def ways_out(self, plan: MemoryPlan) -> tuple[Choice, ...]:
        """Changes that need less memory, those that change no result first; each by itself."""
        candidates = list(self._smaller())
        found = []
        for number in self.progress([str(i) for i in range(len(candidates))], len(candidates), "looking for ways out"):
            loses, change = candidates[int(number)]
            try:
                choice = self.choice(plan, loses, **change)
            except HalfbyteError:
                continue
            if choice.peak_bytes < plan.peak_bytes - MIB:
                found.append(choice)
        return tuple(found)

    def _smaller(self) -> Iterator[tuple[str, dict[str, Any]]]:
        c = self.config
        if not c.gradient_checkpointing:
            yield "", {"gradient_checkpointing": True}
        if c.kept_activations not in ("none", "auto"):
            yield "", {"kept_activations": "none"}
        if c.per_device_train_batch_size > 1:
            yield (
                "",
                {
                    "per_device_train_batch_size": 1,
                    "gradient_accumulation_steps": c.gradient_accumulation_steps * c.per_device_train_batch_size,
                },
            )
        if not c.load_in_4bit and not c.full:
            yield "the base is rounded to 4 bits", {"load_in_4bit": True}
        elif c.full:
            yield "an adapter is trained instead of every parameter", {"full": False, "load_in_4bit": True}
        if c.load_in_4bit and not c.bnb_4bit_use_double_quant:
            yield "scales are rounded to 8 bits", {"bnb_4bit_use_double_quant": True}
        if c.optim in checkpoint.STATES and c.paging == "auto":
            yield "", {"paging": "always"}
        if c.embedding_offloading != "always" and self._may_move_embedding():
            yield "", {"embedding_offloading": "always"}
        if c.dequantized_weights != "product":
            yield "", {"dequantized_weights": "product"}
        if c.gradient_checkpointing and c.activation_offloading != "always":
            yield "", {"activation_offloading": "always"}
        if self.budget.device == "cpu" and c.load_in_4bit and c.weight_streaming != "always":
            yield "", {"weight_streaming": "always"}
        if c.optim in ("adamw_torch", "paged_adamw_32bit"):
            yield "optimizer states are rounded to 8 bits", {"optim": "paged_adamw_8bit"}
        if not c.full and c.lora_r > 8:
            yield "the adapter is smaller", {"lora_r": c.lora_r // 2}
        length = min(c.max_length, self.data.max_length if self.data else c.max_length)
        if length > LENGTH_STEP and c.over_length != "error":
            loses = "longer rows are cut" if c.over_length == "truncate" else "longer rows are left out"
            yield loses, {"max_length": max(LENGTH_STEP, length // 2)}

    # --- the fastest that fits ---

    def fit(self) -> MemoryPlan:
        """The fastest plan that fits: over what is kept and how the same global batch is cut; and what each choice
        costs. Rows are cut as a last resort, in steps of 128 tokens. Where nothing fits, the plan of the options as
        they are, with ways out.
        """
        c = self.config
        given = self.plan()
        total = c.per_device_train_batch_size * c.gradient_accumulation_steps
        as_given = {name: getattr(c, name) for name in FITTED[:-1]}
        if c.kept_activations == "auto":
            as_given["kept_activations"] = "none"
        tried: list[tuple[dict[str, Any], MemoryPlan]] = [(as_given, given)]
        keeps = ("all", "mlp_in", "attention", "none")
        for keep in self.progress(keeps, len(keeps), "planning"):
            for b in (b for b in (1, 2, 4, 8, 16, 32) if total % b == 0):
                change = {
                    "per_device_train_batch_size": b,
                    "gradient_accumulation_steps": total // b,
                    "gradient_checkpointing": True,
                    "kept_activations": keep,
                    "kept_layers": -1,
                }
                if change == as_given:
                    continue
                tried.append((change, self.plan(**change)))
                if not tried[-1][1].fits:
                    break  # nor does a larger one
        too_much = {
            change["per_device_train_batch_size"]
            for change, plan in tried
            if change["kept_activations"] == "all" and not plan.fits
        }
        for change, plan in list(tried):
            if change["kept_activations"] == "none" and plan.fits and change["per_device_train_batch_size"] in too_much:
                tried += [some for some in [self._most_layers(change, plan)] if some]
        fitting = sorted((pair for pair in tried if pair[1].fits), key=lambda pair: pair[1].relative_time)
        if not fitting:
            least: dict[str, Any] = {
                "gradient_checkpointing": True,
                "kept_activations": "none",
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": total,
            }
            # it is a row at a time already
            others = (more for more in self._remedies() if "tokens_per_pass" not in more)
            least, plan = self._relieved(least, others)
            if plan is not None:
                return replace(plan, choices=(Choice(least, plan.peak_bytes, 1.0, True),))
            return self._shorter(given, least)
        best_change, best = fitting[0]
        rows = [
            Choice(change, plan.peak_bytes, plan.relative_time / best.relative_time, plan.fits)
            for change, plan in sorted(tried, key=lambda pair: pair[1].relative_time)
        ]
        rows.sort(key=lambda row: row.change != best_change)
        return replace(best, choices=tuple(rows))

    def _shorter(self, given: MemoryPlan, change: dict[str, Any]) -> MemoryPlan:
        limit = min(self.config.max_length, self.data.max_length if self.data else self.config.max_length)
        low, high = 0, limit // LENGTH_STEP if self.config.over_length != "error" else 0
        found: MemoryPlan | None = None
        while low < high:  # the longest that fits, by halving
            middle = (low + high + 1) // 2
            try:
                plan = self.plan(**change, max_length=middle * LENGTH_STEP)
            except DataError:  # nothing is left to train on
                break
            if plan.fits:
                low, found = middle, plan
            else:
                high = middle - 1
        if found is None:
            return replace(given, choices=self.ways_out(given))
        change = {**change, "max_length": low * LENGTH_STEP}
        loses = f"rows longer than {low * LENGTH_STEP} tokens are "
        loses += "cut" if self.config.over_length == "truncate" else "left out"
        if self.config.packing:
            loses += f", and a packed sequence holds {low * LENGTH_STEP}: a step sees fewer tokens"
        row = Choice(change, found.peak_bytes, 1.0, True, loses)
        return replace(found, choices=(row,))


def _dtype_for(config: TrainConfig, device: str) -> torch.dtype:
    if config.dtype == "auto" and device == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16
    return choose_dtype(config.dtype, torch.device(device))


def products_per_second(dtype: torch.dtype, tokens: int) -> float:
    """Floating-point operations per second of a 4-bit product on this CPU, by trying one of 2048 x 2048."""
    width = 2048
    weight = quantize(torch.full((width, width), 0.01, dtype=torch.bfloat16))
    x = torch.full((max(16, min(tokens, 512)), width), 0.5, dtype=dtype)
    times = []
    for _ in range(4):
        began = time.perf_counter()
        ops.linear_4bit(x, weight.parts, width)
        times.append(time.perf_counter() - began)
    return 2 * x.numel() * width / statistics.median(times[1:])


def timed(plan: MemoryPlan, dtype: torch.dtype) -> MemoryPlan:
    """The plan with an estimate of the training's time on this machine."""
    if plan.device != "cpu" or not plan.steps:
        return plan
    step = plan.flop / products_per_second(dtype, plan.tokens) + plan.calls * CALL_SECONDS + plan.moving_seconds
    return replace(plan, seconds=step * plan.steps)


def plan(
    *config: Any,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = no_progress,
    **options: Any,
) -> MemoryPlan:
    """Bytes and time of a training, without its weights.

    Args:
        config: a `TrainConfig`; or a model and, if there is one, a data file, then whatever there is of
            ``BitsAndBytesConfig``, ``LoraConfig`` and ``SFTConfig`` or ``TrainingArguments``. options: by name
            (fit_to="24GiB", ...), above all others. Without data, rows of max_length are planned for.

    Raises:
        HalfbyteError: the model or the data is refused. That it does not fit is no error here: see ``fits``, `check`.
    """
    kind = TrainConfig if any(type(thing) is TrainConfig for thing in config) else PlanConfig
    wanted = config_of(kind, config, options)
    with cpu.using(wanted.kernels) if "kernels" in wanted.model_fields_set else contextlib.nullcontext():
        return _planned(wanted, say, progress)


def _planned(config: TrainConfig, say: Callable[[str], None], progress: Progress) -> MemoryPlan:
    allocate_apart(PASSING)
    path = hub.resolve(config.model, config.revision, weights=False)
    config = begin_with_adapter(config, path)
    data = read_data(config.data, config, path, say=say, progress=progress) if config.data else None
    planner = Planner(path, config, data, progress)
    if config.fit_to:
        return timed(planner.fit(), planner.dtype)
    change, found = planner.settle()
    for line in settled_in_words(change):
        say(line)
    if not found.fits:
        found = replace(found, choices=planner.ways_out(found))
    return timed(found, planner.dtype)

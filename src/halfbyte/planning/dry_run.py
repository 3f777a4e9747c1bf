"""One training step without numbers, counted: where a plan's bytes come from.

The model is built on the ``meta`` device, made trainable by the code that trains
(`engine.learner`), and one micro-batch of the largest size goes forward, backward and through the
optimizer while every storage is counted (`planning.tracker`). Nothing is estimated by formula that
code allocates; what no tensor shows is added and named: the process or the GPU's context as it is,
buffers of reading, and the allocator's slack. Only ``config.json`` is needed; row lengths of real
data and headers of real weights are used where they are.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..adapters.modules_to_save import trainable_modules
from ..adapters.peft_files import bytes_of_copies
from ..config.options import PlanConfig, TrainConfig
from ..data.batches import collate
from ..data.encoder import TokenizedExample
from ..engine.judge import NEUTRAL_TOKENS, POSITIONS
from ..engine.learner import Learner
from ..engine.loss import chunk_rows
from ..engine.paged_optimizers import is_paged
from ..engine.selftest import Abilities
from ..errors import ModelError, first_line, is_exhaustion
from ..files.safetensors import Checkpoint
from ..ledger import Part
from ..memory.process import held_now
from ..model import attention
from ..model.architecture import FP32_LIMIT
from ..model.fusion import fuse
from ..model.host_embedding import host_table
from ..ops.library import device_type, planning_for
from ..quantization.load import empty_base
from ..quantization.original import exchanged
from ..quantization.tensor import NF4Tensor
from ..run import checkpoint
from .budget import MIB, RESERVE
from .memory_plan import LedgerLine, MemoryPlan
from .parts import offloaded, on_device, sizes, weights_by_part
from .tracker import MemoryTracker
from .workload import Work, work_of

GPU_SLACK = 0.05
"""Share of what comes and goes that PyTorch's caching allocator holds on top (assumed; blocks are 2
MiB and more)."""
PROCESS_GROWTH = 32 * MIB
"""What a process grows by while it loads and trains besides its tensors: code, compiled kernels,
holes of the heap."""
COMPILED = {True: MIB, False: 3 * MIB // 10}
"""What oneDNN keeps for each product of each shape it has met, on a processor that multiplies bf16
and on one that does not."""
READ_ROOM = 8 * MIB


class CannotPlan(ModelError):
    """The model cannot be built or run without numbers; it may train all the same."""


def plan_memory(
    model_config: Any,
    config: TrainConfig,
    work: Work,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    stored: Checkpoint | None = None,
    runtime_bytes: int = 0,
    budget_bytes: int = 0,
) -> MemoryPlan:
    """The plan of one training.

    Args:
        model_config: a transformers configuration.
        device: "cpu" or "cuda".
        dtype: compute dtype.
        stored: the weights' headers, where they are at hand.
        runtime_bytes: of the process (or the GPU's context) before anything.

    Raises:
        CannotPlan: the model cannot be built or run without numbers.
        ModelError: it cannot be trained like this.
    """
    given = _Given(config, work, device, dtype, stored, runtime_bytes)
    failed: list[Exception] = []
    # what cannot keep rows apart in a pass (recurrent layers) is trained row by row
    for packing in (True, False):
        try:
            return _counted(model_config, given, packing).plan(budget_bytes)
        except (
            NotImplementedError,
            RuntimeError,
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
        ) as error:
            if is_exhaustion(error):
                raise
            failed.append(error)
    found = first_line(failed[0])[:200]
    unplanned = CannotPlan("the memory of this model cannot be planned", found=found)
    raise unplanned from failed[0]


@dataclass(frozen=True)
class _PeakOf:
    """tensors, process: bytes at the peak of a phase. parts: of the tensors."""

    tensors: int
    process: int
    parts: dict[Part, int]


@dataclass(frozen=True)
class _Given:
    """What a plan is asked for: the arguments of `plan_memory`."""

    config: TrainConfig
    work: Work
    device: str
    dtype: torch.dtype
    stored: Checkpoint | None
    runtime_bytes: int

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


def _counted(model_config: Any, given: _Given, packing: bool) -> "_Counts":
    """Build the model without numbers, make it trainable, and count a step of it."""
    config = given.config
    with planning_for(given.device):
        model = empty_base(model_config, config, given.dtype, given.stored)
        base = sizes(weights_by_part(model))
        in_4bit = [p.numel() for p in model.parameters() if isinstance(p.data, NF4Tensor)]
        stored_in = getattr(model_config.get_text_config(), "dtype", None) or torch.bfloat16
        base_files = _file_bytes(
            given.stored, sum(p.numel() for p in model.parameters()), stored_in
        )
        fuse(model)
        abilities = Abilities(packing, True, 0.0, 0.0)
        learner = Learner(model, config, abilities, lambda what, line: None)
        parts, streamed = on_device(learner), 0
        if config.weight_streaming == "always" and given.device == "cpu":
            streamed = sum(base.pop(part) for part in STREAMED)
            parts = {part: [] if part in STREAMED else tensors for part, tensors in parts.items()}
        with attention.packed(model, packing):
            peaks, flop, calls = _run(learner, given.work, parts)
        held = sizes({**on_device(learner), **{part: [] for part in STREAMED if streamed}})
    return _Counts(
        given=given,
        learner=learner,
        in_4bit=in_4bit,
        base=sum(base.values()),
        base_files=base_files,
        held=held,
        away=_away(learner, streamed),
        peaks=peaks,
        flop=flop,
        calls=calls,
    )


@dataclass(frozen=True)
class _Counts:
    """What was counted, and the plan that follows from it.

    Attributes:
        in_4bit: weights of each 4-bit tensor.
        base: bytes of the base's weights where it computes.
        base_files: bytes of its files.
        held: bytes that stay from step to step, by part.
        away: those that lie elsewhere.
        peaks: of each phase.
        flop, calls: of a pass.
    """

    given: _Given
    learner: Learner
    in_4bit: list[int]
    base: int
    base_files: int
    held: dict[Part, int]
    away: dict[Part, int]
    peaks: dict[str, _PeakOf]
    flop: int
    calls: int

    def plan(self, budget_bytes: int) -> MemoryPlan:
        given, work, away = self.given, self.given.work, self.away
        moved_in_a_pass = away[Part.OFFLOADED_INPUTS] + away[Part.STREAMED_WEIGHTS]
        phases, tokens = self._phases(budget_bytes), len(work.batch.input_ids)
        return MemoryPlan(
            model=given.config.model,
            device=given.device,
            ledger=tuple(line for line in self._ledger(phases["step"]) if line.bytes),
            phases=phases,
            tensor_bytes=self._step.tensors,
            budget_bytes=budget_bytes,
            parameters=self._parameters,
            lora_parameters=self.held[Part.ADAPTERS] // 4,
            quantized_parameters=sum(self.in_4bit),
            tokens=tokens,
            flop=int(self.flop * work.tokens / tokens),
            calls=self.calls * work.passes,
            moved_bytes=2 * away[Part.PAGED_STATES] + 2 * work.passes * moved_in_a_pass,
            steps=work.steps,
        )

    @property
    def _step(self) -> _PeakOf:
        """The larger of a step's two halves."""
        return max((self.peaks[half] for half in ("backward", "update")), key=lambda p: p.process)

    @property
    def _parameters(self) -> int:
        model = self.learner.model
        table = host_table(model)
        counted = sum({id(p): p.numel() for p in model.parameters()}.values())
        return counted + (0 if table is None else table.numel())

    @property
    def _compiled(self) -> int:
        """What kernels of products that are compiled for each shape take by the end."""
        learner = self.learner
        if not learner.compiles_per_shape or self.given.dtype == torch.float32:
            return 0
        shapes = {tuple(t.shape) for t in weights_by_part(learner.model)[Part.LAYERS]}
        each = 3 if learner.config.full else 2
        kernel = COMPILED[torch.cpu._is_avx512_bf16_supported()]
        return each * len(shapes) * self.given.work.lengths * kernel

    @property
    def _compared(self) -> int:
        """What a merge keeps of two models to compare them, and makes of a chunk of logits."""
        head = self.learner.model.get_output_embeddings().weight
        rows = 2 * POSITIONS + 3 * chunk_rows(head.shape[0], "cpu")
        return 4 * rows * head.shape[0]

    @property
    def _reading(self) -> int:
        return _reading_bytes(self.given.stored, max(self.in_4bit, default=0), self.given.dtype)

    def _phases(self, budget: int) -> dict[str, int]:
        """The peak of device memory in each phase. A run is judged where that takes no more than
        the rest, or fits all the same."""
        given, held = self.given, self.held
        on_gpu, before = given.on_gpu, given.runtime_bytes
        found = {"step": self._step, **{name: self.peaks.get(name) for name in BESIDE}}
        steps = {}
        for name, peak in found.items():
            if peak is not None:
                coming_and_going = peak.tensors - sum(held.values())
                grown = PROCESS_GROWTH + (self._compiled if name != "save" else 0)
                slack = int(GPU_SLACK * coming_and_going) if on_gpu else grown
                steps[name] = before + slack + (peak.tensors if on_gpu else peak.process)
        # while it is loaded, and when what is trained has its gradients and the self-test has been
        # (with one set of them)
        in_8_bits = given.config.optim in ("adamw_8bit", "paged_adamw_8bit")
        made = sum(held.values()) - (0 if in_8_bits else held[Part.OPTIMIZER])
        growth = 0 if on_gpu else PROCESS_GROWTH
        merged = self._parameters * (4 if self._parameters <= FP32_LIMIT else 2)
        loading = before + max(self.base + self._reading, made + growth)
        judging = steps.pop("judge", 0)
        if 0 < judging <= max(loading, *steps.values(), int(budget * (1 - RESERVE))):
            steps["judge"] = judging
        used = before + self.base + held[Part.ADAPTERS] + growth
        return {
            "load": loading,
            "first step": steps["step"],
            **steps,
            "merge": used + max(merged, self._reading) + self._compared,
            "chat": used + max(self.peaks["chat"].process, self._reading),
            "export": used + self._reading,
        }

    def _ledger(self, step_bytes: int) -> list[LedgerLine]:
        """Parts of device memory at the peak of a step, then host and disk."""
        given, held, step, on_gpu = self.given, self.held, self._step, self.given.on_gpu
        trained = held[Part.ADAPTERS] or sum(p.nbytes for p in self.learner.trained)
        one = trained + max(held[Part.OPTIMIZER], self.away[Part.PAGED_STATES])
        result = Part.ADAPTER_FILE if held[Part.ADAPTERS] else Part.MODEL_FILE
        beside = Part.GPU_CONTEXT if on_gpu else Part.PROCESS
        lines = [
            *(LedgerLine(part, step.parts.get(part, 0)) for part in held),
            *(LedgerLine(part, size) for part, size in step.parts.items() if part not in held),
            LedgerLine(beside, given.runtime_bytes),
            LedgerLine(Part.SLACK, step_bytes - given.runtime_bytes - step.tensors),
        ]
        where = "host" if on_gpu else "disk"
        lines += [LedgerLine(part, size, where) for part, size in self.away.items()]
        lines += [
            LedgerLine(Part.CHECKPOINTS, (given.config.save_total_limit + 2) * one, "disk"),
            LedgerLine(result, trained, "disk"),
            LedgerLine(Part.BASE_FILES, self.base_files, "disk"),
        ]
        if on_gpu:
            host = held_now() + PROCESS_GROWTH + self._reading
            lines.append(LedgerLine(Part.HOST_PROCESS, host, "host"))
        return lines


STREAMED = (Part.CODES, Part.SCALES)
"""Parts that stay in a file with weight_streaming."""


def _away(learner: Learner, streamed: int) -> dict[Part, int]:
    """Bytes that lie outside of the memory that is computed in, by part."""
    optimizer, run, table = learner.optimizer, learner.recompute, host_table(learner.model)
    inputs = 0
    if run is not None and run.inputs.away is not None and (inputs := run.inputs.nbytes):
        on_gpu = device_type(run.inputs.like) == "cuda"
        # pinned in one block: a power of two
        inputs = 1 << (inputs - 1).bit_length() if on_gpu else inputs
    return {
        Part.STREAMED_WEIGHTS: streamed,
        Part.HOST_EMBEDDING: 0 if table is None else table.nbytes,
        Part.PAGED_STATES: checkpoint.state_bytes(optimizer) if is_paged(optimizer) else 0,
        Part.OFFLOADED_INPUTS: inputs,
    }


def _run(
    learner: Learner, work: Work, parts: dict[Part, list[torch.Tensor]]
) -> tuple[dict[str, _PeakOf], int, int]:
    """Each phase's peak, on top of what is resident; operations and calls of a pass."""
    found: dict[str, _PeakOf] = {}
    count = MemoryTracker(parts, offloaded(learner))

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
        learner.model.eval()
        # a judge's pass holds no more than a step's, nor than there are rows held out
        beside = max(min(len(work.batch.input_ids), work.eval_tokens), NEUTRAL_TOKENS)
        for phase, tokens in (("eval", work.eval_tokens), ("a pass", beside)):
            if tokens:
                row = TokenizedExample("plan", [0] * tokens, [True] * tokens)
                with torch.no_grad():
                    learner.loss(collate([row], [0]))
                note(phase)
    found |= _beside(learner, work, found["save"], found.pop("a pass"), beside)
    found["save"] = _more(found["save"], bytes_of_copies(learner.model))
    return found, flop, calls


BESIDE = ("eval", "judge", "samples", "save")
"""Phases between and after steps."""


def _beside(
    learner: Learner, work: Work, held: _PeakOf, passed: _PeakOf, tokens: int
) -> dict[str, _PeakOf]:
    """The peaks of judging and answering, from that of a pass of so many tokens without gradients;
    of a chat what it takes beside the model."""
    found: dict[str, _PeakOf] = {}
    model = learner.model
    if learner.config.judge:
        head = model.get_output_embeddings().weight
        rows = min(chunk_rows(head.shape[0], device_type(head)), NEUTRAL_TOKENS)
        logits = 4 * rows * head.shape[0]
        # an original weight, on a CPU as it is read and cast, and logits of two models beside the
        # pass's own
        weight = _original_bytes(model) * (1 if device_type(head) == "cuda" else 2)
        found["judge"] = _more(passed, weight + 2 * logits)
    config = model.config.get_text_config()
    asking = getattr(config, "num_attention_heads", 0)  # none where nothing attends
    heads = getattr(config, "num_key_value_heads", None) or asking
    width = getattr(config, "head_dim", None) or config.hidden_size // max(asking, 1)
    element = torch.finfo(config.dtype or torch.float32).bits // 8
    # keys and values of a token
    cached = 2 * config.num_hidden_layers * heads * width * element

    def answering(tokens_at_once: int) -> int:
        live = (passed.process - held.process) * max(tokens_at_once / tokens, 0.1)
        return int(cached * tokens_at_once + live)

    if work.sample_tokens:
        found["samples"] = _more(held, answering(work.sample_tokens))
    # in a process of its own, without what trains
    found["chat"] = _more(_PeakOf(0, 0, {}), answering(learner.config.max_length))
    return found


def _more(peak: _PeakOf, size: int) -> _PeakOf:
    return _PeakOf(peak.tensors + size, peak.process + size, peak.parts)


def _original_bytes(model: Any) -> int:
    """Of the module with the most weights that are quantized or trained, in the compute dtype."""
    whole: set[nn.Module] = {module for _, module in trainable_modules(model)}
    sizes_of = [
        sum(
            p.numel() * p.data.dtype.itemsize
            for p in (part.parameters() if part in whole else part._parameters.values())
            if p is not None and (isinstance(p.data, NF4Tensor) or p.requires_grad)
        )
        for part in exchanged(model, whole)
    ]
    return max(sizes_of, default=0)


def _reading_bytes(stored: Checkpoint | None, largest_linear: int, dtype: torch.dtype) -> int:
    """What reading the weights takes beside them: the largest tensor that does not stay as it is in
    its file, and room to judge it. Others are read where they stay."""
    if stored is None:
        return READ_ROOM + 2 * largest_linear
    # read, then cast
    whole = max((e.nbytes for e in stored.entries.values() if e.dtype != dtype), default=0)
    scaled = [e.stored_bytes for e in stored.entries.values() if e.stored_bytes != e.nbytes]
    linear = stored.entries[max(stored.entries, key=lambda name: stored.entries[name].nbytes)]
    read = max(whole, min(linear.nbytes, largest_linear * linear.dtype.itemsize))
    return READ_ROOM + read + max(scaled, default=0)


def _file_bytes(stored: Checkpoint | None, parameters: int, dtype: torch.dtype) -> int:
    """Of the base's files: as they are, else its parameters in the type its configuration names."""
    if stored:  # a tensor of two names once
        places = {(e.file, e.start): e.stored_bytes for e in stored.entries.values()}
        return sum(places.values())
    return parameters * dtype.itemsize


def outline(model_config: Any, tokens: int, device: str = "cuda", **options: Any) -> MemoryPlan:
    """The plan of one row of so many tokens for a configuration that lies nowhere, and nothing but
    its tensors."""
    config = PlanConfig(
        model=model_config.model_type, max_length=tokens, dtype="bfloat16", **options
    )
    return plan_memory(model_config, config, work_of(config, None), device=device)

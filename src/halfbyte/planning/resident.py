"""Memory by part: counted in tensors, measured in the process, written to ``memory.jsonl``.

A part is what a person can do something about: the 4-bit codes, the adapters, the layer that is being computed. What
stays through a step is told apart by what it is (`resident`); what comes and goes is counted where it is made
(`TensorBytes`), on real tensors as on the ``meta`` device, so that a plan and a measurement are the same count.
"""

import contextlib
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..adapters.lora import LoraLinear
from ..adapters.modules_to_save import saved_modules
from ..engine.adamw8bit import is_paged
from ..engine.learner import Learner
from ..memory.process import Peak, current_part
from ..model.host_embedding import host_table
from ..ops import cpu
from ..ops.arena import SMALLEST, Pieces
from ..ops.library import hearing_scratch
from ..quantization.tensor import NF4Tensor

RESIDENT = (
    "4-bit codes",
    "scales",
    "16-bit layers",
    "embeddings and head",
    "norms and biases",
    "adapters",
    "gradients",
    "optimizer states",
)


def weights_by_part(model: Any) -> dict[str, list[Tensor]]:
    """The tensors of a model by part, tied ones once; NF4 weights as what they store."""
    parts: dict[str, list[Tensor]] = {part: [] for part in RESIDENT}
    embeddings = [e for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None]
    seen: set[int] = set()
    whole = {id(p) for _, module in saved_modules(model) for p in module.parameters()}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or id(p) in seen:
                continue
            seen.add(id(p))
            data = p if isinstance(p, NF4Tensor) else p.data
            if isinstance(data, NF4Tensor):
                codes, *scales = data.stored_tensors()
                if data.stop is not None:
                    continue  # it stays in a file
                parts["4-bit codes"].append(codes)
                parts["scales"] += scales
            elif (isinstance(module, LoraLinear) and name.startswith("lora_")) or (p.requires_grad and id(p) in whole):
                parts["adapters"].append(data)
            elif any(module is e for e in embeddings) and name == "weight":
                parts["embeddings and head"].append(data)
            elif isinstance(module, nn.Linear) and name == "weight":
                parts["16-bit layers"].append(data)
            else:
                parts["norms and biases"].append(data)
    parts["norms and biases"] += [b for b in model.buffers() if b is not None]
    return parts


def resident(learner: Learner) -> dict[str, list[Tensor]]:
    """What stays from step to step, by part."""
    parts = weights_by_part(learner.model)
    parts["gradients"] = list(learner.gradients)
    optimizer: Any = learner.optimizer
    if hasattr(optimizer, "resident_tensors"):
        parts["optimizer states"] = optimizer.resident_tensors()
    else:
        parts["optimizer states"] = [t for state in optimizer.state.values() for t in state.values()]
    return parts


def elsewhere(learner: Learner) -> list[Tensor]:
    """Tensors of states and weights that take no memory of the device: mapped files, pinned host memory."""
    optimizer: Any = learner.optimizer
    found = list(optimizer.state_tensors().values()) if is_paged(optimizer) else []
    if (table := host_table(learner.model)) is not None:
        found.append(table)
    for p in learner.model.parameters():
        data = p if isinstance(p, NF4Tensor) else p.data
        if isinstance(data, NF4Tensor) and data.stop is not None:
            found += data.stored_tensors()
    return found


def sizes(parts: dict[str, list[Tensor]]) -> dict[str, int]:
    """Bytes of each part, storage that is shared counted once, where it is met first."""
    seen: set[int] = set()
    found: dict[str, int] = {}
    for part, tensors in parts.items():
        found[part] = 0
        for t in tensors:
            storage = t.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                found[part] += storage.nbytes()
    return found


class TensorBytes(TorchDispatchMode):
    """Within this block every storage that operations make is counted until it is gone.

    Attributes: ``now``, ``peak``: bytes of all tensors, now and at most. ``at_peak``: by part. ``process_peak``: bytes
    the process needs for them on a CPU, where results of our operations lie in an arena that keeps what it ever took.
    ``flop``: floating-point operations of products and attention. ``calls``: operations.

    On ``meta`` tensors an operation that is also given real ones (ids, positions) is given shapes in their place.

    Args:
        parts: what is there already. apart: tensors whose storage does not count, nor that of views of them.
    """

    def __init__(self, parts: dict[str, list[Tensor]], apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._apart = [t.untyped_storage() for t in apart]  # held, so that no other takes their place
        self._ignored = {storage._cdata for storage in self._apart}
        self._now = self.peak = self.process_peak = self.flop = self.calls = 0
        self.by_part: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self.arena = Pieces()
        self._kept_scratch: Counter[str] = Counter()
        self._passing, self._passing_part = 0, ""
        self._in_arena = 0
        self._seen: dict[int, Any] = {}
        # finalizers run wherever a storage dies, also in the middle of the lines below: they only leave a note
        self._dead: deque[tuple[int, int, str, int | None]] = deque()
        for part, tensors in parts.items():
            for t in tensors:
                self._add(t, part, False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        ours = func.namespace == "halfbyte"
        if not ours:
            given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            if any(t.is_meta for t in given) and not all(t.is_meta for t in given):
                args, kwargs = tree_map_only(Tensor, _shape_of, (args, kwargs))
        self._passing = 0
        out = func(*args, **kwargs)
        self.calls += 1
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and not isinstance(t, NF4Tensor):
                self._add(t, current_part(), ours and cpu.serves(t))
        self.flop += _flop(func, args, out)
        if self._passing:
            self._note_peak()
            self._passing = 0
        return out

    def __enter__(self) -> "TensorBytes":
        self._listening = hearing_scratch(self._scratch)
        self._listening.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._listening.__exit__(*error)

    def _scratch(self, part: str, size: int, kept: bool) -> None:
        if not kept:
            self._passing += size
            self._passing_part = part
        elif (more := size - self._kept_scratch[part]) > 0:
            self._kept_scratch[part] = size
            self._now += more
            self.by_part[part] += more
            self._note_peak()

    def restart(self) -> None:
        """Forget the peaks; what is held stays counted."""
        self.peak = self.process_peak = self.flop = self.calls = 0
        self._note_peak()

    def _add(self, t: Tensor, part: str, ours: bool) -> None:
        self._bury()
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._seen or key in self._ignored:
            return
        size = storage.nbytes()
        place = self.arena.take(size) if ours and size >= SMALLEST else None
        self._in_arena += size if place is not None else 0
        self._now += size
        self.by_part[part] += size
        self._seen[key] = weakref.finalize(storage, self._dead.append, (key, size, part, place))
        self._note_peak()

    def _note_peak(self) -> None:
        now = self.now + self._passing
        if now > self.peak:
            self.peak, self.at_peak = now, dict(self.by_part)
            if self._passing:
                self.at_peak[self._passing_part] = self.at_peak.get(self._passing_part, 0) + self._passing
        self.process_peak = max(self.process_peak, now - self._in_arena + self.arena.touched)

    @property
    def now(self) -> int:
        """Bytes of all tensors."""
        self._bury()
        return self._now

    def _bury(self) -> None:
        while self._dead:
            key, size, part, place = self._dead.popleft()
            self._seen.pop(key, None)
            self._now -= size
            self.by_part[part] -= size
            if place is not None:
                self._in_arena -= size
                self.arena.give(place)


def _shape_of(t: Tensor) -> Tensor:
    return t if t.is_meta else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def _flop(func: Any, args: Any, out: Any) -> int:
    """Floating-point operations of a call that does many for each byte; 0 for all others."""
    name = func._schema.name.partition("::")[2]
    if name in ("linear_4bit", "linear_4bit_input_grad"):
        return 2 * args[0].numel() * out.shape[-1]
    if name == "lora_input":
        return 2 * args[0].numel() * args[1].shape[0]
    if name == "lora_grads":
        dy, x, u = args[:3]
        return 2 * (2 * dy.numel() + x.numel()) * u.shape[-1]
    if name in ("mm", "addmm", "bmm"):
        left = args[1] if name == "addmm" else args[0]
        return 2 * left.numel() * out.shape[-1]
    if name in ("attention", "attention_grad"):
        q, bounds = (args[0], args[3]) if name == "attention" else (args[1], args[4])
        pairs = sum(length * (length + 1) // 2 for length in bounds.diff().tolist())
        return (4 if name == "attention" else 10) * pairs * q.shape[1] * q.shape[2]
    return 0


# --- while training ---------------------------------------------------------------------------------------------------

DRIFT = 0.05
"""Share of the plan by which a measurement may be above it before it is said aloud."""


class Watch:
    """Measures the peak of each phase, beside what was planned for it: rows of ``memory.jsonl``.

    Args:
        planned: bytes of each phase, as they would be measured; empty without a plan. append: takes a row. say: takes a
            line for people.
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
        """A phase took so many bytes at its peak. Written if it is the phase's first or its highest."""
        before = self.highest.get(name, 0)
        if found <= before * 1.01:
            return
        self.highest[name] = found
        planned = self.planned.get(name)
        parts = sizes(resident(self.learner)) if self.learner is not None else {}
        row = {"phase": name, "step": step, "measured_bytes": found, "planned_bytes": planned, "parts": parts}
        optimizer: Any = None if self.learner is None else self.learner.optimizer
        if optimizer is not None and is_paged(optimizer):
            states = sum(t.nbytes for t in optimizer.state_tensors().values())
            row["paged"] = {"optimizer states": states, "of them in memory": optimizer.resident_bytes()}
        self.append(row)
        if planned and found > planned * (1 + DRIFT):
            self.say(
                f"memory: {name} took {found / 2**20:,.0f} MiB, {found / planned - 1:.0%} more than the "
                f"{planned / 2**20:,.0f} MiB planned"
            )

    def line(self) -> str:
        """What became of the plan, "" where there was none or nothing could be measured."""
        found = max(self.highest.values(), default=0)
        planned = max((self.planned[name] for name in self.highest if name in self.planned), default=0)
        if not found or not planned:
            return ""
        return (
            f"memory: {found / 2**20:,.0f} MiB at the peak, {planned / 2**20:,.0f} planned ({found / planned - 1:+.1%})"
        )

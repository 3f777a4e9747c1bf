"""Memory by part: counted in tensors, measured in the process, written to ``memory.jsonl``.

A part is what a person can do something about: the 4-bit codes, the adapters, the layer that is being computed. What
stays through a step is told apart by what it is (`resident`); what comes and goes is counted where it is made
(`TensorBytes`), on real tensors as on the ``meta`` device, so that a plan and a measurement are the same count.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .learner import Learner
from .lora import LoraLinear
from .memory import current_part
from .nf4 import NF4Tensor
from .ops import cpu
from .ops.arena import SMALLEST, Pieces

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
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or id(p) in seen:
                continue
            seen.add(id(p))
            data = p if isinstance(p, NF4Tensor) else p.data
            if isinstance(data, NF4Tensor):
                codes, *scales = data.stored_tensors()
                parts["4-bit codes"].append(codes)
                parts["scales"] += scales
            elif isinstance(module, LoraLinear) and name in ("lora_A", "lora_B"):
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
    if hasattr(optimizer, "state_tensors"):
        parts["optimizer states"] = list(optimizer.state_tensors().values())
    else:
        parts["optimizer states"] = [t for state in optimizer.state.values() for t in state.values()]
    return parts


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

    Attributes: ``now``, ``peak``: bytes of all tensors. ``at_peak``: by part. ``process_peak``: bytes the process needs
    for them on a CPU, where results of our operations lie in an arena that keeps what it ever took. ``flop``:
    floating-point operations of products and attention. ``calls``: operations.

    On ``meta`` tensors an operation that is also given real ones (ids, positions) is given shapes in their place.
    """

    def __init__(self, parts: dict[str, list[Tensor]]) -> None:
        super().__init__()
        self.now = self.peak = self.process_peak = self.flop = self.calls = 0
        self.by_part: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self.arena = Pieces()
        self._in_arena = 0
        self._seen: dict[int, Any] = {}
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
        out = func(*args, **kwargs)
        self.calls += 1
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor) and not isinstance(t, NF4Tensor):
                self._add(t, current_part(), ours and cpu.serves(t))
        self.flop += _flop(func, args, out)
        return out

    def restart(self) -> None:
        """Forget the peaks; what is held stays counted."""
        self.peak = self.process_peak = self.flop = self.calls = 0
        self._note_peak()

    def _add(self, t: Tensor, part: str, ours: bool) -> None:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes()
        place = self.arena.take(size) if ours and size >= SMALLEST else None
        self._in_arena += size if place is not None else 0
        self.now += size
        self.by_part[part] += size
        self._seen[key] = weakref.finalize(storage, self._gone, key, size, part, place)
        self._note_peak()

    def _note_peak(self) -> None:
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.by_part)
        self.process_peak = max(self.process_peak, self.now - self._in_arena + self.arena.touched)

    def _gone(self, key: int, size: int, part: str, place: int | None) -> None:
        self._seen.pop(key, None)
        self.now -= size
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


# --- the process ------------------------------------------------------------------------------------------------------

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status() -> dict[str, int]:
    """Lines of this process's status that are sizes, bytes; empty where the system has none."""
    found = {}
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            key, _, value = line.partition(":")
            if value.endswith(" kB"):
                found[key] = int(value.split()[0]) * 1024
    return found


class Peak:
    """The most memory used since it was made or restarted, bytes: the CUDA allocator's, or this process's anonymous
    resident memory; 0 where the system does not say."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        self.exact = True
        try:
            _CLEAR.write_text("5")  # the high-water mark of resident memory becomes what is resident now
        except OSError:
            self.exact = False

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        status = _status()
        if not status:
            return 0
        if not self.exact:
            return status["RssAnon"]
        return max(status["VmHWM"] - status["RssFile"] - status["RssShmem"], status["RssAnon"])


def held_now() -> int:
    """Anonymous resident memory of this process, bytes; 0 where the system does not say."""
    return _status().get("RssAnon", 0)


def available(paths: Iterable[Path] = (Path("/sys/fs/cgroup"),)) -> int:
    """Bytes of host memory this process could still take: the system's free memory, or what its cgroup leaves.

    0 where the system does not say.
    """
    free = 0
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    for path in paths:
        for most, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            with contextlib.suppress(OSError, ValueError):
                left = int((path / most).read_text()) - int((path / used).read_text()) + _cache(path)
                free = min(free, max(left, 0)) if free else max(left, 0)
    return free


def _cache(path: Path) -> int:
    """Bytes of a cgroup's file cache, which gives way."""
    with contextlib.suppress(OSError):
        for line in (path / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    return 0

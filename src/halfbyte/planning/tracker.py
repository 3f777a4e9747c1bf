"""Every storage that operations make, counted until it is gone: on real tensors as on the ``meta``
device.

So a plan and a measurement are the same count.
"""

import weakref
from collections import Counter, deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..ledger import Part, current_part
from ..ops import cpu
from ..ops.arena import SMALLEST, FreeList
from ..ops.library import recording_workspace
from ..quantization.tensor import NF4Tensor


class MemoryTracker(TorchDispatchMode):
    """Within this block every storage that operations make is counted until it is gone.

    Attributes: ``now``, ``peak``: bytes of all tensors, now and at most. ``at_peak``: by part.
    ``process_peak``: bytes the process needs for them on a CPU, where results of our operations lie
    in an arena that keeps what it ever took. ``flop``: floating-point operations of products and
    attention. ``calls``: operations.

    On ``meta`` tensors an operation that is also given real ones (ids, positions) is given shapes
    in their place.

    Args:
        parts: what is there already.
        apart: tensors whose storage does not count, nor that of views of them.
    """

    def __init__(self, parts: dict[Part, list[Tensor]], apart: Iterable[Tensor] = ()) -> None:
        super().__init__()
        # held, so that no other takes their place
        self._apart = [t.untyped_storage() for t in apart]
        self._ignored = {storage._cdata for storage in self._apart}
        self._now = self.peak = self.process_peak = self.flop = self.calls = 0
        self.by_part: Counter[Part] = Counter()
        self.at_peak: dict[Part, int] = {}
        self.arena = FreeList()
        self._kept_workspace: Counter[Part] = Counter()
        self._passing, self._passing_part = 0, Part.LIVE_LAYER
        self._in_arena = 0
        self._seen: dict[int, Any] = {}
        # finalizers run wherever a storage dies, also in the middle of the lines below: they only
        # leave a note
        self._dead: deque[tuple[int, int, Part, int | None]] = deque()
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

    def __enter__(self) -> "MemoryTracker":
        self._listening = recording_workspace(self._workspace)
        self._listening.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._listening.__exit__(*error)

    def _workspace(self, part: Part, size: int, kept: bool) -> None:
        if not kept:
            self._passing += size
            self._passing_part = part
        elif (more := size - self._kept_workspace[part]) > 0:
            self._kept_workspace[part] = size
            self._now += more
            self.by_part[part] += more
            self._note_peak()

    def restart(self) -> None:
        """Forget the peaks; what is held stays counted."""
        self.peak = self.process_peak = self.flop = self.calls = 0
        self._note_peak()

    def _add(self, t: Tensor, part: Part, ours: bool) -> None:
        self._free_dead()
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
                self.at_peak[self._passing_part] = (
                    self.at_peak.get(self._passing_part, 0) + self._passing
                )
        self.process_peak = max(self.process_peak, now - self._in_arena + self.arena.touched)

    @property
    def now(self) -> int:
        """Bytes of all tensors."""
        self._free_dead()
        return self._now

    def _free_dead(self) -> None:
        while self._dead:
            key, size, part, place = self._dead.popleft()
            self._seen.pop(key, None)
            self._now -= size
            self.by_part[part] -= size
            if place is not None:
                self._in_arena -= size
                self.arena.give(place)


def _shape_of(t: Tensor) -> Tensor:
    return (
        t if t.is_meta else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
    )


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
        q, cu_seqlens = (args[0], args[3]) if name == "attention" else (args[1], args[4])
        pairs = sum(length * (length + 1) // 2 for length in cu_seqlens.diff().tolist())
        return (4 if name == "attention" else 10) * pairs * q.shape[1] * q.shape[2]
    return 0

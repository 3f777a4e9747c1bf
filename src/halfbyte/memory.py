"""The memory of this process: how much it is, and how it is kept in one piece.

The C library's allocator gives a freed block back only when nothing behind it is in use. Long-lived tensors made
between short-lived ones therefore pin memory that nobody uses. So what lives through a step (gradients, the layers'
inputs) lies in blocks of its own, and what loading leaves behind is given back.
"""

import contextlib
import ctypes
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from .ops.arena import ARENA, SMALLEST


def memory_bytes(device: torch.device) -> int:
    """Peak bytes of the CUDA allocator, or this process's anonymous resident memory (0 where the system hides it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    return 0


def allocate_apart() -> None:
    """Have the C library (glibc) map every larger block by itself, so that it goes back to the system when freed.

    It costs page faults; what is made again and again on a CPU therefore lies in `ops.arena`.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, SMALLEST)


_M_MMAP_THRESHOLD = -3
_part = threading.local()


@contextlib.contextmanager
def counted_as(part: str) -> Iterator[None]:
    """Tensors made within this block belong to this part of a ledger (`ledger.TensorBytes`)."""
    before, _part.name = current_part(), part
    try:
        yield
    finally:
        _part.name = before


def current_part() -> str:
    return getattr(_part, "name", "live layer")


def return_freed() -> None:
    """Give freed memory back to the system: the regions of results (`ops.arena`), and what the C library can (glibc)."""
    ARENA.release()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def hold_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Give parameters zero gradients that stay, in one buffer for each dtype and device; the buffers, to be zeroed.

    A parameter that takes no part in a step then has a gradient of zero instead of none.
    """
    by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
    for p in parameters:
        by_kind.setdefault((p.dtype, p.device), []).append(p)
    buffers = []
    for (dtype, device), members in by_kind.items():
        buffer = torch.zeros(sum(p.numel() for p in members), dtype=dtype, device=device)
        for p, part in zip(members, buffer.split([p.numel() for p in members]), strict=True):
            p.grad = part.view_as(p)
        buffers.append(buffer)
    return buffers


class Slots:
    """Room for tensors of one size that are handed in and taken out again and again: allocated together, once."""

    def __init__(self, count: int) -> None:
        self.count, self.size = count, 0
        self.free: list[Tensor] = []
        self.like = torch.empty(0)

    def put(self, tensor: Tensor) -> "Slot":
        """A copy of a tensor, whose place is free again when the returned object is gone."""
        if tensor.numel() > self.size or (tensor.dtype, tensor.device) != (self.like.dtype, self.like.device):
            self.free, self.size = [], tensor.numel()
            self.like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            with counted_as("kept layer inputs"):
                self.free = list(self.like.new_empty(self.count, self.size))
        place = self.free.pop() if self.free else self._another()
        copy = place[: tensor.numel()].view(tensor.shape)
        copy.copy_(tensor)
        return Slot(self, place, copy)

    def _another(self) -> Tensor:
        with counted_as("kept layer inputs"):
            return self.like.new_empty(self.size)


class Slot:
    """A tensor in `Slots`."""

    def __init__(self, slots: Slots, place: Tensor, tensor: Tensor) -> None:
        self.slots, self.place, self.tensor = slots, place, tensor

    def __del__(self) -> None:
        slots, place = self.slots, self.place
        if place.numel() == slots.size and place.dtype == slots.like.dtype and len(slots.free) < slots.count:
            slots.free.append(place)

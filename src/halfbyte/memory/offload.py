"""Layer inputs that wait for the backward pass elsewhere: in a file (CPU) or in pinned host memory (GPU)."""

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..ops.library import device_type
from .mapped_files import Room, _pages
from .parts import counted_as
from .process import return_pinned


class Slots:
    """Room for tensors of one size that are handed in one after the other and taken out in the opposite order, again
    and again: allocated together, once.

    Args:
        count: as many are expected at a time. away: where they lie meanwhile: in memory (None), or in a file in that
            directory (CPU) or pinned host memory (GPU). staged: as for `Pages`.
    """

    def __init__(self, count: int, away: Path | None = None, staged: bool | None = None) -> None:
        self.count, self.size, self.away = count, 0, away
        self.free: list[Tensor] = []
        self.like = torch.empty(0)
        self.room: Room | None = None
        self._staged = staged
        self._stream: Any = None
        self._last: weakref.ref[Slot] | None = None

    @property
    def staged(self) -> bool:
        """Whether tensors are copied to another device's memory and back."""
        return device_type(self.like) == "cuda" if self._staged is None else self._staged

    @property
    def nbytes(self) -> int:
        """Bytes of all expected places."""
        return self.count * self.size * self.like.element_size()

    def put(self, tensor: Tensor) -> "Slot":
        """A copy of a tensor, whose place is free again when the returned object is gone."""
        if tensor.numel() > self.size or (tensor.dtype, tensor.device) != (self.like.dtype, self.like.device):
            self.size = tensor.numel()
            self.like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            self._make()
        before, place = self._last, self.free.pop() if self.free else self._another()
        slot = Slot(self, place, tensor.shape, None if before is None else before())
        slot.fill(tensor)
        self._last = weakref.ref(slot)
        return slot

    def prepare(self, like: "Slots") -> None:
        """Make room for what other slots were for, now.

        Raises:
            StorageError, MemoryError: there is none.
        """
        if like.size:
            self.size, self.like = like.size, like.like
            self._make()

    @property
    def held_bytes(self) -> int:
        """Bytes of the memory that is computed in, which stay taken between passes."""
        return self.nbytes if self.away is None and self.size else 0

    def _make(self) -> None:
        """Places for ``count`` tensors of the size."""
        self.free, self.room = [], None
        if self.away is None or (self.staged and self.like.is_meta):
            with counted_as("kept layer inputs"):
                places = self.like.new_empty(self.count, self.size) if self.away is None else None
            self.free = list(places) if places is not None else []
        elif self.staged:
            pin = self.like.device.type == "cuda"
            if pin and self._stream is None:  # one for all: copies in it are in order
                self._stream = torch.cuda.Stream(self.like.device)
            if pin:  # smaller places were here before, perhaps
                return_pinned()
            self.free = list(torch.empty(self.count, self.size, dtype=self.like.dtype, pin_memory=pin))
        elif not self.like.is_meta:
            stride = _pages(0, self.size * self.like.element_size())[1]
            self.room = Room(self.count * stride, self.away)
            self.free = [self.room.tensor(i * stride, self.size, self.like.dtype) for i in range(self.count)]

    def _another(self) -> Tensor:
        """A place beyond those that were expected (or one that stands for a place elsewhere, on ``meta``)."""
        if self.away is not None and self.like.is_meta:
            return self.like
        if self.away is not None and self.staged:
            return torch.empty(self.size, dtype=self.like.dtype, pin_memory=self._stream is not None)
        with counted_as("kept layer inputs"):
            return self.like.new_empty(self.size)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.like.device))
        with torch.cuda.stream(self._stream):
            yield


class Slot:
    """A tensor in `Slots`."""

    def __init__(self, slots: Slots, place: Tensor, shape: torch.Size, before: "Slot | None") -> None:
        self.slots, self.place, self.shape = slots, place, shape
        self.before = None if before is None else weakref.ref(before)
        self.room = slots.room if slots.room is not None and slots.room.range(place) else None
        self._came: Any = None
        self._back: Tensor | None = None

    def _view(self) -> Tensor:
        return self.place[: self.shape.numel()].view(self.shape)

    def fill(self, tensor: Tensor) -> None:
        """Copy a tensor here."""
        slots = self.slots
        if self.place.numel() < tensor.numel():  # it stands for a place elsewhere
            return
        if slots.away is None or not slots.staged:
            self._view().copy_(tensor)
            if self.room is not None:
                self.room.release(*self.room.range(self.place))
            return
        with slots._copying():
            self._view().copy_(tensor, non_blocking=True)
            if slots._stream is not None:
                tensor.record_stream(slots._stream)

    def take(self) -> Tensor:
        """The tensor, where it can be computed with; what was handed in before it begins to come."""
        before = None if self.before is None else self.before()
        if self.slots.away is None:
            return self._view()
        self._come()
        if before is not None:
            before._come()
        if self._back is None:
            return self._view()
        if self._came is not None:
            here = torch.cuda.current_stream(self.slots.like.device)
            here.wait_event(self._came)
            self._back.record_stream(here)
        return self._back

    def _come(self) -> None:
        """Begin to bring the tensor back."""
        slots = self.slots
        if self.room is not None:
            self.room.will_need(*self.room.range(self.place))
        elif self._back is None and slots.like.is_meta and not slots.staged:  # a mapped place: nothing is counted
            with _disable_current_modes():
                self._back = slots.like.new_empty(self.shape)
        elif self._back is None and slots.staged:
            with slots._copying(), counted_as("kept layer inputs"):
                self._back = slots.like.new_empty(self.shape)
                if self.place.numel() >= self.shape.numel():
                    self._back.copy_(self._view(), non_blocking=True)
                if slots._stream is not None:
                    self._came = slots._stream.record_event()

    def __del__(self) -> None:
        slots, place = self.slots, self.place
        if self.room is not None and self.room is slots.room:
            self.room.release(*self.room.range(place))
        fits = place.numel() == slots.size and place.dtype == slots.like.dtype
        if fits and (slots.room is None or self.room is slots.room) and len(slots.free) < slots.count:
            slots.free.append(place)

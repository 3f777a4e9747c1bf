"""Layer inputs that wait for the backward pass elsewhere: in a file (CPU) or in pinned host memory
(GPU)."""

import contextlib
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..ledger import Part, counted_as
from ..ops.library import device_type
from .mapped_files import ScratchFile, _pages
from .process import return_pinned


class OffloadPool:
    """A last-in, first-out pool of places for tensors of one size, used again and
    again: allocated together, once.

    Args:
        count: as many are expected at a time.
        away: where they lie meanwhile: in memory (None), or in a file in that directory (CPU) or
            pinned host memory (GPU).
        staged: as for `Pages`.
    """

    def __init__(self, count: int, away: Path | None = None, staged: bool | None = None) -> None:
        self.count, self.size, self.away = count, 0, away
        self.free: list[Tensor] = []
        self.like = torch.empty(0)
        self.file: ScratchFile | None = None
        self._staged = staged
        self._stream: Any = None
        self._last: weakref.ref[OffloadedTensor] | None = None

    @property
    def staged(self) -> bool:
        """Whether tensors are copied to another device's memory and back."""
        return device_type(self.like) == "cuda" if self._staged is None else self._staged

    @property
    def nbytes(self) -> int:
        """Bytes of all expected places."""
        return self.count * self.size * self.like.element_size()

    def put(self, tensor: Tensor) -> "OffloadedTensor":
        """A copy of a tensor, whose place is free again when the returned object is gone."""
        if tensor.numel() > self.size or (tensor.dtype, tensor.device) != (
            self.like.dtype,
            self.like.device,
        ):
            self.size = tensor.numel()
            self.like = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            self._make()
        before, place = self._last, self.free.pop() if self.free else self._another()
        held = OffloadedTensor(self, place, tensor.shape, None if before is None else before())
        held.fill(tensor)
        self._last = weakref.ref(held)
        return held

    def prepare(self, like: "OffloadPool") -> None:
        """Make places for what another pool was for, now.

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
        self.free, self.file = [], None
        if self.away is None or (self.staged and self.like.is_meta):
            with counted_as(Part.LAYER_INPUTS):
                places = self.like.new_empty(self.count, self.size) if self.away is None else None
            self.free = list(places) if places is not None else []
        elif self.staged:
            pin = self.like.device.type == "cuda"
            if pin and self._stream is None:  # one for all: copies in it are in order
                self._stream = torch.cuda.Stream(self.like.device)
            if pin:  # smaller places were here before, perhaps
                return_pinned()
            self.free = list(
                torch.empty(self.count, self.size, dtype=self.like.dtype, pin_memory=pin)
            )
        elif not self.like.is_meta:
            stride = _pages(0, self.size * self.like.element_size())[1]
            self.file = ScratchFile(self.count * stride, self.away)
            self.free = [
                self.file.tensor(i * stride, self.size, self.like.dtype) for i in range(self.count)
            ]

    def _another(self) -> Tensor:
        """A place beyond those that were expected (or one that stands for a place elsewhere, on
        ``meta``)."""
        if self.away is not None and self.like.is_meta:
            return self.like
        if self.away is not None and self.staged:
            return torch.empty(
                self.size, dtype=self.like.dtype, pin_memory=self._stream is not None
            )
        with counted_as(Part.LAYER_INPUTS):
            return self.like.new_empty(self.size)

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.like.device))
        with torch.cuda.stream(self._stream):
            yield


class OffloadedTensor:
    """A tensor in `OffloadPool`."""

    def __init__(
        self, pool: OffloadPool, place: Tensor, shape: torch.Size, before: "OffloadedTensor | None"
    ) -> None:
        self.pool, self.place, self.shape = pool, place, shape
        self.before = None if before is None else weakref.ref(before)
        self.file = pool.file if pool.file is not None and pool.file.range(place) else None
        self._came: Any = None
        self._back: Tensor | None = None

    def _view(self) -> Tensor:
        return self.place[: self.shape.numel()].view(self.shape)

    def fill(self, tensor: Tensor) -> None:
        """Copy a tensor here."""
        pool = self.pool
        if self.place.numel() < tensor.numel():  # it stands for a place elsewhere
            return
        if pool.away is None or not pool.staged:
            self._view().copy_(tensor)
            if self.file is not None:
                self.file.release(*self.file.range(self.place))
            return
        with pool._copying():
            self._view().copy_(tensor, non_blocking=True)
            if pool._stream is not None:
                tensor.record_stream(pool._stream)

    def take(self) -> Tensor:
        """The tensor, where it can be computed with; what was handed in before it begins to
        come."""
        before = None if self.before is None else self.before()
        if self.pool.away is None:
            return self._view()
        self._come()
        if before is not None:
            before._come()
        if self._back is None:
            return self._view()
        if self._came is not None:
            here = torch.cuda.current_stream(self.pool.like.device)
            here.wait_event(self._came)
            self._back.record_stream(here)
        return self._back

    def _come(self) -> None:
        """Begin to bring the tensor back."""
        pool = self.pool
        if self.file is not None:
            self.file.will_need(*self.file.range(self.place))
        # a mapped place: nothing is counted
        elif self._back is None and pool.like.is_meta and not pool.staged:
            with _disable_current_modes():
                self._back = pool.like.new_empty(self.shape)
        elif self._back is None and pool.staged:
            with pool._copying(), counted_as(Part.LAYER_INPUTS):
                self._back = pool.like.new_empty(self.shape)
                if self.place.numel() >= self.shape.numel():
                    self._back.copy_(self._view(), non_blocking=True)
                if pool._stream is not None:
                    self._came = pool._stream.record_event()

    def __del__(self) -> None:
        pool, place = self.pool, self.place
        if self.file is not None and self.file is pool.file:
            self.file.release(*self.file.range(place))
        fits = place.numel() == pool.size and place.dtype == pool.like.dtype
        if fits and (pool.file is None or self.file is pool.file) and len(pool.free) < pool.count:
            pool.free.append(place)

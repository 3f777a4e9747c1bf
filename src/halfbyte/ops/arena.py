"""Where results of operations on the CPU lie: pieces of a few large regions, used again and again.

A training step takes and returns the same megabytes thousands of times. The C library either asks
the system for each anew, which costs a page fault for every 4 KiB, or keeps freed pieces between
live ones and grows. Here the smallest free piece that fits is taken, a returned one joins its
neighbours, and a region stays mapped: from the second step on nothing is asked of the system.
`FreeList` is the bookkeeping alone, which a memory plan runs on sizes.
"""

import mmap
import threading
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

SMALLEST = 1 << 16
"""Bytes from which on a tensor is laid into a region; smaller ones are the C library's, which
handles them well."""
_GRAIN = 4096
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_REGION = 16 << 20


class FreeList:
    """Which bytes of a growing address space are taken. Addresses are bytes; regions are never
    joined."""

    def __init__(self) -> None:
        self.regions: list[tuple[int, int]] = []  # start and size
        self.touched = 0
        """Bytes that were ever taken since the regions were made: what is resident."""
        self._marks: list[int] = []  # of each region, the end of what was ever taken
        self._free: list[tuple[int, int]] = []  # start and size, by start
        self._taken: dict[int, int] = {}
        self._end = 0
        self._next = _REGION

    def take(self, size: int) -> int:
        """The address of ``size`` free bytes."""
        size = -(-size // _GRAIN) * _GRAIN
        fitting = [piece for piece in self._free if piece[1] >= size]
        start, space = min(fitting, key=lambda piece: piece[1]) if fitting else self._grow(size)
        at = bisect_left(self._free, (start, space))
        if space > size:
            self._free[at] = (start + size, space - size)
        else:
            del self._free[at]
        self._taken[start] = size
        region = self.region(start)
        if (over := start + size - self._marks[region]) > 0:
            self._marks[region] += over
            self.touched += over
        return start

    @property
    def taken(self) -> int:
        """Bytes taken now."""
        return sum(self._taken.values())

    def region(self, address: int) -> int:
        """The number of the region that an address lies in."""
        return bisect_left(self.regions, (address + 1, 0)) - 1

    def give(self, start: int) -> bool:
        """Return what was taken at ``start``; True if nothing is taken any more and several regions
        became none."""
        size = self._taken.pop(start)
        at = bisect_left(self._free, (start, 0))
        edges = {first for first, _ in self.regions}
        if at < len(self._free) and self._free[at][0] == start + size and start + size not in edges:
            size += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == start and start not in edges:
            at -= 1
            first, before = self._free.pop(at)
            start, size = first, before + size
        self._free.insert(at, (start, size))
        if self._taken or len(self.regions) < 2:
            return False
        self._next = sum(size for _, size in self.regions)
        self.regions, self._free, self._marks, self.touched = [], [], [], 0
        return True

    def forget(self, start: int) -> None:
        """Undo `take`, and the region it made: there is no memory for it."""
        number = self.region(start)
        first, size = self.regions.pop(number)
        self.touched -= self._marks.pop(number) - first
        self._taken = {
            at: taken for at, taken in self._taken.items() if not first <= at < first + size
        }
        self._free = [piece for piece in self._free if not first <= piece[0] < first + size]

    def _grow(self, size: int) -> tuple[int, int]:
        region = (self._end, max(size, self._next))
        self.regions.append(region)
        self._marks.append(region[0])
        self._free.append(region)
        self._next = _REGION
        # a gap, so that the last piece of a region never ends where the next begins
        self._end += region[1] + _GRAIN
        return region


class Arena:
    """Memory for `FreeList`. Thread-safe; a piece is free again when no tensor looks at it."""

    def __init__(self) -> None:
        self.pieces = FreeList()
        self._maps: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._returned: deque[int] = deque()
        self._watched: dict[int, Any] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialized contiguous tensor on the CPU."""
        count = 1
        for extent in shape:
            count *= extent
        size = count * dtype.itemsize
        if size < SMALLEST:
            return torch.empty(shape, dtype=dtype, device="cpu")
        with self._lock:
            self._collect()
            start = self.pieces.take(size)
            first, length = self.pieces.regions[self.pieces.region(start)]
            if first not in self._maps:
                try:
                    self._maps[first] = numpy.frombuffer(
                        mmap.mmap(-1, length, **_PRIVATE), dtype=numpy.uint8
                    )
                except OSError as error:
                    self.pieces.forget(start)
                    raise MemoryError(
                        f"no memory for a tensor of {size} bytes: {error.strerror}"
                    ) from None
            piece = self._maps[first][start - first : start - first + size]
            # called wherever the tensor dies, also inside this very method: it only notes the
            # address
            self._watched[start] = weakref.ref(
                piece, lambda gone, start=start: self._returned.append(start)
            )
        # a tensor of its own and no view, which autograd would not let anyone change in place
        storage = torch.frombuffer(piece, dtype=torch.uint8).untyped_storage()
        with torch.no_grad():
            return torch.empty(0, dtype=dtype, device="cpu").set_(
                storage, 0, torch.Size(shape), _strides(shape)
            )

    @property
    def unused(self) -> int:
        """Bytes that are in memory and that no tensor lies in."""
        with self._lock:
            self._collect()
            return max(self.pieces.touched - self.pieces.taken, 0)

    def release(self) -> None:
        """Give the regions back to the system, if no tensor lies in them."""
        with self._lock:
            self._collect()
            if not self.pieces.taken:
                self.pieces, self._maps = FreeList(), {}

    def _collect(self) -> None:
        while self._returned:
            start = self._returned.popleft()
            del self._watched[start]
            if self.pieces.give(start):
                self._maps = {}


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a contiguous tensor."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


ARENA = Arena()

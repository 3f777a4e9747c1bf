"""Where a 4-bit weight lies while a product reads it, where it has to be dequantized first.

(The C++ library and the product with a few tokens read weights as they multiply: nothing of this is
for them.) How long a dequantized weight stays is a trade of memory for time, and changes no number:

    product   until another is needed: one buffer, of the size of the largest weight
    ahead     two such buffers: while a product reads one, a stream of its own fills the other
              with the weight that came next the last time
    layer     in a layer that is run again for its gradients, until its backward pass is over:
              the products of that pass read weights that are there. Beside the one buffer, a
              layer's weights

Each is a kind of buffer; `weight` goes to the one that is in use (`DequantBuffer.in_use`).
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ledger import Part
from .library import record_workspace

Parts = tuple[Any, ...]
"""`fourbit.FourBit`, as operations take it."""
Key = tuple[int, int, int]


def _key(parts: Parts, count: int) -> Key:
    """Tells a weight from others as long as both are there (also on ``meta``, where all addresses
    are 0)."""
    packed: Tensor = parts[0]
    return packed.untyped_storage()._cdata, int(packed.storage_offset()), count


def _dequantize(parts: Parts, out: Tensor) -> Tensor:
    torch.ops.halfbyte.dequantize_4bit(*parts, out)
    return out


def _room(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # what is made while generating must serve training, too
        return torch.empty(count, dtype=dtype, device=device)


_buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _shared(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The memory of all buffers, at least so large."""
    if (device, dtype) not in _buffers or _buffers[device, dtype].numel() < count:
        _buffers.pop((device, dtype), None)  # before another is made
        _buffers[device, dtype] = _room(count, dtype, device)
    return _buffers[device, dtype]


class DequantBuffer:
    """One weight at a time, in memory that all buffers share and that the next weight
    overwrites."""

    def weight(self, parts: Parts, count: int, dtype: torch.dtype, back: bool) -> Tensor:
        """The values of a stored weight, [count], to be read by one product, on the current stream.

        Args:
            back: the product is one of the backward pass.
        """
        device = parts[0].device
        return _dequantize(parts, _shared(count, dtype, device)[:count])

    def plan(self, parts: Parts, count: int, dtype: torch.dtype) -> None:
        """Say, on the ``meta`` device, what `weight` would take."""
        record_workspace(Part.DEQUANTIZED_WEIGHT, count * dtype.itemsize, kept=True)

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        """Within this block a layer is run again and its gradients are computed."""
        yield

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Within this block products, of all threads, read their weights from here."""
        global _now
        before, _now = _now, self
        try:
            yield
        finally:
            _now = before


class _Written(NamedTuple):
    """What a buffer holds (and the weight itself: its address means nothing once it is gone), and
    the event after which it does (None: written by the stream that reads it)."""

    key: Key
    parts: Parts
    event: Any


@dataclass
class _CopyStream:
    """Two buffers of one type on one GPU, and the stream that fills them."""

    stream: Any
    buffers: list[Tensor] = field(default_factory=list)
    holds: list[_Written | None] = field(default_factory=lambda: [None, None])
    at: int = 0
    """The buffer that was handed out last."""
    before: tuple[Any, ...] = ()
    """The last two weights and directions."""
    followers: dict[tuple[Any, ...], tuple[Key, Parts]] = field(default_factory=dict)
    """Of two weights in a row, the weight that came next the last time."""


class PrefetchBuffer(DequantBuffer):
    """Two buffers, one of them the shared one: the next weight is written to one while a product
    reads the other.

    The order of products is learned as they come; a wrong guess costs a weight that is dequantized
    for nothing. Three orders keep it right: a buffer is filled by the side stream after every
    product that was launched before (one of them may read it); a product waits for the event behind
    the filling; and where a weight is written by the computing stream itself, that waits for
    whatever the side stream was writing there.
    """

    def __init__(self) -> None:
        self._lanes: dict[tuple[torch.device, torch.dtype], _CopyStream] = {}

    def weight(self, parts: Parts, count: int, dtype: torch.dtype, back: bool) -> Tensor:
        device, key = parts[0].device, _key(parts, count)
        lane = self._lanes.get((device, dtype))
        if lane is None:
            lane = self._lanes[device, dtype] = _CopyStream(torch.cuda.Stream(device))
        here = torch.cuda.current_stream(device)
        self._make_room(lane, count, dtype, device, here)
        if not self._is_there(lane, lane.at, key):
            lane.at = 1 - lane.at
            held = lane.holds[lane.at]
            if held is not None and held.event is not None:
                here.wait_event(held.event)
            if not self._is_there(lane, lane.at, key):
                _dequantize(parts, lane.buffers[lane.at][:count])
            lane.holds[lane.at] = _Written(key, parts, None)
        lane.followers[lane.before] = (key, parts)
        lane.before = (*lane.before[-1:], (key, back))
        if (follower := lane.followers.get(lane.before)) is not None:
            self._begin(lane, *follower, here)
        return lane.buffers[lane.at][:count]

    @staticmethod
    def _is_there(lane: _CopyStream, place: int, key: Key) -> bool:
        held = lane.holds[place]
        return held is not None and held.key == key

    def _begin(self, lane: _CopyStream, key: Key, parts: Parts, here: Any) -> None:
        """Have a weight written to the buffer that the coming product does not read."""
        place = 1 - lane.at
        if self._is_there(lane, lane.at, key) or self._is_there(lane, place, key):
            return
        lane.stream.wait_event(here.record_event())
        with torch.cuda.stream(lane.stream):
            _dequantize(parts, lane.buffers[place][: key[2]])
            lane.holds[place] = _Written(key, parts, lane.stream.record_event())

    @staticmethod
    def _make_room(
        lane: _CopyStream, count: int, dtype: torch.dtype, device: torch.device, here: Any
    ) -> None:
        if (
            lane.buffers
            and lane.buffers[0] is _buffers.get((device, dtype))
            and lane.buffers[0].numel() >= count
        ):
            return
        here.wait_stream(lane.stream)  # whoever is given this memory next computes here
        lane.buffers, lane.holds = [], [None, None]
        shared = _shared(count, dtype, device)
        lane.buffers = [shared, _room(shared.numel(), dtype, device)]

    def plan(self, parts: Parts, count: int, dtype: torch.dtype) -> None:
        record_workspace(Part.DEQUANTIZED_WEIGHT, 2 * count * dtype.itemsize, kept=True)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        for lane in self._lanes.values():  # others may have written to the shared buffer meanwhile
            lane.holds = [None, None]
        try:
            with super().in_use():
                yield
        finally:  # a weight nobody came for may still be on its way to memory that is given back
            for (device, _), lane in self._lanes.items():
                torch.cuda.current_stream(device).wait_stream(lane.stream)


class LayerBuffer(DequantBuffer):
    """One weight at a time, but for a layer that is run again: what it dequantizes stays until
    `layer` is over."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Key, torch.dtype], tuple[Parts, Tensor]] | None = None
        self._planned: dict[tuple[Key, torch.dtype], Parts] = {}

    def weight(self, parts: Parts, count: int, dtype: torch.dtype, back: bool) -> Tensor:
        if self._kept is None:
            return super().weight(parts, count, dtype, back)
        key = _key(parts, count), dtype
        if key not in self._kept:
            self._kept[key] = parts, _dequantize(parts, _room(count, dtype, parts[0].device))
        return self._kept[key][1]

    def plan(self, parts: Parts, count: int, dtype: torch.dtype) -> None:
        if self._kept is None:
            super().plan(parts, count, dtype)
            return
        self._planned[_key(parts, count), dtype] = parts
        total = sum(key[2] * kept.itemsize for key, kept in self._planned)
        record_workspace(Part.DEQUANTIZED_LAYER, total, kept=True)

    @contextlib.contextmanager
    def layer(self) -> Iterator[None]:
        before, self._kept = self._kept, {}
        try:
            yield
        finally:
            self._kept = before
            self._planned.clear()


BUFFERS: dict[str, Callable[[], DequantBuffer]] = {
    "product": DequantBuffer,
    "ahead": PrefetchBuffer,
    "layer": LayerBuffer,
}
_now = DequantBuffer()


def weight(parts: Parts, rows: int, columns: int, dtype: torch.dtype, *, back: bool) -> Tensor:
    """A stored weight as [rows, columns], to be read by one product: the next call may overwrite
    it."""
    return _now.weight(parts, rows * columns, dtype, back).view(rows, columns)


def plan(parts: Parts, count: int, dtype: torch.dtype) -> None:
    """Say, in a fake, what a product's weight takes."""
    _now.plan(parts, count, dtype)


def layer() -> contextlib.AbstractContextManager[None]:
    """Within this block a layer is run again and its gradients are computed."""
    return _now.layer()

"""Streams of a GPU that is not there: what is computed on CPU tensors is watched as if it were
asynchronous.

Every operation belongs to the stream that was current; events and waits order them. Two accesses to
one tensor, one of them a write, that nothing orders are a race: on a GPU they happen in any order,
here it is found without one. The bookkeeping is that of PyTorch's own CUDA sanitizer. Memory that
is given back while a stream may still use it is reported, too, as PyTorch's allocator would hand it
to the stream that made it.
"""

import contextlib
import itertools
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.cuda._sanitizer import EventHandler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COMPUTING = 0


class Event:
    def __init__(self, number: int) -> None:
        self.number = number


class Stream:
    """What is used of `torch.cuda.Stream`."""

    def __init__(self, watch: "StreamWatch", number: int) -> None:
        self.watch, self.number = watch, number

    def record_event(self) -> Event:
        event = Event(next(self.watch.events))
        self.watch.handler._handle_event_creation(event.number)
        self.watch.handler._handle_event_record(event.number, self.number)
        return event

    def wait_event(self, event: Event) -> None:
        self.watch.handler._handle_event_wait(event.number, self.number)

    def wait_stream(self, other: "Stream") -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.watch.handler._handle_stream_synchronization(self.number)


class StreamWatch(TorchDispatchMode):
    """Within this block streams are watched; ``races`` says what was found, ``calls`` (operation,
    stream) of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.handler, self.events, self.numbers = (
            EventHandler(),
            itertools.count(1),
            itertools.count(1),
        )
        self.now = self.computing = Stream(self, COMPUTING)
        self.races: list[str] = []
        self.calls: list[tuple[str, int]] = []
        self._makers: dict[int, int] = {}
        self._lent: dict[int, set[int]] = {}

    def make(self, device: Any = None) -> Stream:
        stream = Stream(self, next(self.numbers))
        self.handler._handle_stream_creation(stream.number)
        return stream

    @contextlib.contextmanager
    def switch(self, stream: Stream) -> Iterator[None]:
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def lend(self, tensor: Tensor, stream: Stream) -> None:
        """`Tensor.record_stream`."""
        self._lent.setdefault(tensor.untyped_storage()._cdata, set()).add(stream.number)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        written = set()
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= {
                    t.untyped_storage()._cdata for t in tree_leaves(value) if isinstance(t, Tensor)
                }
        for name, value in kwargs.items():
            if any(
                a.name == name and a.alias_info and a.alias_info.is_write
                for a in func._schema.arguments
            ):
                written |= {
                    t.untyped_storage()._cdata for t in tree_leaves(value) if isinstance(t, Tensor)
                }
        out = func(*args, **kwargs)
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and (key := t.untyped_storage()._cdata) not in given | written:
                written.add(key)
                if key not in self._makers:
                    self._makers[key] = self.now.number
                    self.handler._handle_memory_allocation(key)
                    weakref.finalize(t.untyped_storage(), self._given_back, key)
        views_only = not written and func.is_view
        reads = set() if views_only else given - written
        if func.namespace == "halfbyte":
            self.calls.append((func._schema.name.partition("::")[2], self.now.number))
        names = {key: [] for key in reads | written}
        found = self.handler._handle_kernel_launch(
            self.now.number, reads, written, written, str(func), names
        )
        self.races += [
            f"{e.current_access.operator} and {e.previous_access.operator}" for e in found
        ]  # pyright: ignore
        return out

    def _given_back(self, key: int) -> None:
        maker, lent = self._makers.pop(key), self._lent.pop(key, set())
        accesses = self.handler.tensors_accessed
        last = [*accesses.get_reads(key), *([write] if (write := accesses.get_write(key)) else [])]
        for access in last:
            ordered = self.handler.syncs.is_ordered_after(maker, access.seq_num, access.stream)
            if access.stream != maker and access.stream not in lent and not ordered:
                self.races.append(f"given back while {access.operator} may be using it")
        self.handler._handle_memory_deallocation(key)


@contextlib.contextmanager
def watched() -> Iterator[StreamWatch]:
    watch = StreamWatch()
    with pytest.MonkeyPatch.context() as patch, watch:
        patch.setattr(torch.cuda, "Stream", watch.make)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: watch.now)
        patch.setattr(torch.cuda, "stream", watch.switch)
        patch.setattr(Tensor, "record_stream", lambda tensor, stream: watch.lend(tensor, stream))
        yield watch

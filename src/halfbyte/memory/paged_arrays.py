"""Memory that lies elsewhere than where a model computes, and comes when it is used.

Beside a CPU that is a file, mapped: its pages take memory while they are used, and what they hold is never lost with
them. Beside a GPU it is pinned host memory, copied back and forth by a stream of its own. Four things may lie there:
optimizer states and layer inputs, which are written (`Room`, `Pages`, `Slots`), and weights, which are only read
(`Mapped`, `Travel`). Everyone asks in the order in which things will be used, so that they can be read ahead.

Unlike CUDA's managed memory, what moves when is written down here, and small tensors move like large ones. Windows
takes no advice on mapped pages: there it works, and the system decides what stays.
"""

import contextlib
import mmap
import os
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..errors import StorageError
from ..ops.library import device_type
from .process import counted_as, is_exhaustion, return_pinned

PAGE, MIB = mmap.PAGESIZE, 1 << 20
_CAN_ADVISE = hasattr(mmap.mmap, "madvise") and hasattr(mmap, "MADV_DONTNEED")
READ_STEP = 128 << 10
"""Bytes asked for at once: the kernel reads no more ahead for one request, whatever it is asked for."""


def scratch_directory() -> Path:
    """Where files without names go if nobody says: a disk rather than memory that looks like one."""
    for place in (Path("/var/tmp"), Path(tempfile.gettempdir())):
        if place.is_dir() and os.access(place, os.W_OK):
            return place
    return Path.cwd()


def lies_in_memory(directory: Path) -> bool:
    """Whether a directory's files are memory themselves (tmpfs), as far as the system says."""
    longest, kind = 0, ""
    with contextlib.suppress(OSError):
        real = os.path.realpath(directory)
        for line in Path("/proc/mounts").read_text().splitlines():
            _, place, this, *_ = line.split(" ")
            if len(place) >= longest and os.path.commonpath([place, real]) == place:
                longest, kind = len(place), this
    return kind in ("tmpfs", "ramfs")


def _pages(start: int, stop: int) -> tuple[int, int]:
    """(start, length) of the whole pages around some bytes."""
    first = start // PAGE * PAGE
    return first, -(-stop // PAGE) * PAGE - first


def resident_bytes(tensor: Tensor, size: int) -> int:
    """Bytes of the mapping that a tensor begins which this process has in memory; 0 where the system does not say."""
    address, inside = tensor.data_ptr(), False
    with contextlib.suppress(OSError), Path("/proc/self/smaps").open() as lines:
        for line in lines:
            head = line.split(" ", 1)[0]
            if not head.endswith(":"):
                first, _, last = head.partition("-")
                inside = int(first, 16) <= address < int(last, 16)
            elif inside and head == "Rss:":
                return min(int(line.split()[1]) * 1024, size)
    return 0


class Room:
    """Bytes of this process alone, in a file without a name, mapped: nothing is left of them when it ends.

    Args:
        size: bytes. directory: on the disk they lie on.

    Raises:
        StorageError: the disk has no room for them (said now: a write to a mapped file can report nothing).
    """

    def __init__(self, size: int, directory: Path) -> None:
        self.size = -(-max(size, 1) // PAGE) * PAGE
        directory = scratch_directory() if lies_in_memory(directory) else directory
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory) as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self.size)
                else:
                    for _ in range(0, self.size, MIB):
                        file.write(bytes(MIB))
                    file.truncate(self.size)
                    file.flush()
                self._map = mmap.mmap(file.fileno(), self.size)
        except OSError as error:
            if is_exhaustion(error):
                raise MemoryError(f"no memory to map {self.size} bytes: {error.strerror}") from None
            raise StorageError(
                f"cannot lay {self.size / 2**20:,.0f} MiB aside in {directory}: {error.strerror}",
                ways_out=["free space there", "or choose another --output_dir"],
            ) from error

    def tensor(self, start: int, count: int, dtype: torch.dtype) -> Tensor:
        """The elements from byte ``start`` on, [count]; zero until they are written."""
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=start)

    def range(self, tensor: Tensor) -> tuple[int, int] | tuple[()]:
        """The first byte and the last (exclusive) of a tensor that lies here; nothing of any other."""
        start = tensor.data_ptr() - self.tensor(0, 1, torch.uint8).data_ptr()
        return (start, start + tensor.nbytes) if 0 <= start < self.size else ()

    def will_need(self, start: int = 0, stop: int = 0) -> None:
        """Have the system read these bytes while something else is done."""
        if _CAN_ADVISE:
            first, size = _pages(start, min(stop, self.size))
            for at in range(first, first + size, READ_STEP):
                self._map.madvise(mmap.MADV_WILLNEED, at, min(READ_STEP, first + size - at))

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Take no memory for these bytes any more; they keep their values, in the file."""
        if _CAN_ADVISE:
            first, size = _pages(start, self.size if stop is None else min(stop, self.size))
            self._map.madvise(mmap.MADV_DONTNEED, first, size)

    def resident_bytes(self) -> int:
        """Bytes that take memory now."""
        return resident_bytes(self.tensor(0, 1, torch.uint8), self.size)


Ranges = dict[str, tuple[int, int]]


class Pages:
    """Arrays that are worked through window by window, each taking memory for about one window.

    Args:
        arrays: elements and dtype of each, by name. device: where windows are used. directory: of the file (CPU).
        staged: windows are copied to the device and back; None: where it is a GPU.

    Raises:
        StorageError: as `Room`.
    """

    def __init__(
        self,
        arrays: dict[str, tuple[int, torch.dtype]],
        device: torch.device,
        directory: Path | None = None,
        staged: bool | None = None,
    ) -> None:
        self.device = device
        self.staged = device_type(torch.empty(0, device=device)) == "cuda" if staged is None else staged
        self.room: Room | None = None
        self._starts: dict[str, int] = {}
        self._staging: list[dict[str, Tensor]] = []
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        if device.type == "meta":
            self._arrays = {
                name: torch.empty(count, dtype=dtype, device=device) for name, (count, dtype) in arrays.items()
            }
        elif self.staged:
            pin = device.type == "cuda"
            self._arrays = {
                name: torch.zeros(count, dtype=dtype, pin_memory=pin) for name, (count, dtype) in arrays.items()
            }
        else:
            end = 0
            for name, (count, dtype) in arrays.items():
                self._starts[name] = end
                end += _pages(0, count * dtype.itemsize)[1]
            self.room = Room(end, directory or scratch_directory())
            self._arrays = {
                name: self.room.tensor(self._starts[name], count, dtype) for name, (count, dtype) in arrays.items()
            }

    def arrays(self) -> dict[str, Tensor]:
        """Every array, whole: to be saved or filled. Call `release` when done."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._arrays

    def release(self) -> None:
        """Take no memory for what was touched outside of `windows`."""
        if self.room is not None:
            self.room.release()

    def resident_bytes(self) -> int:
        """Bytes that are in the memory the model computes in: of windows on a GPU, of mapped pages on a CPU."""
        if self.room is not None:
            return self.room.resident_bytes()
        return sum(t.nbytes for buffers in self._staging for t in buffers.values())

    def staging(self) -> list[Tensor]:
        """The windows' own tensors, where they are copied."""
        return [t for buffers in self._staging for t in buffers.values()]

    def windows(self, cuts: Sequence[Ranges]) -> Iterator[dict[str, Tensor]]:
        """One window after the other, to be read and written until the next is asked for.

        Args:
            cuts: of each window, first and last element (exclusive) of each array. Windows do not overlap.
        """
        return self._copied(cuts) if self.staged else self._mapped(cuts)

    def _mapped(self, cuts: Sequence[Ranges]) -> Iterator[dict[str, Tensor]]:
        for number, cut in enumerate(cuts):
            if number + 1 < len(cuts):
                self._each(cuts[number + 1], "will_need")
            yield {name: self._arrays[name][first:last] for name, (first, last) in cut.items()}
            self._each(cut, "release")

    def _each(self, cut: Ranges, what: str) -> None:
        if self.room is None:
            return
        for name, (first, last) in cut.items():
            size, start = self._arrays[name].element_size(), self._starts[name]
            if last > first:
                getattr(self.room, what)(start + first * size, start + last * size)

    def _copied(self, cuts: Sequence[Ranges]) -> Iterator[dict[str, Tensor]]:
        """Windows in two buffers: while one is used, the other's content goes back and the next one's comes.

        All copies are in one stream, so a buffer is filled after it was emptied. What orders them with the computation
        are two events a window: it has come, it was used.
        """
        self._make_staging(cuts)
        fetched = self._fetch(cuts[0], 0) if cuts else None
        for number, cut in enumerate(cuts):
            here, came = self._views(cut, number), fetched
            fetched = self._fetch(cuts[number + 1], number + 1) if number + 1 < len(cuts) else None
            if came is not None:
                torch.cuda.current_stream(self.device).wait_event(came)
            yield here
            with self._copying():
                for name, (first, last) in cut.items():
                    self._arrays[name][first:last].copy_(here[name], non_blocking=True)

    def _make_staging(self, cuts: Sequence[Ranges]) -> None:
        longest: dict[str, int] = {}
        for cut in cuts:
            for name, (first, last) in cut.items():
                longest[name] = max(longest.get(name, 0), last - first)
        if self._staging and all(self._staging[0][name].numel() >= count for name, count in longest.items()):
            return
        self._staging = [
            {name: torch.empty(n, dtype=self._arrays[name].dtype, device=self.device) for name, n in longest.items()}
            for _ in range(2)
        ]

    def _views(self, cut: Ranges, number: int) -> dict[str, Tensor]:
        return {name: self._staging[number % 2][name][: last - first] for name, (first, last) in cut.items()}

    def _fetch(self, cut: Ranges, number: int) -> Any:
        """Begin to copy a window; the event of its arrival (None where copies are not asynchronous)."""
        # the buffer's own content left in the same stream; only its first use must wait for the computation
        with self._copying():
            for name, view in self._views(cut, number).items():
                first, last = cut[name]
                view.copy_(self._arrays[name][first:last], non_blocking=True)
            return None if self._stream is None else self._stream.record_event()

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Within this block copies go by the stream for copies, after what has been computed so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield


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


# --- what is only read ------------------------------------------------------------------------------------------------


class Mapped:
    """A file, mapped to be read only. Nobody may shorten it meanwhile: that would end the process."""

    def __init__(self, file: Path) -> None:
        try:
            self._descriptor = os.open(file, os.O_RDONLY)
            self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot map {file}: {error}") from error

    def tensor(self, start: int, nbytes: int) -> Tensor:
        """These bytes, uint8 [nbytes]. Writing to them ends the process."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it cannot be written to is meant
            return torch.frombuffer(self._map, dtype=torch.uint8, count=nbytes, offset=start)

    def read_ahead(self, start: int, nbytes: int) -> None:
        """Have the system read these bytes; returns when it has been asked for all of them."""
        if hasattr(os, "posix_fadvise"):
            for at in range(start, start + nbytes, READ_STEP):
                os.posix_fadvise(self._descriptor, at, min(READ_STEP, start + nbytes - at), os.POSIX_FADV_WILLNEED)

    def release(self, start: int, nbytes: int) -> None:
        """Take no memory of this process for these bytes (the system may keep them while it has room)."""
        if _CAN_ADVISE:
            first, size = _pages(start, start + nbytes)
            self._map.madvise(mmap.MADV_DONTNEED, first, min(size, len(self._map) - first))

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._descriptor)


class Travel:
    """Bytes of files that are used group after group, one way and back: layers of a model.

    While a group is used, the next one in the direction of travel is read, and what lies behind leaves memory: at any
    time two groups, whatever there are in all.
    """

    def __init__(self) -> None:
        self._files: dict[Path, Mapped] = {}
        self._groups: dict[int, list[tuple[Mapped, int, int]]] = {}
        self._now: int | None = None
        self._lock = threading.Lock()
        self._reader = futures.ThreadPoolExecutor(max_workers=1)

    def tensor(self, group: int, file: Path, start: int, nbytes: int) -> Tensor:
        """Bytes of a file as a member of a group, uint8 [nbytes], never to be written to."""
        if file not in self._files:
            self._files[file] = Mapped(file)
        mapped = self._files[file]
        members = self._groups.setdefault(group, [])
        if members and members[-1][0] is mapped and members[-1][1] + members[-1][2] == start:
            mapped, first, before = members.pop()
            members.append((mapped, first, before + nbytes))
        else:
            members.append((mapped, start, nbytes))
        return mapped.tensor(start, nbytes)

    def stop(self, group: int) -> "Stop":
        return Stop(self, group)

    def use(self, group: int) -> None:
        """A member of a group is used now."""
        if group == self._now:
            return
        with self._lock:
            before, self._now = self._now, group
            if before is None:
                return
            step = 1 if group > before else -1
            for other in {before, before - step} - {group}:
                self.release(other)
            ahead = self._groups.get(group + step, [])
            self._reader.submit(_read_ahead, ahead)

    def release(self, group: int) -> None:
        """Take no memory of this process for a group."""
        for mapped, start, nbytes in self._groups.get(group, []):
            mapped.release(start, nbytes)

    @property
    def nbytes(self) -> int:
        """Of all groups."""
        return sum(nbytes for members in self._groups.values() for _, _, nbytes in members)


def _read_ahead(members: list[tuple[Mapped, int, int]]) -> None:
    for mapped, start, nbytes in members:
        mapped.read_ahead(start, nbytes)


class Stop:
    """A group of a `Travel`, as its members know it."""

    def __init__(self, travel: Travel, group: int) -> None:
        self.travel, self.group = travel, group

    def use(self) -> None:
        self.travel.use(self.group)

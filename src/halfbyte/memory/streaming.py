"""Weights that stay in their files and are read layer by layer, a layer ahead, one way and back."""

import threading
from concurrent import futures
from pathlib import Path

from torch import Tensor

from .mapped_files import ReadOnlyMmap


class LayerStreamer:
    """Bytes of files that are used group after group, one way and back: layers of a model.

    While a group is used, the next one in the direction of travel is read, and what lies behind
    leaves memory: at any time two groups, whatever there are in all.
    """

    def __init__(self) -> None:
        self._files: dict[Path, ReadOnlyMmap] = {}
        self._groups: dict[int, list[tuple[ReadOnlyMmap, int, int]]] = {}
        self._now: int | None = None
        self._lock = threading.Lock()
        self._reader = futures.ThreadPoolExecutor(max_workers=1)

    def tensor(self, group: int, file: Path, start: int, nbytes: int) -> Tensor:
        """Bytes of a file as a member of a group, uint8 [nbytes], never to be written to."""
        if file not in self._files:
            self._files[file] = ReadOnlyMmap(file)
        mapped = self._files[file]
        members = self._groups.setdefault(group, [])
        if members and members[-1][0] is mapped and members[-1][1] + members[-1][2] == start:
            mapped, first, before = members.pop()
            members.append((mapped, first, before + nbytes))
        else:
            members.append((mapped, start, nbytes))
        return mapped.tensor(start, nbytes)

    def handle(self, group: int) -> "StreamedGroup":
        return StreamedGroup(self, group)

    def use(self, group: int) -> None:
        """A member of a group is used now.

        Raises:
            ModelError: its file has been cut.
        """
        if group == self._now:
            return
        for mapped in {member[0] for member in self._groups.get(group, [])}:
            mapped.refuse_cut()
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


def _read_ahead(members: list[tuple[ReadOnlyMmap, int, int]]) -> None:
    for mapped, start, nbytes in members:
        mapped.read_ahead(start, nbytes)


class StreamedGroup:
    """A group of a `LayerStreamer`, as its members know it."""

    def __init__(self, streamer: LayerStreamer, group: int) -> None:
        self.streamer, self.group = streamer, group

    def use(self) -> None:
        self.streamer.use(self.group)

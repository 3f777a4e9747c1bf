"""Optimizer states that lie in a file (CPU) or pinned host memory (GPU) and are worked through
window by window.

Unlike CUDA's managed memory, what moves when is written down here, and small tensors move like
large ones.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops.library import device_type
from .mapped_files import ScratchFile, _pages, scratch_directory

Ranges = dict[str, tuple[int, int]]


class Pages:
    """Arrays that are worked through window by window, each taking memory for about one window.

    Args:
        arrays: elements and dtype of each, by name.
        device: where windows are used.
        directory: of the file (CPU).
        staged: windows are copied to the device and back; None: where it is a GPU.

    Raises:
        StorageError: as `ScratchFile`.
    """

    def __init__(
        self,
        arrays: dict[str, tuple[int, torch.dtype]],
        device: torch.device,
        directory: Path | None = None,
        staged: bool | None = None,
    ) -> None:
        self.device = device
        self.staged = (
            device_type(torch.empty(0, device=device)) == "cuda" if staged is None else staged
        )
        self.file: ScratchFile | None = None
        self._starts: dict[str, int] = {}
        self._staging: list[dict[str, Tensor]] = []
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        if device.type == "meta":
            self._arrays = {
                name: torch.empty(count, dtype=dtype, device=device)
                for name, (count, dtype) in arrays.items()
            }
        elif self.staged:
            pin = device.type == "cuda"
            self._arrays = {
                name: torch.zeros(count, dtype=dtype, pin_memory=pin)
                for name, (count, dtype) in arrays.items()
            }
        else:
            end = 0
            for name, (count, dtype) in arrays.items():
                self._starts[name] = end
                end += _pages(0, count * dtype.itemsize)[1]
            self.file = ScratchFile(end, directory or scratch_directory())
            self._arrays = {
                name: self.file.tensor(self._starts[name], count, dtype)
                for name, (count, dtype) in arrays.items()
            }

    def arrays(self) -> dict[str, Tensor]:
        """Every array, whole: to be saved or filled. Call `release` when done."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._arrays

    def release(self) -> None:
        """Take no memory for what was touched outside of `windows`."""
        if self.file is not None:
            self.file.release()

    def resident_bytes(self) -> int:
        """Bytes that are in the memory the model computes in: of windows on a GPU, of mapped pages
        on a CPU."""
        if self.file is not None:
            return self.file.resident_bytes()
        return sum(t.nbytes for buffers in self._staging for t in buffers.values())

    def staging(self) -> list[Tensor]:
        """The windows' own tensors, where they are copied."""
        return [t for buffers in self._staging for t in buffers.values()]

    def windows(self, cuts: Sequence[Ranges]) -> Iterator[dict[str, Tensor]]:
        """One window after the other, to be read and written until the next is asked for.

        Args:
            cuts: of each window, first and last element (exclusive) of each array. Windows do not
                overlap.
        """
        return self._copied(cuts) if self.staged else self._mapped(cuts)

    def _mapped(self, cuts: Sequence[Ranges]) -> Iterator[dict[str, Tensor]]:
        for number, cut in enumerate(cuts):
            if number + 1 < len(cuts):
                self._each(cuts[number + 1], "will_need")
            yield {name: self._arrays[name][first:last] for name, (first, last) in cut.items()}
            self._each(cut, "release")

    def _each(self, cut: Ranges, what: str) -> None:
        if self.file is None:
            return
        for name, (first, last) in cut.items():
            size, start = self._arrays[name].element_size(), self._starts[name]
            if last > first:
                getattr(self.file, what)(start + first * size, start + last * size)

    def _copied(self, cuts: Sequence[Ranges]) -> Iterator[dict[str, Tensor]]:
        """Windows in two buffers: while one is used, the other's content goes back and the next
        one's comes.

        All copies are in one stream, so a buffer is filled after it was emptied. What orders them
        with the computation are two events a window: it has come, it was used.
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
        if self._staging and all(
            self._staging[0][name].numel() >= count for name, count in longest.items()
        ):
            return
        self._staging = [
            {
                name: torch.empty(n, dtype=self._arrays[name].dtype, device=self.device)
                for name, n in longest.items()
            }
            for _ in range(2)
        ]

    def _views(self, cut: Ranges, number: int) -> dict[str, Tensor]:
        return {
            name: self._staging[number % 2][name][: last - first]
            for name, (first, last) in cut.items()
        }

    def _fetch(self, cut: Ranges, number: int) -> Any:
        """Begin to copy a window; the event of its arrival (None where copies are not
        asynchronous)."""
        # the buffer's own content left in the same stream; only its first use must wait for the
        # computation
        with self._copying():
            for name, view in self._views(cut, number).items():
                first, last = cut[name]
                view.copy_(self._arrays[name][first:last], non_blocking=True)
            return None if self._stream is None else self._stream.record_event()

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        """Within this block copies go by the stream for copies, after what has been computed so
        far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

"""Tests of `memory.paged_arrays`."""

from pathlib import Path

import pytest
import torch

from halfbyte.memory.offload import OffloadPool
from halfbyte.memory.paged_arrays import Pages

from ..tools.streams import Stream, watched


@pytest.mark.parametrize("staged", [False, True])
def test_windows_are_read_written_and_let_go(tmp_path: Path, staged: bool):
    pages = Pages(
        {"a": (1000, torch.float32), "b": (50, torch.uint8)}, torch.device("cpu"), tmp_path, staged
    )
    pages.arrays()["a"].copy_(torch.arange(1000))
    cuts = [
        {"a": (first, min(first + 300, 1000)), "b": (first // 20, min(first + 300, 1000) // 20)}
        for first in range(0, 1000, 300)
    ]
    for number, (cut, window) in enumerate(zip(cuts, pages.windows(cuts), strict=True)):
        assert window["a"].tolist() == list(range(*cut["a"]))
        window["a"].neg_()
        window["b"].fill_(number + 1)
    assert torch.equal(pages.arrays()["a"], -torch.arange(1000).float())
    assert pages.arrays()["b"].tolist() == [1] * 15 + [2] * 15 + [3] * 15 + [4] * 5
    pages.release()
    if staged:
        assert pages.resident_bytes() == 2 * (300 * 4 + 15), "two windows"
    else:
        assert pages.resident_bytes() == 0


@pytest.mark.parametrize("forgotten", [None, "wait_event", "wait_stream"])
def test_copies_of_windows_and_slots_race_with_nothing(
    tmp_path: Path, forgotten: str | None, monkeypatch: pytest.MonkeyPatch
):
    """As on a GPU, with a stream of their own; without its waits the watch finds races."""
    if forgotten is not None:
        monkeypatch.setattr(Stream, forgotten, lambda self, other: None)
    with watched() as monitor:
        pages = Pages({"a": (1000, torch.float32)}, torch.device("cpu"), staged=True)
        pages._stream = torch.cuda.Stream()
        cuts = [{"a": (first, first + 250)} for first in range(0, 1000, 250)]
        for _ in range(2):
            for window in pages.windows(cuts):
                window["a"].add_(1)
        assert pages.arrays()["a"].eq(2).all()
        pool = OffloadPool(3, tmp_path, staged=True)
        pool._stream = torch.cuda.Stream()
        for _ in range(2):
            held = [pool.put(torch.full((4, 5), float(i))) for i in range(3)]
            while held:
                assert held.pop().take().mul(2).eq(2 * len(held)).all()
    assert bool(monitor.races) == (forgotten is not None), monitor.races

"""Tests of `planning.tracker`."""

import torch

from halfbyte.planning.tracker import MemoryTracker


def test_the_count_is_of_storages_and_follows_them():
    held = torch.zeros(100)
    with MemoryTracker({"held": [held]}) as count:
        count.restart()
        assert count.now == 400
        a = torch.ones(1000)
        view = a[10:20]
        assert count.now == 4400, "views are no memory"
        del a
        assert count.now == 4400
        view.add_(1)
        del view
        assert (count.now, count.peak) == (400, 4400)
        torch.mm(torch.ones(2, 3), torch.ones(3, 5))
    assert count.flop == 2 * 2 * 3 * 5

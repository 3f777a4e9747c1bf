"""Tests of `memory.offload`."""

from pathlib import Path

import pytest
import torch

from halfbyte.memory.offload import OffloadPool


@pytest.mark.parametrize("staged", [None, True])
def test_slots_elsewhere_give_back_what_they_were_given(tmp_path: Path, staged: bool | None):
    pool = OffloadPool(3, tmp_path, staged)
    given = [torch.randn(2, 5), torch.randn(2, 5), torch.randn(10)]
    held = [pool.put(t) for t in given]
    for one, tensor in reversed(list(zip(held, given, strict=True))):
        assert torch.equal(one.take(), tensor)
    more = pool.put(torch.ones(7))
    assert torch.equal(more.take(), torch.ones(7))
    del one, held, more
    assert len(pool.free) == 3
    larger = pool.put(torch.ones(40))
    assert torch.equal(larger.take(), torch.ones(40))

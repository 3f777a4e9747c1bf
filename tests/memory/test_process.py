"""Tests of `memory.process`."""

from pathlib import Path

import pytest

from halfbyte.memory.process import available


def test_what_is_free_knows_limits(tmp_path: Path):
    free = available(())
    assert free is not None and free > 0
    (tmp_path / "memory.max").write_text(str(5 << 30))
    (tmp_path / "memory.current").write_text(str(5 * 2**30 - 1000))
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 234\n")
    assert available((tmp_path,)) == 1234
    (tmp_path / "memory.max").write_text("max\n")
    assert available((tmp_path,)) == pytest.approx(free, rel=0.2)

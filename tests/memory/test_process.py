"""Tests of `memory.process`."""

from pathlib import Path
from typing import Any

import pytest

from halfbyte.memory import process
from halfbyte.memory.process import available, cpu_quota, limit_in_force


def test_what_is_free_knows_limits(tmp_path: Path):
    free = available(())
    assert free is not None and free > 0
    (tmp_path / "memory.max").write_text(str(5 << 30))
    (tmp_path / "memory.current").write_text(str(5 * 2**30 - 1000))
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 234\n")
    assert available((tmp_path,)) == 1234
    (tmp_path / "memory.max").write_text("max\n")
    assert available((tmp_path,)) == pytest.approx(free, rel=0.2)
    (tmp_path / "memory.high").write_text(str(5 * 2**30 - 500))
    assert available((tmp_path,)) == 734, "beyond it a group is slowed down for ever"


def test_the_limit_in_force_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process, "_cgroups", lambda kind="memory": [tmp_path])
    assert limit_in_force() == "" and cpu_quota() is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.limit_in_bytes").write_text(str(2**63 - 4096))
    assert limit_in_force() == ""
    (tmp_path / "memory.high").write_text(str(3 << 29))
    (tmp_path / "memory.max").write_text(str(2 << 30))
    assert limit_in_force() == f"1.50 GiB, by {tmp_path / 'memory.high'}"
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota() == 1.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota() is None


def test_limits_of_outer_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A container's limit stands outside of the slices in it."""
    honest = Path.read_text

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == Path("/proc/self/cgroup"):
            return "3:cpu,cpuacct:/a/b\n2:memory:/a/b\n0::/c/d\n"
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    root = Path("/sys/fs/cgroup")
    found = {path.relative_to(root).as_posix() for path in process._cgroups()}
    assert found == {"memory/a/b", "memory/a", "memory", "c/d", "c", "."}
    found = {path.relative_to(root).as_posix() for path in process._cgroups("cpu")}
    assert found == {"cpu/a/b", "cpu/a", "cpu", "c/d", "c", "."}

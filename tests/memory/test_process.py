"""Tests of `memory.process`."""

import ctypes
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch

from halfbyte.data.template import Rendering, Request, TemplateProcess
from halfbyte.memory import process
from halfbyte.memory.process import (
    Peak,
    available,
    cpu_affinity,
    cpu_quota,
    held_by_children,
    limit_in_force,
)


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
    lines = b"3:cpu,cpuacct:/a/b\n2:memory:/a/b\n0::/c/d\n"
    monkeypatch.setattr(Path, "read_bytes", lambda self: lines)
    root = Path("/sys/fs/cgroup")
    found = {path.relative_to(root).as_posix() for path in process._cgroups()}
    assert found == {"memory/a/b", "memory/a", "memory", "c/d", "c", "."}
    found = {path.relative_to(root).as_posix() for path in process._cgroups("cpu")}
    assert found == {"cpu/a/b", "cpu/a", "cpu", "c/d", "c", "."}


@pytest.mark.skipif(sys.platform != "linux", reason="a call of Linux")
def test_a_process_may_have_any_name():
    """A script's name, cut after 15 bytes: inside of a character."""
    library, before = ctypes.CDLL(None), Path("/proc/self/comm").read_bytes().rstrip(b"\n")
    library.prctl(15, "обучение".encode()[:15])  # PR_SET_NAME
    try:
        assert process.held_now() > 0
        template = TemplateProcess("{{ messages[0].content }}", {}, datetime(2026, 1, 1))
        (answer,) = template.render([Request([{"role": "user", "content": "a"}])])
        template.close()
    finally:
        library.prctl(15, before)
    assert isinstance(answer, Rendering) and answer.text == "a"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="a call of Linux")
def test_cores_that_a_batch_system_gives_are_counted(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    assert cpu_affinity() == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(96)))
    assert cpu_affinity() is None


HOLDS = "import sys; held = b'x' * (48 << 20); print('there', flush=True); sys.stdin.read()"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_children_hold_counts():
    before, peak = held_by_children(), Peak(torch.device("cpu")).bytes()
    made = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", HOLDS], **made) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        assert held_by_children() - before >= 48 << 20
        assert Peak(torch.device("cpu")).bytes() - peak >= 40 << 20
        child.stdin.close()
    assert held_by_children() == before

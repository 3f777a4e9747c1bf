"""The memory of a whole family of processes, read from outside every few milliseconds.

    python bench/outside.py COMMAND ...

What a process says of itself can miss what it does not look at; this sees all anonymous memory of a
command and its children, from start to exit.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PERIOD = 0.003


@dataclass(frozen=True)
class Seen:
    """peak: bytes of anonymous memory at most. at: seconds after the start. returncode, out: the
    command's. samples: how often it was read."""

    peak: int
    at: float
    seconds: float
    samples: int
    returncode: int
    out: str


def anonymous(pid: int, shared: bool = False) -> int:
    """Of a process, bytes; 0 once it is gone.

    Args:
        shared: what a fork shares with its parent is counted once (slower).
    """
    file, key = ("smaps_rollup", "Pss_Anon:") if shared else ("status", "RssAnon:")
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0


def children(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for each in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                with contextlib.suppress(OSError):
                    found += [int(child) for child in (task / "children").read_text().split()]
    return found


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A control group with so many bytes of memory, in which a process is killed that needs more;
    `inside` starts a command in it. Needs root.

    Raises:
        OSError: none can be made here.
    """
    roots = (
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ("/sys/fs/cgroup", "memory.max"),
    )
    for root, name in roots:
        group = Path(root) / f"halfbyte-bench-{os.getpid()}"
        try:
            group.mkdir()
            (group / name).write_text(str(limit))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield group
        finally:
            for _ in range(50):
                with contextlib.suppress(OSError):
                    group.rmdir()
                    break
                time.sleep(0.1)
        return
    raise OSError("no control group with a memory limit can be made here (root is needed)")


def inside(group: Path, command: Sequence[str]) -> list[str]:
    """A command that begins in a control group."""
    return ["sh", "-c", 'echo $$ > "$0/cgroup.procs"; exec "$@"', str(group), *command]


def watch(command: Sequence[str], **options: Any) -> Seen:
    """Run a command and watch it and its children."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    ) as process:
        lines: list[str] = []
        assert process.stdout is not None
        reader = threading.Thread(target=lambda: lines.extend(process.stdout or ()))
        reader.start()
        peak, at, samples, family = 0, 0.0, 0, [process.pid]
        while process.poll() is None:
            if samples % 20 == 0:
                family = children(process.pid)
            now = sum(anonymous(pid, len(family) > 1) for pid in family)
            samples += 1
            if now > peak:
                peak, at = now, time.perf_counter() - began
            time.sleep(PERIOD)
        reader.join()
    seconds = time.perf_counter() - began
    return Seen(peak, at, seconds, samples, process.returncode, "".join(lines))


if __name__ == "__main__":
    seen = watch(sys.argv[1:])
    print(seen.out, end="")
    print(
        json.dumps(
            {
                "peak_mib": round(seen.peak / 2**20, 1),
                "at_s": round(seen.at, 1),
                "of_s": round(seen.seconds, 1),
                "samples": seen.samples,
            }
        )
    )
    sys.exit(seen.returncode)

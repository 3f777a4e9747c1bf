"""The memory of this process: how much it is, and how it is kept in one piece.

The C library's allocator gives a freed block back only when nothing behind it is in use. Long-lived
tensors made between short-lived ones therefore pin memory that nobody uses. So what lives through a
step (gradients, the layers' inputs) lies in blocks of its own, and what loading leaves behind is
given back.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from ..ops.arena import ARENA

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None


def _status() -> dict[str, int]:
    """Lines of this process's status that are sizes, bytes; empty where the system has none."""
    found = {}
    with contextlib.suppress(OSError):
        # the process's name is in it, cut after 15 bytes, maybe inside of a character
        for line in os.fsdecode(Path("/proc/self/status").read_bytes()).splitlines():
            key, _, value = line.partition(":")
            if value.endswith(" kB"):
                found[key] = int(value.split()[0]) * 1024
    return found


def held_now() -> int:
    """Anonymous resident memory of this process, bytes; 0 where the system does not say."""
    return _status().get("RssAnon", 0)


def held_by_children() -> int:
    """Anonymous resident memory of all that descend from this process, bytes; what a fork shares
    with others counts in part (Pss)."""
    total, family = 0, [os.getpid()]
    for each in family:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                with contextlib.suppress(OSError):
                    family += [int(pid) for pid in (task / "children").read_text().split()]
        if each != family[0]:
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss_Anon:"):
                        total += int(line.split()[1]) * 1024
    return total


class Peak:
    """The most memory used since it was made or restarted, bytes: what the CUDA allocator reserved,
    or this process's anonymous resident memory and what its children hold now; 0 where the system
    does not say."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        self.exact = True
        try:
            # the high-water mark of resident memory becomes what is resident now
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.exact = False

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        status = _status()
        if not status:
            return 0
        files = status.get("RssFile", 0) + status.get("RssShmem", 0)
        high = status.get("VmHWM", 0) - files if self.exact and "RssAnon" in status else 0
        return max(high, status.get("RssAnon", status.get("VmRSS", 0))) + held_by_children()


def _cgroups(kind: str = "memory") -> list[Path]:
    """Directories of this process's control groups and the ones around them, versions 1 and 2."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in os.fsdecode(Path("/proc/self/cgroup").read_bytes()).splitlines():
            _, kinds, path = line.split(":", 2)
            root = Path("/sys/fs/cgroup") / (kind if kind in kinds.split(",") else "")
            if not kinds or kind in kinds.split(","):
                inner = root / path.lstrip("/")
                found += [
                    each for each in (inner, *inner.parents) if each == root or root in each.parents
                ]
    return found


_LIMITS = (
    ("memory.max", "memory.current"),
    # beyond it everything is slowed down to be reclaimed, for ever where nothing can be
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
_NO_LIMIT = 1 << 60


def limit_in_force() -> str:
    """The tightest memory limit of a control group and where it stands, for people; "" without
    one."""
    found = []
    for path in _cgroups():
        for name, _ in _LIMITS:
            with contextlib.suppress(OSError, ValueError):
                if (limit := int((path / name).read_text())) < _NO_LIMIT:
                    found.append((limit, path / name))
    if not found:
        return ""
    limit, place = min(found)
    return f"{limit / 2**30:.2f} GiB, by {place}"


def cpu_quota() -> float | None:
    """Cores that control groups leave this process, None where they set no limit."""
    found = []
    for path in _cgroups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (path / "cpu.max").read_text().split()
            found.append(int(quota) / int(period))
        with contextlib.suppress(OSError, ValueError):
            quota = int((path / "cpu.cfs_quota_us").read_text())
            if quota > 0:
                found.append(quota / int((path / "cpu.cfs_period_us").read_text()))
    return round(min(found), 2) if found else None


def cpu_affinity() -> int | None:
    """Cores this process may run on (taskset, a batch system, a container's cpuset), None where all
    are."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    allowed = len(os.sched_getaffinity(0))
    return allowed if allowed < (os.cpu_count() or 1) else None


def available(cgroups: Iterable[Path] | None = None) -> int | None:
    """Bytes of host memory this process could still take: what the system has free, what its
    cgroups leave, what its own limit leaves, whichever is least. None where the system does not
    say."""
    left = []
    cgroups = _cgroups() if cgroups is None else cgroups
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        left.append(
            next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        )
    for path in cgroups:
        for most, used in _LIMITS:
            with contextlib.suppress(OSError, ValueError):
                left.append(
                    int((path / most).read_text())
                    - int((path / used).read_text())
                    + _file_cache(path)
                )
    if resource is not None:
        status = _status()
        for kind, key in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY and key in status:
                left.append(limit - status[key])
    return max(min(left), 0) if left else None


def headroom(device: torch.device) -> int | None:
    """Bytes that tensors on a device could still take: `available`, and what is held for reuse and
    not in use."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    left = available()
    return None if left is None else left + ARENA.unused


def _file_cache(cgroup: Path) -> int:
    """Bytes of a cgroup that give way: file cache, and what the kernel can reclaim."""
    stat: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError):
        for line in (cgroup / "memory.stat").read_text().splitlines():
            key, _, value = line.partition(" ")
            stat[key] = int(value)
    if "total_inactive_file" in stat:  # version 1
        return stat["total_inactive_file"] + stat.get("total_active_file", 0)
    return sum(stat.get(key, 0) for key in ("inactive_file", "active_file", "slab_reclaimable"))


MIB = 1 << 20
_UNTOUCHED = 64 * MIB
_limits = threading.Lock()
_limits_before: list[tuple[int, int]] = []


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Within this block host memory ends with an error where it would end with the process being
    killed: the limit on data (RLIMIT_DATA) is what this process has and what is free now, and room
    for what is mapped and never touched (stacks of threads, ends of regions). Blocks may overlap:
    the last to end takes the limit away."""
    free = available()
    if resource is None or free is None or "VmData" not in (status := _status()):
        yield
        return
    with _limits:
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if not _limits_before:
            limit = status["VmData"] + free + _UNTOUCHED + 8 * MIB * torch.get_num_threads()
            resource.setrlimit(
                resource.RLIMIT_DATA, (min(limit, soft) if soft >= 0 else limit, hard)
            )
        _limits_before.append((soft, hard) if not _limits_before else _limits_before[0])
    try:
        yield
    finally:
        with _limits:
            before = _limits_before.pop()
            if not _limits_before:
                resource.setrlimit(resource.RLIMIT_DATA, before)


def set_mmap_threshold(smallest: int) -> None:
    """Have the C library (glibc) map blocks of so many bytes and more by themselves, so that they
    go back to the system when they are freed.

    It costs page faults: right for weights, and for what is not made again and again (that lies in
    `ops.arena`).
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, smallest)


_M_MMAP_THRESHOLD = -3
LOAD_MMAP_THRESHOLD, TRAIN_MMAP_THRESHOLD = 1 << 16, 1 << 20
"""The smallest such blocks while a model is loaded, and else. An empty model's weights, too, are
memory for a moment, and on the heap each would leave a hole that the next one does not fit into."""


def return_freed() -> None:
    """Give freed memory back to the system: the regions of `ops.arena`, what the C library can
    (glibc), and what PyTorch holds of GPU and of pinned memory."""
    ARENA.release()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        return_pinned()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def return_pinned() -> None:
    """Give pinned host memory that nobody uses back to the system; PyTorch would keep it for blocks
    of its size."""
    for name in ("_accelerator_emptyHostCache", "_host_emptyCache"):  # since 2.13, before
        if hasattr(torch._C, name):
            getattr(torch._C, name)()
            return


UNASKED_SHARE = 0.5
"""Of the memory that is free, what a training may take for speed alone without being told what to
fit into."""

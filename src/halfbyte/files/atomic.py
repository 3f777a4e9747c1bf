"""Files that are there whole or not at all: written aside, synced, renamed; and small JSON files,
read with care.

A reader sees the old file or the new one, whatever dies in between.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch

from ..errors import ModelError, StorageError, UsageError, is_exhaustion

JSON_LIMIT = 100_000_000
"""Largest JSON file read, bytes; tokenizers reach 35 MB."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: the file is absent, no regular file, too large, no JSON, or holds something else
            than an object.
    """
    if path.exists() and (not path.is_file() or path.stat().st_size > JSON_LIMIT):
        raise ModelError(f"{path} is not a regular file of at most {JSON_LIMIT // 10**6} MB")
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON", found=str(error)) from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


# --- writing --------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """A whole file or none: temporary name, sync, rename.

    Raises:
        StorageError: naming the file and what the system said.
    """
    _write_then_rename(path, lambda temporary: temporary.write_bytes(data))


def json_bytes(value: object) -> bytes:
    """The bytes `write_json` writes: a function of the value."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: object) -> None:
    write_bytes(path, json_bytes(value))


def _write_then_rename(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = error.strerror or str(error)
        elif isinstance(error, safetensors.SafetensorError):
            reason = str(error)
        else:
            raise
        raise StorageError(
            f"cannot write {path}: {reason}",
            ways_out=ways_around(error, "choose another place"),
        ) from error


_UNFINISHED = re.compile(r"\..+\.\d+(\.old)?\.tmp")
"""What the functions here write aside is called: the name, the process."""


def remove_unfinished(directory: Path) -> None:
    """Remove what processes that were killed wrote aside in a directory that nobody else writes to
    (its lock is held)."""
    for place in directory.glob(".*.tmp"):
        if _UNFINISHED.fullmatch(place.name):
            if place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            else:
                with contextlib.suppress(OSError):
                    place.unlink()


@contextlib.contextmanager
def new_directory(
    target: Path,
    *,
    replace: bool = False,
    doing: str = "write",
    ways_out: Sequence[str] = ("name another directory",),
) -> Iterator[Path]:
    """Give a directory to fill, which becomes ``target`` when the block ends: whole, or not there.

    A failure or an interrupt leaves nothing of it behind, and what was at ``target`` as it was. A
    directory that cannot be renamed onto (a mount point, a volume) is filled in place: the files
    are written aside in it and renamed one by one, those by which tools know it last.

    Args:
        replace: put it in the place of a directory that is there; else that must be empty.
        doing: what is said to have failed: "cannot write ...".
        ways_out: what is advised then, beside what the system's own error suggests.

    Raises:
        UsageError: ``target`` is no directory, or holds something that is not to be replaced.
        StorageError: the disk said no.
    """
    if not replace:
        refuse_what_is_there(target)
    target = target.resolve() if target.is_symlink() else target
    aside = f".{target.name}.{os.getpid()}.tmp"
    in_place = target.is_dir() and (target.is_mount() or not os.access(target.parent, os.W_OK))
    building = target / aside if in_place else target.with_name(aside)
    try:
        building.mkdir(parents=True, exist_ok=True)
        yield building
        sync(building)
        if in_place:
            _move_into(building, target, replace)
        else:
            if target.exists():
                remove_directory(target)
            building.rename(target)
        sync(target.parent)
    except (OSError, safetensors.SafetensorError) as error:
        if is_exhaustion(error):
            raise
        reason = getattr(error, "strerror", None) or error
        where = str(getattr(error, "filename", None) or "")  # what failed may lie elsewhere
        what = f"cannot {doing} {target}: {reason}"
        raise StorageError(what, where=where, ways_out=ways_around(error, *ways_out)) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


KNOWN_BY = ("config.json", "adapter_config.json", "manifest.json", "halfbyte.json", "merge.json")
"""Files without which no tool opens a directory."""


def _move_into(building: Path, target: Path, replace: bool) -> None:
    """What was built, into a directory that stays: those it is known by go first and come last."""
    old = [p for p in target.iterdir() if p != building and p.name not in _NOBODYS]
    for path in sorted(old if replace else [], key=lambda path: path.name not in KNOWN_BY):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    entries = sorted(building.iterdir(), key=lambda path: (path.name in KNOWN_BY, path.name))
    for entry in entries:
        entry.rename(target / entry.name)
    sync(target)


def refuse_what_is_there(target: Path) -> None:
    """Raise UsageError unless a directory can be made at ``target``: nothing is there, or an empty
    one."""
    if target.exists() and (
        not target.is_dir() or any(path.name not in _NOBODYS for path in target.iterdir())
    ):
        raise UsageError(
            f"{target} is not empty, or no directory", ways_out=["name a new directory with -o"]
        )


_NOBODYS = ("lost+found", ".ipynb_checkpoints", ".DS_Store")
"""What systems and editors put into directories."""


def remove_directory(path: Path) -> None:
    """Remove a directory so that a crash in between leaves no half of it under its name."""
    gone = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")
    path.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file or directory entry durable, where the system can (Windows opens no directories,
    some network and container file systems sync none)."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir() or error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.EBADF, errno.ENOSYS}
_FULL = {errno.ENOSPC, errno.EDQUOT}


def ways_around(error: BaseException, *ways: str) -> tuple[str, ...]:
    """What to advise after a failed write: to free space where that is what lacks, else to look at
    the permissions where they are."""
    number = getattr(error, "errno", None)
    if number in _FULL:
        return ("free space", *ways)
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ("fix the permissions", *ways)
    return ways


def free_bytes(place: Path) -> int | None:
    """Bytes that a file system has free; None where it does not say (a total of 0).

    Raises:
        OSError: there is no such place.
    """
    usage = shutil.disk_usage(place)
    return usage.free if usage.total else None


def append(path: Path, text: str) -> None:
    """Text at the end of a file, which is made if it is not there.

    Raises:
        OSError: the system said no, or the file is a link: what it leads to is nobody's here.
    """
    with os.fdopen(open_own(path, os.O_APPEND | os.O_WRONLY), "w", encoding="utf-8") as file:
        file.write(text)


def open_own(path: Path, how: int) -> int:
    """A descriptor of a file for writing, never through a link (where the system can tell)."""
    return os.open(path, how | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)


def check_writable(directory: Path) -> None:
    """Create the directory and prove that a file can be written there, before hours are spent.

    Raises:
        StorageError: naming the directory and what the system said.
    """
    probe = directory / f".probe.{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"halfbyte")
        probe.unlink()
    except OSError as error:
        raise StorageError(
            f"cannot write to {directory}: {error.strerror}",
            ways_out=["name another directory with --output_dir"],
        ) from error


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def lines_in(path: Path) -> int:
    """How many lines end in a file."""
    with path.open("rb") as file:
        return sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 20), b""))


try:
    import fcntl
except ImportError:  # Windows: the lock file is written but two trainers are not kept apart
    fcntl = None


@contextlib.contextmanager
def locked_file(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a file's lock, waiting for whoever holds it (on Windows nobody waits). waiting: called
    before."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

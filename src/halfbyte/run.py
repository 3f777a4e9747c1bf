"""The run directory: the product of training, as plain files other programs can read (DESIGN section 2).

``LOCK`` is held with flock while a trainer works; the kernel releases it when the process dies, however it dies, so
there are no stale locks. ``metrics.jsonl`` is append-only; after a resume the rows past the checkpoint are cut off, so
every step stands there once.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import BusyError, ModelError, StorageError
from .hub import read_json, write_bytes, write_json

try:
    import fcntl
except ImportError:  # Windows: the lock file is written but two trainers are not kept apart
    fcntl = None

RUN_JSON = "run.json"


@dataclass(frozen=True)
class Run:
    """A run directory by its path."""

    path: Path

    @classmethod
    def open(cls, path: str | Path) -> "Run":
        """An existing run.

        Raises:
            ModelError: the directory is no run, or its training has not saved an adapter yet.
        """
        run = cls(Path(path).expanduser())
        if not (run.path / RUN_JSON).is_file():
            raise ModelError(f"{run.path} is not a run directory: it has no {RUN_JSON}")
        if not run.adapter.is_dir():
            raise ModelError(
                f"{run.path} has no trained adapter yet",
                expected=str(run.adapter),
                ways_out=["finish the training: repeat its command with --resume_from_checkpoint auto"],
            )
        return run

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    def info(self) -> dict[str, Any]:
        """run.json: resolved configuration, versions, hashes, machine."""
        return read_json(self.path / RUN_JSON)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; a last line cut off by a crash is left out."""
        if not self.metrics_file.is_file():
            return []
        rows = []
        for line in self.metrics_file.read_text().split("\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def write_info(self, info: dict[str, Any]) -> None:
        write_json(self.path / RUN_JSON, info)

    def append_metrics(self, row: dict[str, Any]) -> None:
        try:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {self.metrics_file}: {error.strerror}") from error

    def cut_metrics(self, last_step: int) -> None:
        """Drop the rows of steps after last_step."""
        rows = [row for row in self.metrics() if row["step"] <= last_step]
        write_bytes(self.metrics_file, "".join(json.dumps(row) + "\n" for row in rows).encode())

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for writing.

        Raises:
            BusyError: another process holds it; names it.
        """
        path = self.path / "LOCK"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StorageError(f"cannot create {path}: {error.strerror}") from error
        try:
            if fcntl is not None:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    holder = os.read(descriptor, 200).decode(errors="replace").strip()
                    raise BusyError(
                        f"another process trains in {self.path}",
                        found=holder or "unknown process",
                        ways_out=["wait for it, or stop it", "or train into another --output_dir"],
                    ) from error
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"pid {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)


def is_run(path: str | Path) -> bool:
    return (Path(path).expanduser() / RUN_JSON).is_file()

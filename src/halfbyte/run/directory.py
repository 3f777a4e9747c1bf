"""The run directory: the product of training, as plain files other programs can read.

``LOCK`` is held with flock while a trainer works; the kernel releases it when the process dies,
however it dies, so there are no stale locks. ``metrics.jsonl`` is append-only; after a resume the
rows past the checkpoint are cut off, so every step stands there once.
"""

import contextlib
import json
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..config.build import build
from ..config.options import TrainConfig
from ..errors import BusyError, ModelError, StorageError, UsageError
from ..files.atomic import fcntl, read_json, write_bytes, write_json

RUN_JSON, METRICS, SAMPLES, EVALS = "run.json", "metrics.jsonl", "samples.jsonl", "eval.jsonl"
NONFINITE, MEMORY, PLAN_JSON = "nonfinite.jsonl", "memory.jsonl", "plan.json"
QUANT_JSON = "quant.json"
LOG = "log.txt"
"""What was said of the training, line by line, whether anybody listened or not."""
ADAPTER_FACTS = "halfbyte.json"
"""In adapter/: the digest of the base it belongs to, and the hash of its chat template."""


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
        if not (run.adapter / ADAPTER_FACTS).is_file():
            raise ModelError(
                f"{run.path} has no trained adapter yet",
                expected=str(run.adapter),
                ways_out=[
                    "finish the training: repeat its command with --resume_from_checkpoint auto"
                ],
            )
        return run

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def info(self) -> dict[str, Any]:
        """run.json: resolved configuration, versions, hashes, machine.

        Raises:
            ModelError: it is damaged, or of another version's making.
        """
        info = read_json(self.path / RUN_JSON)
        sections = (("config", ()), ("base", ("path", "digest")), ("data", ("source", "form")))
        for section, keys in (*sections, ("clock", ()), ("template_sha256", ())):
            kind = str if section in ("clock", "template_sha256") else dict
            if not isinstance(info.get(section), kind) or any(
                key not in info[section] for key in keys
            ):
                raise ModelError(
                    f"{self.path / RUN_JSON} is damaged or of another version: {section!r} is not "
                    "complete",
                    ways_out=["train again", "or use the adapter directly: " + str(self.adapter)],
                )
        return info

    def clock(self) -> datetime:
        """The time that templates of this run see."""
        return datetime.fromisoformat(self.info()["clock"])

    def config(self) -> TrainConfig:
        """The options the run was trained with.

        Raises:
            ModelError: run.json is damaged.
        """
        try:
            return build(TrainConfig, self.info()["config"])
        except UsageError as error:
            raise ModelError(f"{self.path / RUN_JSON} is damaged", found=error.what) from error

    def write_info(self, info: dict[str, Any]) -> None:
        write_json(self.path / RUN_JSON, info)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        return self.read(METRICS)

    def samples(self) -> list[dict[str, Any]]:
        """Each sampled question once: where, question, expected, and the answers before and after
        training."""
        found: dict[str, dict[str, Any]] = {}
        rows = self.read(SAMPLES)
        last = max((row["step"] for row in rows), default=0)
        for row in rows:
            if row["step"] not in (0, last):
                continue
            sample = found.setdefault(
                row["where"], {k: row[k] for k in ("where", "question", "expected")}
            )
            when = "before" if row["step"] == 0 else "after"
            sample[when], sample[f"{when}_stopped"] = row["answer"], row["stopped"]
        return [sample for sample in found.values() if "before" in sample and "after" in sample]

    def read(self, name: str) -> list[dict[str, Any]]:
        """All rows of one of the run's .jsonl files; a last line cut off by a crash is left out."""
        file = self.path / name
        if not file.is_file():
            return []
        rows = []
        for line in file.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows

    def log(self, line: str) -> None:
        """One more line of log.txt; what cannot be written there is left out."""
        with contextlib.suppress(OSError), (self.path / LOG).open("a", encoding="utf-8") as file:
            file.write(f"{datetime.now().isoformat(timespec='seconds')} {line}\n")

    def append(self, name: str, row: dict[str, Any]) -> None:
        """One more row of a .jsonl file.

        Raises:
            StorageError: the disk said no.
        """
        file = self.path / name
        try:
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write {file}: {error.strerror}",
                ways_out=["free space; then repeat the command with --resume_from_checkpoint auto"],
            ) from error

    def cut(self, name: str, last_step: int) -> None:
        """Drop a .jsonl file's rows of steps after last_step."""
        if not (self.path / name).is_file():
            return
        rows = [row for row in self.read(name) if row["step"] <= last_step]
        write_bytes(
            self.path / name,
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
        )

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
                except BlockingIOError as error:
                    holder = os.read(descriptor, 200).decode(errors="replace").strip()
                    raise BusyError(
                        f"another process trains in {self.path}",
                        found=holder or "unknown process",
                        ways_out=["wait for it, or stop it", "or train into another --output_dir"],
                    ) from error
                except OSError as error:
                    raise StorageError(
                        f"the file system of {self.path} has no locks: {error.strerror}",
                        ways_out=["choose an --output_dir on a local disk"],
                    ) from error
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"pid {os.getpid()} on {platform.node()}\n".encode())
            yield
        finally:
            os.close(descriptor)


def is_run(path: str | Path) -> bool:
    return (Path(path).expanduser() / RUN_JSON).is_file()

"""The run directory: the product of training, as plain files other programs can read.

``LOCK`` is held with flock while a trainer works; the kernel releases it when the process dies,
however it dies, so there are no stale locks. ``metrics.jsonl`` is append-only; after a resume the
rows past the checkpoint are cut off, so every step stands there once.
"""

import contextlib
import hashlib
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
from ..files.atomic import (
    append,
    fcntl,
    open_own,
    read_json,
    sha256_file,
    ways_around,
    write_bytes,
    write_json,
)
from ..files.inside import refuse_foreign

RUN_JSON, METRICS, SAMPLES, EVALS = "run.json", "metrics.jsonl", "samples.jsonl", "eval.jsonl"
NONFINITE, MEMORY, PLAN_JSON = "nonfinite.jsonl", "memory.jsonl", "plan.json"
QUANT_JSON = "quant.json"
RUN_COPY = ".run.json"
"""The record once more: a flipped bit costs one of them."""
NEEDED: dict[str, tuple[str, ...]] = {
    METRICS: ("step", "loss"),
    EVALS: ("step", "loss"),
    SAMPLES: ("step", "where", "question", "expected", "answer", "stopped"),
    NONFINITE: ("step",),
    MEMORY: ("step", "phase"),
}
"""What a row of a log is read for; one without it is damaged."""
LOG = "log.txt"
"""What was said of the training, line by line, whether anybody listened or not."""
TEMPLATES_AS_TRAINED = "chat_templates.json"
"""In a run whose template is not its base's: by name, with the tags that masks are made by, which
other tools' engines refuse."""
OWN = (
    *(RUN_JSON, RUN_COPY, *NEEDED, PLAN_JSON, QUANT_JSON, LOG, TEMPLATES_AS_TRAINED),
    *("rows-*.jsonl", "README.md", "LOCK", "adapter", "checkpoints"),
)
"""Names of what a run writes and reads."""
ADAPTER_FACTS = "halfbyte.json"
"""In adapter/: the digest of the base it belongs to, and the hash of its chat template."""


HASHED = 1 << 30
"""Bytes up to which a file of a result is hashed when it is read; of larger ones the size is
compared."""


def files_of_result(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file of a result but its card, by name."""
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(directory.iterdir())
        if file.is_file() and file.name not in (ADAPTER_FACTS, "README.md")
    }


def adapter_facts(directory: Path) -> dict[str, Any]:
    """What a result says of itself: ``base_digest``, ``template_sha256``, and ``files`` as
    `files_of_result` (none, of releases that did not write them). {} of an adapter of PEFT.

    Raises:
        ModelError: it says what no release writes.
    """
    file = directory / ADAPTER_FACTS
    if not file.is_file():
        return {}
    facts = read_json(file)
    files: Any = facts.get("files", {}) if isinstance(facts, dict) else None
    whole = isinstance(files, dict) and facts.keys() <= {"base_digest", "template_sha256", "files"}
    if not whole or not all(
        isinstance(each, dict)
        and each.keys() == {"bytes", "sha256"}
        and type(each["bytes"]) is int
        and isinstance(each["sha256"], str)
        for each in files.values()
    ):
        raise ModelError(f"{file} is damaged", ways_out=AS_IT_WAS_WRITTEN)
    return {**facts, "files": files}


AS_IT_WAS_WRITTEN = [
    "bring it back from a copy",
    "move it away and repeat the command with --resume_from_checkpoint auto: it is written again "
    "from the last checkpoint",
]


def refuse_changed_result(directory: Path, *, weights: bool = True) -> None:
    """Raise ModelError, naming all of them, if files of a result are not those that were written.
    weights: look at these, too."""
    wrong = []
    for name, facts in adapter_facts(directory).get("files", {}).items():
        file = directory / name
        if not weights and name.endswith(".safetensors"):
            continue
        if not file.is_file():
            wrong.append(f"{file} is missing")
        elif file.stat().st_size != facts["bytes"] or (
            facts["bytes"] <= HASHED and sha256_file(file) != facts["sha256"]
        ):
            wrong.append(f"{file} is not the file that was written")
    if wrong:
        raise ModelError(
            "the result of this training has changed since it was written",
            found="; ".join(wrong),
            ways_out=[
                *AS_IT_WAS_WRITTEN,
                f"if you changed it yourself: take its name out of {directory / ADAPTER_FACTS}",
            ],
        )


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
        run.refuse_foreign()
        if not (run.adapter / ADAPTER_FACTS).is_file():
            raise ModelError(
                f"{run.path} has no trained adapter yet",
                expected=str(run.adapter),
                ways_out=[
                    "finish the training: repeat its command with --resume_from_checkpoint auto"
                ],
            )
        return run

    def refuse_foreign(self) -> None:
        """Raise ModelError for a link among the run's own files that leads out of it, and for what
        is no file."""
        refuse_foreign(self.path, OWN)

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
        try:
            info = self._record(RUN_JSON)
        except ModelError:
            if not (self.path / RUN_COPY).is_file():
                raise
            info = self._record(RUN_COPY)
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

    def _record(self, name: str) -> dict[str, Any]:
        """run.json or its copy, without the digest it is sealed with; releases that kept no copy
        had none."""
        info = read_json(self.path / name)
        seal, older = info.pop("sha256", None), not (self.path / RUN_COPY).is_file()
        if seal != _seal(info) and not (older and seal is None):
            raise ModelError(f"{self.path / name} is damaged", found="its digest is another")
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
        sealed = {**info, "sha256": _seal(info)}
        write_json(self.path / RUN_JSON, sealed)
        write_json(self.path / RUN_COPY, sealed)

    def metrics(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        return self.read(METRICS)

    def samples(self) -> list[dict[str, Any]]:
        """Each sampled question once: where, question (all that was read), asked (the last turn of
        it), expected, and the answers before and after training."""
        found: dict[str, dict[str, Any]] = {}
        rows = self.read(SAMPLES)
        last = max((row["step"] for row in rows), default=0)
        for row in rows:
            if row["step"] not in (0, last):
                continue
            sample = found.setdefault(
                row["where"],
                {
                    **{k: row[k] for k in ("where", "question", "expected")},
                    "asked": row.get("asked") or row["question"],  # releases before had no "asked"
                },
            )
            when = "before" if row["step"] == 0 else "after"
            sample[when], sample[f"{when}_stopped"] = row["answer"], row["stopped"]
        return [sample for sample in found.values() if "before" in sample and "after" in sample]

    def read(self, name: str) -> list[dict[str, Any]]:
        """All rows of one of the run's .jsonl files; a last line cut off by a crash, and damaged
        ones, are left out."""
        return self._rows(name)[0]

    def _rows(self, name: str) -> tuple[list[dict[str, Any]], list[tuple[int, bytes]]]:
        """The rows of a .jsonl file, and its damaged lines: their number, and what stands there."""
        file = self.path / name
        rows, damaged = [], []
        lines = file.read_bytes().split(b"\n") if file.is_file() else []
        for number, line in enumerate(lines, 1):
            if not line:
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if _is_row(row, name):
                rows.append(row)
            elif number < len(lines):  # the last is one that a crash cut off
                damaged.append((number, line))
        return rows, damaged

    def log(self, line: str) -> None:
        """One more line of log.txt; what cannot be written there is left out."""
        with contextlib.suppress(OSError):
            append(self.path / LOG, f"{datetime.now().isoformat(timespec='seconds')} {line}\n")

    def append(self, name: str, row: dict[str, Any]) -> None:
        """One more row of a .jsonl file.

        Raises:
            StorageError: the disk said no.
        """
        file = self.path / name
        try:
            append(file, json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write {file}: {error.strerror}",
                ways_out=ways_around(
                    error, "then repeat the command with --resume_from_checkpoint auto"
                ),
            ) from error

    def cut(self, name: str, last_step: int) -> list[int]:
        """Drop a .jsonl file's rows of steps after last_step; damaged lines are set aside in a file
        of their own.

        Returns:
            The numbers of damaged lines.
        """
        if not (self.path / name).is_file():
            return []
        found, damaged = self._rows(name)
        if damaged:
            aside = self.path / f"{name}.damaged"
            write_bytes(aside, b"".join(line + b"\n" for _, line in damaged))
        rows = [row for row in found if row["step"] <= last_step]
        write_bytes(
            self.path / name,
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode(),
        )
        return [number for number, _ in damaged]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for writing.

        Raises:
            BusyError: another process holds it; names it.
        """
        path = self.path / "LOCK"
        try:
            descriptor = open_own(path, os.O_RDWR)
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


def _is_row(row: Any, name: str) -> bool:
    needed = NEEDED.get(name, ())
    whole = isinstance(row, dict) and all(key in row for key in needed)
    return whole and type(row.get("step", 0)) is int


def _seal(info: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(info, sort_keys=True, default=str).encode()).hexdigest()


def is_run(path: str | Path) -> bool:
    return (Path(path).expanduser() / RUN_JSON).is_file()

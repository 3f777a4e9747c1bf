"""The tokenized rows of a large file, kept for the next command that reads it: a plan, a training
and its resume tokenize it once, and a command that is interrupted is gone on from.

An entry is named by everything its rows are made of (the file's bytes, tokenizer, templates,
options, the code itself), is there whole or not at all, and is hashed before it is used.
"""

import contextlib
import functools
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy

from ..errors import DataError, HalfbyteError, StorageError, first_line
from ..files import atomic
from ..files.places import cache_directory
from .stored_rows import StoredRows

KEPT_FROM = 64 << 20
"""Bytes of a source from which its rows are kept."""
ENTRIES = 3
"""So many are kept; the one that was used longest ago goes."""
FACTS, INDEX, SO_FAR = "rows.json", "index.npz", "so_far.npz"


@dataclass
class TokenizedData:
    """A source's rows and what was found in it. count: rows that were read, bad ones too. noticed:
    what people should be told of them. unread: columns that nothing reads."""

    rows: StoredRows
    format: str
    count: int
    bad: list[DataError]
    unread: Counter[str]
    noticed: Counter[str]


@dataclass
class Making:
    """Rows that are being made, and how far that is. place: where that is noted now and then, so
    that a command that was interrupted is gone on from; None: nowhere. read: examples of the source
    that rows were made of, or refused. noticed: what people should be told of them. hashed: sha256
    of the beginning of each file of the rows, and how much of it that is."""

    rows: StoredRows
    place: Path | None = None
    read: int = 0
    refused: list[DataError] = field(default_factory=list)
    noticed: Counter[str] = field(default_factory=Counter)
    hashed: "dict[str, tuple[hashlib._Hash, int]]" = field(default_factory=dict)

    def note(self) -> None:
        """Note how far it is."""
        if self.place is None:
            return
        for name, size in self.rows.sizes().items():
            digest, before = self.hashed.get(name, (hashlib.sha256(), 0))
            self.hashed[name] = _hashed_on(digest, self.place / name, before, size), size
        facts = {
            "highest": self.rows.highest,
            "read": self.read,
            "refused": list(map(_values, self.refused)),
            "noticed": dict(self.noticed),
            "digests": _hexdigests(self.hashed),
        }
        raw = numpy.frombuffer(json.dumps(facts).encode(), numpy.uint8)
        building = self.place / f".{SO_FAR}"
        with contextlib.suppress(OSError):  # it costs nothing but time
            with building.open("wb") as file:
                numpy.savez(file, facts=raw, **self.rows.arrays())
            building.replace(self.place / SO_FAR)

    @classmethod
    def going_on(cls, place: Path) -> "Making":
        """From where an earlier command was, if what it left is as it was noted."""
        try:
            with (place / SO_FAR).open("rb") as file, numpy.load(file) as index:
                facts = json.loads(index["facts"].tobytes())
                rows = StoredRows.opened(place, index, facts["highest"])
            hashed = {
                name: (_hashed_on(hashlib.sha256(), place / name, 0, size), size)
                for name, size in rows.sizes().items()
            }
            if facts["digests"] == _hexdigests(hashed):
                rows.go_on()
                refused = list(map(_error, facts["refused"]))
                noticed = Counter[str](facts["noticed"])
                return cls(rows, place, facts["read"], refused, noticed, hashed)
        except (HalfbyteError, OSError, KeyError, TypeError, ValueError, EOFError, BadZipFile):
            pass  # none, or damaged
        shutil.rmtree(place, ignore_errors=True)
        return cls(StoredRows(place), place)


def kept_or_made(
    source: str,
    files: list[Path],
    identity: dict[str, Any],
    make: Callable[[Making], TokenizedData],
    say: Callable[[str], None],
) -> TokenizedData:
    """The rows of a source: those of an earlier command, else made anew, and kept if it is large.

    Args:
        files: of the source, that are read.
        identity: what they are made of beside their bytes.
        make: makes the rows, from where it is.
    """
    if sum(file.stat().st_size for file in files) < KEPT_FROM:
        return make(Making(StoredRows()))
    digests = [atomic.sha256_file(file) for file in files]
    key = hashlib.sha256(
        json.dumps([source, digests, identity, _code()], sort_keys=True, default=str).encode()
    ).hexdigest()[:32]
    home = cache_directory() / "rows"
    try:
        atomic.check_writable(home)
    except StorageError as error:
        say(f"the tokenized rows are not kept: {error.what}")
        return make(Making(StoredRows()))
    waiting = functools.partial(say, "another command tokenizes these rows: waiting for it")
    with atomic.locked_file(home / f"{key}.lock", waiting):
        if (found := _opened(home / key)) is not None:
            say(f"{len(found.rows):,} rows as they were tokenized before (kept in {home})")
            return found
        building = home / f".{key}.tmp"  # of a dead process, as its lock is ours
        making = Making.going_on(building)
        if making.read:
            say(f"going on after the {making.read:,} rows that an interrupted command tokenized")
        try:
            found = make(making)
        except Exception:
            shutil.rmtree(building, ignore_errors=True)
            raise
        try:
            size = _keep(found, building)
            shutil.rmtree(home / key, ignore_errors=True)
            building.rename(home / key)
            atomic.sync(home)
        except (OSError, StorageError) as error:  # they are open, and go with the process
            say(f"the tokenized rows are not kept: {first_line(error)}")
            shutil.rmtree(building, ignore_errors=True)
            return found
    _remove_oldest(home)
    say(f"the tokenized rows are kept for other commands: {size / 1e9:.1f} GB in {home}")
    return found


def _code() -> dict[str, str]:
    """What makes rows: our own code and the libraries it stands on."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    libraries = ("tokenizers", "transformers", "jinja2")
    return {"halfbyte": digest.hexdigest(), **{name: metadata.version(name) for name in libraries}}


def _keep(found: TokenizedData, place: Path) -> int:
    """Write what is not in the rows' own files yet, and a record of all; returns their bytes."""
    (place / SO_FAR).unlink(missing_ok=True)
    numpy.savez(place / INDEX, **found.rows.arrays())
    facts = {
        "files": {
            file.name: [file.stat().st_size, atomic.sha256_file(file)]
            for file in sorted(place.iterdir())
        },
        "highest": found.rows.highest,
        "format": found.format,
        "count": found.count,
        "bad": list(map(_values, found.bad)),
        "unread": dict(found.unread),
        "noticed": dict(found.noticed),
    }
    for file in place.iterdir():
        atomic.sync(file)
    atomic.write_json(place / FACTS, {**facts, "digest": _digest(facts)})
    return sum(file.stat().st_size for file in place.iterdir())


def _values(error: DataError) -> list[Any]:
    return [error.what, error.where, error.found, error.expected, error.ways_out]


def _error(values: list[Any]) -> DataError:
    what, where, found, expected, ways_out = values
    return DataError(what, where=where, found=found, expected=expected, ways_out=ways_out)


def _hashed_on(digest: "hashlib._Hash", file: Path, start: int, stop: int) -> "hashlib._Hash":
    """A digest with a part of a file, as far as it is there."""
    with file.open("rb") as stream:
        stream.seek(start)
        while part := stream.read(min(stop - start, 1 << 20)):
            digest.update(part)
            start += len(part)
    return digest


def _hexdigests(hashed: "dict[str, tuple[hashlib._Hash, int]]") -> dict[str, str]:
    return {name: digest.hexdigest() for name, (digest, _) in hashed.items()}


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _opened(place: Path) -> TokenizedData | None:
    """An entry that is whole and unchanged."""
    try:
        facts = atomic.read_json(place / FACTS)
        if facts.pop("digest") != _digest(facts):
            return None
        for name, (size, sha256) in facts["files"].items():
            file = place / name
            if file.stat().st_size != size or atomic.sha256_file(file) != sha256:
                return None
        with (place / INDEX).open("rb") as file, numpy.load(file) as index:
            rows = StoredRows.opened(place, index, facts["highest"])
        with contextlib.suppress(OSError):
            (place / FACTS).touch()  # it was used now
        return TokenizedData(
            rows,
            facts["format"],
            facts["count"],
            list(map(_error, facts["bad"])),
            Counter(facts["unread"]),
            Counter(facts["noticed"]),
        )
    except (HalfbyteError, OSError, KeyError, TypeError, ValueError):
        return None  # not made yet, or damaged


def _remove_oldest(home: Path) -> None:
    entries = [place for place in home.iterdir() if (place / FACTS).is_file()]
    entries.sort(key=lambda place: (place / FACTS).stat().st_mtime, reverse=True)
    for place in entries[ENTRIES:]:
        with contextlib.suppress(OSError):
            atomic.remove_directory(place)
            (home / f"{place.name}.lock").unlink(missing_ok=True)
    week = time.time() - 7 * 24 * 3600
    for place in home.glob(".*.tmp"):  # of commands that nobody came back to
        with contextlib.suppress(OSError):
            if place.stat().st_mtime < week:
                atomic.remove_directory(place)

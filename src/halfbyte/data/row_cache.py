"""The tokenized rows of a large file, kept for the next command that reads it: a plan, a training
and its resume tokenize it once.

An entry is named by everything its rows are made of (the file's bytes, tokenizer, templates,
options, the code itself), is there whole or not at all, and is hashed before it is used.
"""

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..errors import DataError, HalfbyteError, StorageError, first_line
from ..files import atomic
from ..files.places import cache_directory
from .readers import files_of, sources
from .stored_rows import StoredRows

KEPT_FROM = 64 << 20
"""Bytes of a source from which its rows are kept."""
ENTRIES = 3
"""So many are kept; the one that was used longest ago goes."""
FACTS = "rows.json"


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


def kept_or_made(
    source: str,
    identity: dict[str, Any],
    make: Callable[[StoredRows], TokenizedData],
    say: Callable[[str], None],
) -> TokenizedData:
    """The rows of a source: those of an earlier command, else made anew, and kept if it is large.

    Args:
        identity: what they are made of beside the source's bytes.
        make: fills the rows it is given.
    """
    files = [file for name, _ in sources(source) for file in files_of(name)]
    if sum(file.stat().st_size for file in files) < KEPT_FROM:
        return make(StoredRows())
    digests = [atomic.sha256_file(file) for file in files]
    key = hashlib.sha256(
        json.dumps([source, digests, identity, _code()], sort_keys=True, default=str).encode()
    ).hexdigest()[:32]
    home = cache_directory() / "rows"
    try:
        atomic.check_writable(home)
    except StorageError as error:
        say(f"the tokenized rows are not kept: {error.what}")
        return make(StoredRows())
    with atomic.locked_file(home / f"{key}.lock"):
        if (found := _opened(home / key)) is not None:
            say(f"{len(found.rows):,} rows as they were tokenized before (kept in {home})")
            return found
        building = home / f".{key}.tmp"  # of a dead process, as its lock is ours
        shutil.rmtree(building, ignore_errors=True)
        try:
            found = make(StoredRows(building))
            try:
                size = _keep(found, building)
                shutil.rmtree(home / key, ignore_errors=True)
                building.rename(home / key)
                atomic.sync(home)
            except (OSError, StorageError) as error:  # they are open, and go with the process
                say(f"the tokenized rows are not kept: {first_line(error)}")
                return found
        finally:
            shutil.rmtree(building, ignore_errors=True)
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
    found.rows.save_index()
    facts = {
        "files": {
            file.name: [file.stat().st_size, atomic.sha256_file(file)]
            for file in sorted(place.iterdir())
        },
        "highest": found.rows.highest,
        "format": found.format,
        "count": found.count,
        "bad": [[e.what, e.where, e.found, e.expected, e.ways_out] for e in found.bad],
        "unread": dict(found.unread),
        "noticed": dict(found.noticed),
    }
    for file in place.iterdir():
        atomic.sync(file)
    atomic.write_json(place / FACTS, {**facts, "digest": _digest(facts)})
    return sum(file.stat().st_size for file in place.iterdir())


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
        rows = StoredRows.opened(place, facts["highest"])
        with contextlib.suppress(OSError):
            (place / FACTS).touch()  # it was used now
        return TokenizedData(
            rows,
            facts["format"],
            facts["count"],
            [
                DataError(what, where=where, found=found, expected=expected, ways_out=ways)
                for what, where, found, expected, ways in facts["bad"]
            ],
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

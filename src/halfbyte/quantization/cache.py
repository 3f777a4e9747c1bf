"""Quantized bases kept on disk for streaming, named by the digest of what they hold.

What an entry was made of (files, their sizes and times, options) leads to it; its digest is hashed
again whenever it is loaded. It is a checkpoint like any other that transformers and bitsandbytes
open.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import codebooks
from ..config.options import ModelOptions
from ..errors import HalfbyteError, ModelError, StorageError
from ..files import atomic
from ..files.atomic import locked_file
from ..files.places import cache_directory
from ..files.safetensors import Checkpoint
from ..progress import Progress
from .writer import FACTS, write_quantized


@dataclass(frozen=True)
class CacheEntry:
    """An entry of the cache: its directory, the digest of its weights, and the record of their
    quantization."""

    path: Path
    digest: str
    tensors: list[dict[str, Any]]


def cached(path: Path, options: ModelOptions, progress: Progress) -> CacheEntry:
    """The cache's entry for a model directory, made where there is none.

    Raises:
        ModelError, StorageError: as `write_quantized`.
    """
    if (
        path / FACTS
    ).is_file():  # written by `write_quantized`, digest and all: it is its own entry
        return _entry(path)
    home, identity = cache_directory(), _identity(path, options)
    leads = home / "sources" / f"{identity}.json"
    if (kept := _found(home, leads)) is not None:
        return kept
    try:
        leads.parent.mkdir(parents=True, exist_ok=True)
        with locked_file(home / "sources" / f"{identity}.lock"):
            return _found(home, leads) or _make(path, options, progress, home, leads)
    except (OSError, StorageError) as error:
        raise StorageError(
            f"cannot keep the quantized weights in {home}",
            found=error.what if isinstance(error, StorageError) else str(error.strerror),
            ways_out=atomic.ways_around(
                error.__cause__ if isinstance(error, StorageError) and error.__cause__ else error,
                "name another directory: HALFBYTE_CACHE=...",
            ),
        ) from error


def _found(home: Path, leads: Path) -> CacheEntry | None:
    try:
        digest = atomic.read_json(leads)["digest"]
        kept = _entry(home / "bases" / digest)
        return kept if kept.digest == digest else None
    except (HalfbyteError, KeyError, TypeError):
        return None  # not made yet, or removed


def _make(
    path: Path, options: ModelOptions, progress: Progress, home: Path, leads: Path
) -> CacheEntry:
    """A new entry; the caller holds the lock of what it is made of, so leftovers of that name are a
    dead process's."""
    atomic.check_writable(home / "bases")
    temporary = home / "bases" / f".{leads.stem[:32]}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        report = write_quantized(path, options, temporary, progress)
        final = home / "bases" / report.digest
        try:
            _entry(final)  # the same weights from elsewhere: others may be reading them
        except (HalfbyteError, KeyError, TypeError):
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
            atomic.sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    atomic.write_json(leads, {"digest": report.digest, "source": str(path)})
    return _entry(final)


def _entry(path: Path) -> CacheEntry:
    facts = atomic.read_json(path / FACTS)
    listed = facts.get("tensors")
    known = isinstance(listed, list) and all(isinstance(tensor, dict) for tensor in listed)
    if not isinstance(facts.get("digest"), str) or not known:
        raise ModelError(f"{path / FACTS} is damaged")
    return CacheEntry(path, facts["digest"], facts["tensors"])


def remove(kept: CacheEntry) -> bool:
    """Delete an entry of the cache; False for a directory that is somebody's, or where it cannot
    be."""
    if kept.path.parent != cache_directory() / "bases":
        return False
    shutil.rmtree(kept.path, ignore_errors=True)
    return not kept.path.exists()


_SAMPLE = 1 << 16
"""Bytes read at the beginning, the middle and the end of each file: under a millisecond a shard."""


def _samples(file: Path, size: int) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for start in (0, max(0, size // 2 - _SAMPLE), max(0, size - _SAMPLE)):
            opened.seek(start)
            digest.update(opened.read(_SAMPLE))
    return digest.hexdigest()


def _identity(path: Path, options: ModelOptions) -> str:
    """What a quantized base is made of, and the options: files by size, times (of the file system's
    own record as well, which no copy keeps), place on the disk, and samples of their bytes."""
    facts: list[Any] = []
    for file in Checkpoint(path).files:
        found = file.stat()
        place = (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        facts.append((str(file.resolve()), *place, _samples(file, found.st_size)))
    facts += [
        options.bnb_4bit_quant_type,
        options.bnb_4bit_blocksize,
        options.bnb_4bit_use_double_quant,
    ]
    facts += [
        hashlib.sha256((path / "config.json").read_bytes()).hexdigest(),
        codebooks.levels(options.bnb_4bit_quant_type),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

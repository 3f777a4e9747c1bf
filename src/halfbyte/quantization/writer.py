"""A base in 4 bits on disk, as bitsandbytes stores it: written a tensor at a time, and kept in a cache.

Weights that are streamed lie here (`load` with weight_streaming). An entry of the cache is named by the digest of what
it holds, which is hashed again whenever it is loaded; what it was made of (files, their sizes and times, options) leads
to it. It is a checkpoint like any other that transformers and bitsandbytes open.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import codebooks
from ..config.options import ModelOptions
from ..errors import HalfbyteError, ModelError, StorageError, UsageError
from ..files import hub
from ..model.architecture import Progress, build_empty, read_config
from ..run.directory import locked_file
from .tensor import NESTED_BLOCK_SIZE, STATE_KEY, NF4Tensor, components, quantized_names, stored_keys
from .weights import Filler, QuantReport

SHARD = 4 << 30
"""Bytes of one file, about."""
FACTS = "halfbyte_quantized.json"
_STATE_ROOM = 512
"""Longest quant_state, bytes: six short entries, a shape, a number."""


def check_quantization(path: Path, config: Any) -> None:
    """Raise ModelError for weights quantized in a format that is not read here."""
    if config is None:
        return
    values = config if isinstance(config, dict) else config.to_dict()
    if values.get("quant_method") != "bitsandbytes" or values.get("load_in_8bit"):
        raise ModelError(
            f"{path} is quantized in a format that is not read here",
            found=f"quant_method {values.get('quant_method')!r}",
            expected="an unquantized checkpoint, or bitsandbytes 4-bit",
        )


def write_quantized(path: Path, options: ModelOptions, directory: Path, progress: Progress) -> QuantReport:
    """The weights of a model directory in 4 bits, with its configuration, into a directory; and their digest.

    Args:
        options: quant_type, block size, double quantization. What is not held in 4 bits is written as it is.

    Raises:
        ModelError: as `load.load_base`. StorageError: the disk said no.
    """
    config = read_config(path)
    check_quantization(path, getattr(config, "quantization_config", None))
    checkpoint = hub.Checkpoint(path)
    filler = Filler(build_empty(config), checkpoint, options, torch.bfloat16, torch.device("cpu"))
    filler.check_names()
    shards, weight_map, size = list(_shards(filler)), {}, 0
    waiting = iter(progress(filler.sources, len(filler.sources), "quantizing"))
    for number, sources in enumerate(shards):
        name = hub.SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        known: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        late: dict[str, int] = {}
        for source in sources:
            layout = _layout(filler, source)
            late |= {key: shape[0] for key, (_, shape) in layout.items() if STATE_KEY in key}
            known |= {key: value for key, value in layout.items() if key not in late}
        with hub.TensorFile(directory / name, known, late) as file:
            for _ in sources:
                source = next(waiting)
                value = filler.read(source)
                written = components(source, value) if isinstance(value, NF4Tensor) else {source: value}
                for key, tensor in written.items():
                    file.write(key, tensor)
            size += file.written
        weight_map |= dict.fromkeys((*known, *late), name)
    for _ in waiting:  # the progress bar ends
        pass
    if len(shards) > 1:
        hub.write_json(directory / hub.INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    said = hub.read_json(path / "config.json")  # of stored 4-bit weights it says what they are
    hub.write_json(directory / "config.json", said if filler.stored_4bit else {**said, **_quantization(options)})
    report = QuantReport(options.bnb_4bit_quant_type, filler.coverage(), filler.records, filler.digest())
    hub.write_json(directory / FACTS, {"digest": report.digest, "tensors": report.tensors})
    return report


def _quantization(options: ModelOptions) -> dict[str, Any]:
    """What config.json says of the weights, by the names that other tools read."""
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": options.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": options.bnb_4bit_use_double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": None,
        "llm_int8_threshold": 6.0,
    }
    return {"quantization_config": settings}


def _shards(filler: Filler) -> Iterator[list[str]]:
    """Sources in the order they lie on disk, in files of about `SHARD` bytes."""
    part: list[str] = []
    size = 0
    for source in filler.sources:
        part.append(source)
        size += sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in _layout(filler, source).values())
        if size >= SHARD:
            yield part
            part, size = [], 0
    if part:
        yield part


def _layout(filler: Filler, source: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor that is stored for a source; of its quant_state, a length it does not exceed."""
    entry, options = filler.checkpoint.entries[source], filler.options
    if source in filler.stored_4bit:  # as `nf4.components` writes it, whatever it is stored as
        entries = filler.checkpoint.entries
        kept: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {source: (torch.uint8, (entry.nbytes, 1))}
        for key in stored_keys(entries, source)[1:]:
            late = STATE_KEY in key
            count = max(_STATE_ROOM, entries[key].nbytes) if late else torch.Size(entries[key].shape).numel()
            kept[key] = (entries[key].dtype, (count,))
        return kept
    if not filler.is_quantized(source):
        return {source: (entry.dtype, entry.shape)}
    weights = torch.Size(entry.shape).numel()
    blocks = -(-weights // options.bnb_4bit_blocksize)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        source: (torch.uint8, (-(-weights // 2), 1)),
        f"{source}.absmax": (torch.uint8 if options.bnb_4bit_use_double_quant else torch.float32, (blocks,)),
        f"{source}.quant_map": (torch.float32, (16,)),
    }
    if options.bnb_4bit_use_double_quant:
        layout[f"{source}.nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCK_SIZE),))
        layout[f"{source}.nested_quant_map"] = (torch.float32, (256,))
    layout[f"{source}.{STATE_KEY}{options.bnb_4bit_quant_type}"] = (torch.uint8, (_STATE_ROOM,))
    return layout


def quantize(path: Path, options: ModelOptions, output_dir: str | Path, progress: Progress) -> QuantReport:
    """A model directory with its weights in 4 bits: `write_quantized` and the tokenizer's files; whole, or not there.

    Raises:
        UsageError: output_dir is not empty. ModelError, StorageError: as `write_quantized`.
    """
    target = Path(output_dir).expanduser().absolute()
    if stored := quantized_names(set(hub.Checkpoint(path).entries)):
        raise UsageError(f"{path} is in 4 bits already", found=f"{len(stored)} weights", ways_out=["use it as it is"])
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is not empty, or no directory", ways_out=["name a new directory with -o"])
    building = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        hub.check_writable(building)
        report = write_quantized(path, options, building, progress)
        for pattern in hub.HUB_PATTERNS:
            for file in path.glob(pattern):
                if file.suffix != ".safetensors" and file.name != hub.INDEX and not (building / file.name).exists():
                    hub.write_bytes(building / file.name, file.read_bytes())
        if target.exists():
            target.rmdir()
        building.rename(target)
        hub.sync(target.parent)
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror}", ways_out=["free space"]) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return report


# --- the cache --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """An entry of the cache: its directory, the digest of its weights, and the record of their quantization."""

    path: Path
    digest: str
    tensors: list[dict[str, Any]]


def cache_directory() -> Path:
    """``$HALFBYTE_CACHE``, else ``halfbyte`` in the user's cache directory."""
    if named := os.environ.get("HALFBYTE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfbyte"


def cached(path: Path, options: ModelOptions, progress: Progress) -> Kept:
    """The cache's entry for a model directory, made where there is none.

    Raises:
        ModelError, StorageError: as `write_quantized`.
    """
    if (path / FACTS).is_file():  # written by `write_quantized`, digest and all: it is its own entry
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
            ways_out=["free space there", "or name another directory: HALFBYTE_CACHE=..."],
        ) from error


def _found(home: Path, leads: Path) -> Kept | None:
    try:
        digest = hub.read_json(leads)["digest"]
        kept = _entry(home / "bases" / digest)
        return kept if kept.digest == digest else None
    except (HalfbyteError, KeyError, TypeError):
        return None  # not made yet, or removed


def _make(path: Path, options: ModelOptions, progress: Progress, home: Path, leads: Path) -> Kept:
    """A new entry; the caller holds the lock of what it is made of, so leftovers of that name are a dead process's."""
    hub.check_writable(home / "bases")
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
            hub.sync(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    hub.write_json(leads, {"digest": report.digest, "source": str(path)})
    return _entry(final)


def _entry(path: Path) -> Kept:
    facts = hub.read_json(path / FACTS)
    if not {"digest", "tensors"} <= facts.keys():
        raise ModelError(f"{path / FACTS} is damaged")
    return Kept(path, facts["digest"], facts["tensors"])


def remove(kept: Kept) -> bool:
    """Delete an entry of the cache; False for a directory that is somebody's, or where it cannot be."""
    if kept.path.parent != cache_directory() / "bases":
        return False
    shutil.rmtree(kept.path, ignore_errors=True)
    return not kept.path.exists()


def _identity(path: Path, options: ModelOptions) -> str:
    """What a quantized base is made of: files by size and time of change, and the options."""
    files = hub.Checkpoint(path).files
    facts: list[Any] = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    facts += [options.bnb_4bit_quant_type, options.bnb_4bit_blocksize, options.bnb_4bit_use_double_quant]
    facts += [
        hashlib.sha256((path / "config.json").read_bytes()).hexdigest(),
        codebooks.levels(options.bnb_4bit_quant_type),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

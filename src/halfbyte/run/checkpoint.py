"""Resumable state: a directory per checkpoint, complete or not counted at all.

``checkpoints/step-00000040/`` holds the adapter as PEFT writes it, the optimizer's raw state,
``state.json`` and, last, ``manifest.json`` with size and sha256 of every other file. It is written
under a temporary name, synced, renamed, and only then are older ones removed. A checkpoint counts
if its manifest's name, sizes and hashes hold; the newest is the one with the highest step, whatever
the clock says. Everything random is a function of the step, so there is no random state to save;
saves happen between optimizer steps only.
"""

import contextlib
import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.lora import has_adapter
from ..adapters.peft_files import adapter_bytes, restore_adapter, save_adapter
from ..engine.adamw8bit import AdamW8bit
from ..engine.paged_optimizers import PagedAdamW, PagedAdamW8bit
from ..errors import HalfbyteError, ModelError, StorageError
from ..files import atomic
from ..files.atomic import (
    free_bytes,
    json_bytes,
    read_json,
    remove_directory,
    sha256_file,
    write_json,
)
from ..files.safetensors import read_header, read_tensor, write_safetensors

SCHEMA = 2
OPTIMIZER, STATE, MANIFEST = "optimizer.safetensors", "state.json", "manifest.json"
FULL_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Found:
    """A valid checkpoint."""

    path: Path
    step: int


def save(
    directory: Path,
    step: int,
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    base: str,
    best: int | None = None,
) -> Path:
    """Write checkpoint ``step`` and prune older ones to the ``keep`` newest and the one of step
    ``best``.

    Raises:
        StorageError: the disk said no; nothing is left behind and older checkpoints are untouched.
    """
    final = directory / f"step-{step:08d}"
    again = "then repeat the command with --resume_from_checkpoint auto"
    with atomic.new_directory(
        final, replace=True, doing="save checkpoint", ways_out=[again]
    ) as building:
        if has_adapter(model):
            save_adapter(model, building, base)
        else:
            write_safetensors(building / FULL_WEIGHTS, trained_tensors(model))
        write_safetensors(building / OPTIMIZER, optimizer_tensors(optimizer))
        release_states(optimizer)
        write_json(building / STATE, {"schema": SCHEMA, "step": step, **state})
        files = {file.name: _facts(file) for file in sorted(building.iterdir())}
        write_json(building / MANIFEST, _sealed({"schema": SCHEMA, "step": step, "files": files}))
    check(final)
    for path in directories(directory)[:-keep]:
        if path != final and (best is None or path.name != f"step-{best:08d}"):
            with contextlib.suppress(OSError):
                remove_directory(path)
    return final


def directories(directory: Path) -> list[Path]:
    """Directories with a checkpoint's name, oldest first; whatever else lies there is somebody's
    own."""
    if not directory.is_dir():
        return []
    return sorted(
        path
        for path in directory.iterdir()
        if path.is_dir() and re.fullmatch(r"step-\d{8}", path.name)
    )


def _facts(file: Path) -> dict[str, Any]:
    facts: dict[str, Any] = {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
    if file.suffix == ".safetensors":
        facts["tensors"] = sorted(read_header(file))
    return facts


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a digest of itself: a flipped bit in a name or size makes it damaged, not
    another manifest."""
    return {
        **manifest,
        "digest": hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest(),
    }


def check(path: Path) -> int:
    """The step of a checkpoint directory, after comparing every file with the manifest.

    Raises:
        ModelError: naming the first file that is missing or differs.
        StorageError: the system cannot read one.
    """
    try:
        return _check(path)
    except OSError as error:
        raise StorageError(f"cannot read checkpoint {path}: {error.strerror}") from error


def _check(path: Path) -> int:
    file = path / MANIFEST
    manifest = read_json(file)
    sealed = {key: value for key, value in manifest.items() if key != "digest"}
    if manifest != _sealed(sealed) or file.read_bytes() != json_bytes(manifest):
        raise ModelError(f"checkpoint file {file} is damaged")
    if manifest.get("schema") != SCHEMA:
        raise ModelError(
            f"{file} was written by another version", found=f"schema {manifest.get('schema')!r}"
        )
    step = manifest["step"]
    if path.name != f"step-{step:08d}":
        raise ModelError(f"{file} does not belong to {path.name}")
    for name, facts in manifest["files"].items():
        item = path / name
        if (
            not item.is_file()
            or item.stat().st_size != facts["bytes"]
            or sha256_file(item) != facts["sha256"]
        ):
            raise ModelError(f"checkpoint file {item} is missing or damaged")
    return step


def listed(directory: Path) -> list[tuple[Path, str]]:
    """Every checkpoint directory, oldest first, and what is wrong with it ("" if nothing)."""
    found = []
    for path in directories(directory):
        try:
            check(path)
            found.append((path, ""))
        except HalfbyteError as error:
            found.append((path, error.what))
    return found


def newest(directory: Path) -> tuple[Found | None, list[str]]:
    """The valid checkpoint with the highest step, and a line for each newer one that is not
    valid."""
    damaged = []
    for path in reversed(directories(directory)):
        try:
            return Found(path, check(path)), damaged
        except HalfbyteError as error:
            damaged.append(error.what)
    return None, damaged


def bytes_needed(model: Any, optimizer: torch.optim.Optimizer) -> int:
    """What one checkpoint takes on disk (64 KiB of names and numbers on top)."""
    trained = adapter_bytes(model) or sum(t.nbytes for t in trained_tensors(model).values())
    return trained + (state_bytes(optimizer) or 2 * trained) + (1 << 16)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of the optimizer's states, wherever they lie; 0 before they are made."""
    return sum(t.nbytes for t in optimizer_tensors(optimizer).values())


def refuse_full_disk(directory: Path, one: int, keep: int) -> None:
    """Raise StorageError where the run's checkpoints, and one more while it is written, would not
    fit."""
    there = (
        sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        if directory.exists()
        else 0
    )
    needed, free = (keep + 1) * one + one, free_bytes(directory.parent)
    if free is not None and needed - there > free:
        raise StorageError(
            f"{directory.parent} has {free / 2**20:,.0f} MiB free; this run writes "
            f"{needed / 2**20:,.0f} MiB",
            expected=f"{keep} checkpoints, one more while it is written, and the adapter: "
            f"{one / 2**20:,.1f} MiB each",
            ways_out=["free space", "choose another --output_dir", "lower --save_total_limit"],
        )


def read_state(found: Found) -> dict[str, Any]:
    return read_json(found.path / STATE)


def restore(
    found: Found, model: Any, optimizer: torch.optim.Optimizer, convert: bool = False
) -> int:
    """Bring model and optimizer to a checkpoint's state, bit for bit; returns the updates made
    until then.

    Args:
        convert: take a state of an older release's rules: in 16 bits, or in 8 bits of embeddings
            and heads.
    """
    if has_adapter(model):
        restore_adapter(model, found.path)
    else:
        _copy_all(trained_tensors(model), found.path / FULL_WEIGHTS, convert)
    updates = read_state(found)["updates"]
    if isinstance(optimizer, AdamW8bit):
        optimizer.steps = updates
    elif isinstance(optimizer, PagedAdamW) and optimizer.paged:
        optimizer.restart(updates)
    else:
        _create_state(
            optimizer,
            updates,
            {name.partition(".")[0] for name in read_header(found.path / OPTIMIZER)},
        )
    if convert:
        _take_older(optimizer, [p for p in model.parameters() if p.requires_grad], found, updates)
    else:
        _copy_all(optimizer_tensors(optimizer), found.path / OPTIMIZER)
    release_states(optimizer)
    return updates


def _take_older(
    optimizer: torch.optim.Optimizer, trained: list[nn.Parameter], found: Found, updates: int
) -> None:
    """The state of a release that had all parameters in one group, none apart by its kind."""
    file = found.path / OPTIMIZER
    if isinstance(optimizer, AdamW8bit):
        older = AdamW8bit(trained)
        _copy_all(optimizer_tensors(older), file)
        optimizer.take(older)
        return
    plain = torch.optim.AdamW(trained)
    _create_state(plain, updates, {name.partition(".")[0] for name in read_header(file)})
    _copy_all(optimizer_tensors(plain), file, convert=True)
    for p, state in plain.state.items():
        mine = optimizer.state.setdefault(p, {"step": torch.tensor(float(updates))})
        for name in ("exp_avg", "exp_avg_sq"):
            if name in mine:
                mine[name].copy_(state[name])
            else:
                mine[name] = state[name]


def release_states(optimizer: torch.optim.Optimizer) -> None:
    """Let go of the memory that reading or writing all of a paged optimizer's states took."""
    if isinstance(optimizer, PagedAdamW8bit | PagedAdamW):
        optimizer.release()


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors under stable names (torch's AdamW: by the parameter's place)."""
    if isinstance(optimizer, AdamW8bit) or (isinstance(optimizer, PagedAdamW) and optimizer.paged):
        return optimizer.state_tensors()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{place}.{key}": optimizer.state[p][key]
        for place, p in enumerate(params)
        for key in ("exp_avg", "exp_avg_sq")
        if p in optimizer.state
    }


def _create_state(optimizer: torch.optim.Optimizer, step: int, places: set[str]) -> None:
    """Room for torch AdamW's state of the parameters at these places; others never had a
    gradient."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.state.clear()
    for place, p in enumerate(params):
        if str(place) in places:
            optimizer.state[p] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def _copy_all(tensors: dict[str, Tensor], file: Path, convert: bool = False) -> None:
    entries = read_header(file)
    if entries.keys() != tensors.keys():
        differ = sorted(entries.keys() ^ tensors.keys())
        raise ModelError(
            f"{file} does not hold what this training keeps", found=", ".join(differ[:5])
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            same = entries[name].dtype == tensor.dtype or convert
            if entries[name].shape != tuple(tensor.shape) or not same:
                raise ModelError(
                    f"{file}: {name} has another shape or dtype than this training keeps"
                )
            tensor.copy_(read_tensor(entries[name], name))


def remove_unfinished(directory: Path) -> None:
    """Delete what an interrupted save left behind and set damaged checkpoints aside; only under the
    run's lock."""
    for path, wrong in listed(directory):
        if wrong:
            with contextlib.suppress(OSError):
                path.rename(path.with_name(f"damaged-{path.name}"))
    for leftover in directory.glob(".step-*.tmp"):
        with contextlib.suppress(OSError):
            shutil.rmtree(leftover)

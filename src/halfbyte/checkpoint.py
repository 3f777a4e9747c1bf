"""Resumable state: a directory per checkpoint, complete or not counted at all.

``checkpoints/step-00000040/`` holds the adapter as PEFT writes it, the optimizer's raw state, ``state.json`` and, last,
``manifest.json`` with size and sha256 of every other file. It is written under a temporary name, synced, renamed, and
only then are older ones removed. A checkpoint counts if its manifest's name, sizes and hashes hold; the newest is the
one with the highest step, whatever the clock says. Everything random is a function of the step, so there is no random
state to save; saves happen between optimizer steps only.
"""

import contextlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adamw8bit import AdamW8bit
from .errors import HalfbyteError, ModelError, StorageError
from .hub import read_header, read_json, read_tensor, sha256_file, sync, write_json, write_safetensors
from .lora import WEIGHTS, lora_layers, restore_adapter, save_adapter

SCHEMA = 1
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
) -> Path:
    """Write checkpoint ``step`` and prune older ones to ``keep``.

    Raises:
        StorageError: the disk said no; nothing is left behind and older checkpoints are untouched.
    """
    final = directory / f"step-{step:08d}"
    temporary = directory / f".step-{step:08d}.{os.getpid()}.tmp"
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        if any(True for _ in lora_layers(model)):
            save_adapter(model, temporary, base)
        else:
            write_safetensors(temporary / FULL_WEIGHTS, trained_tensors(model))
        write_safetensors(temporary / OPTIMIZER, optimizer_tensors(optimizer))
        write_json(temporary / STATE, {"schema": SCHEMA, "step": step, **state})
        files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256_file(f)} for f in sorted(temporary.iterdir())}
        write_json(temporary / MANIFEST, {"schema": SCHEMA, "step": step, "files": files})
        sync(temporary)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync(directory)
    except OSError as error:
        raise StorageError(
            f"cannot save checkpoint {final}: {error.strerror}",
            ways_out=["free space; then repeat the command with --resume_from_checkpoint auto"],
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    check(final)
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def check(path: Path) -> int:
    """The step of a checkpoint directory, after comparing every file with the manifest.

    Raises:
        ModelError: naming the first file that is missing or differs.
    """
    manifest = read_json(path / MANIFEST)
    try:
        step, files = manifest["step"], manifest["files"]
        expected = {name: (info["bytes"], info["sha256"]) for name, info in files.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path / MANIFEST} is damaged") from error
    if manifest.get("schema") != SCHEMA or path.name != f"step-{step:08d}":
        raise ModelError(f"{path / MANIFEST} does not belong to {path.name}")
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size or sha256_file(file) != digest:
            raise ModelError(f"checkpoint file {file} is missing or damaged")
    return step


def newest(directory: Path) -> tuple[Found | None, list[str]]:
    """The valid checkpoint with the highest step, and a line for each newer one that is not valid."""
    damaged = []
    for path in sorted(directory.glob("step-*"), reverse=True):
        try:
            return Found(path, check(path)), damaged
        except HalfbyteError as error:
            damaged.append(error.what)
    return None, damaged


def read_state(found: Found) -> dict[str, Any]:
    return read_json(found.path / STATE)


def restore(found: Found, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Bring model and optimizer to a checkpoint's state, bit for bit."""
    if any(True for _ in lora_layers(model)):
        restore_adapter(model, read_header(found.path / WEIGHTS), found.path / WEIGHTS)
    else:
        _copy_all(trained_tensors(model), found.path / FULL_WEIGHTS)
    if isinstance(optimizer, AdamW8bit):
        optimizer.steps = found.step
    else:
        _create_state(optimizer, found.step)
    _copy_all(optimizer_tensors(optimizer), found.path / OPTIMIZER)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors under stable names (torch's AdamW: by the parameter's place)."""
    if isinstance(optimizer, AdamW8bit):
        return optimizer.state_tensors()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"{place}.{key}": optimizer.state[p][key]
        for place, p in enumerate(params)
        for key in ("exp_avg", "exp_avg_sq")
        if p in optimizer.state
    }


def _create_state(optimizer: torch.optim.Optimizer, step: int) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p] = {
                "step": torch.tensor(float(step)),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }


def _copy_all(tensors: dict[str, Tensor], file: Path) -> None:
    entries = read_header(file)
    if entries.keys() != tensors.keys():
        differ = sorted(entries.keys() ^ tensors.keys())
        raise ModelError(f"{file} does not hold what this training keeps", found=", ".join(differ[:5]))
    with torch.no_grad():
        for name, tensor in tensors.items():
            if entries[name].shape != tuple(tensor.shape) or entries[name].dtype != tensor.dtype:
                raise ModelError(f"{file}: {name} has another shape or dtype than this training keeps")
            tensor.copy_(read_tensor(entries[name], name))


def remove_unfinished(directory: Path) -> None:
    """Delete what an interrupted save left behind; only under the run's lock."""
    for leftover in directory.glob(".step-*.tmp"):
        with contextlib.suppress(OSError):
            shutil.rmtree(leftover)


# --- what a resumed run must share ---

_MAY_CHANGE = {
    "output_dir",
    "resume_from_checkpoint",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "model",
    "data",
}


def fingerprint(info: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a resumed run to go on as the unbroken one would."""
    settings = {key: value for key, value in info["config"].items() if key not in _MAY_CHANGE}
    return {
        **settings,
        "data_sha256": info["data"]["sha256"],
        "template_sha256": info["template_sha256"],
        "tokenizer_sha256": info["tokenizer_sha256"],
        "total_steps": info["total_steps"],
        "compute_dtype": info["compute_dtype"],
        "threads": info["machine"]["threads"],
        "torch": info["versions"]["torch"],
    }


def refuse_changes(state: dict[str, Any], info: dict[str, Any]) -> None:
    """Raise ModelError if the checkpoint's training is another one than ``info`` (run.json) describes."""
    before, now = state["fingerprint"], fingerprint(info)
    differ = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if differ:
        raise ModelError(
            "the checkpoint belongs to another training than this command describes",
            found="; ".join(f"{key}: {before.get(key)!r} then, {now.get(key)!r} now" for key in differ),
            ways_out=["repeat the command as it was", "or start anew in another --output_dir"],
        )

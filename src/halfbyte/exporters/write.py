"""A merged model's files: the base's shards with the adapter added, one shard in memory at a time,
and what belongs to them."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.lora import LoraLinear, lora_layers
from ..adapters.modules_to_save import trained_whole
from ..errors import ModelError
from ..files import atomic
from ..files.companions import SETTINGS, copy_companions
from ..files.safetensors import INDEX, SINGLE, Checkpoint, write_safetensors
from ..model.architecture import TIES
from ..model.experts import joined_experts
from ..model.linear import as_on_disk
from ..model.targets import checkpoint_names, name_entries, untied_names
from ..progress import Progress
from ..quantization.bnb_format import quantized_names, read_stored, weight_names
from ..quantization.tensor import NF4Tensor


def write_merged(base: Path, target: Path, model: Any, onto: str, progress: Progress) -> None:
    """The base's shards with the adapter added; one shard in memory at a time."""
    checkpoint = Checkpoint(base)
    name_entries(model, checkpoint.entries)
    stored = quantized_names(set(checkpoint.entries))
    if stored and onto == "original":
        raise ModelError(
            f"{base} holds 4-bit weights only; the original ones are not there to merge onto",
            ways_out=["merge --onto trained"],
        )
    names = weight_names(checkpoint, stored)
    targets, whole = checkpoint_names(model, names), trained_whole(model)
    _refuse_homeless(model, set(targets.values()))
    weight_map: dict[str, str] = {}
    shards: dict[str, list[str]] = {}
    for name in names:
        shards.setdefault(checkpoint.entries[name].file.name, []).append(name)
    total = 0
    for file in progress(list(shards), len(shards), "merging"):
        tensors = {
            name: _whole(checkpoint, name, whole[targets[name]])
            if targets[name] in whole
            else _merged(checkpoint, name, targets[name], model, onto, name in stored)
            for name in shards[file]
        }
        entries = checkpoint.entries
        tensors = {name: as_on_disk(entries[name], value) for name, value in tensors.items()}
        tensors = joined_experts(tensors)
        write_safetensors(target / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(t.nbytes for t in tensors.values())
    if list(shards) != [SINGLE]:
        atomic.write_json(
            target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _refuse_homeless(model: Any, there: set[str]) -> None:
    """Raise ModelError if a layer is adapted whose weight is another's in the files: a block that
    several layers share (Zamba)."""
    lost = [path for path, _ in lora_layers(model) if f"{path}.weight" not in there]
    if lost:
        raise ModelError(
            f"{lost[0]} has an adapter of its own, and shares its weight with another layer in the "
            "base's files: a merged model could not tell them apart",
            ways_out=["use the adapter unmerged"],
        )


def _whole(checkpoint: Checkpoint, name: str, trained: Tensor) -> Tensor:
    """A parameter that was trained itself, in the dtype it has on disk; of a tied one each name has
    memory of its own."""
    return trained.detach().to("cpu", checkpoint.entries[name].dtype, copy=True)


def _merged(
    checkpoint: Checkpoint, name: str, path: str, model: Any, onto: str, stored: bool
) -> Tensor:
    """One tensor of the merged model, in the dtype it has on disk."""
    module_name, _, attribute = path.rpartition(".")
    try:
        module = model.get_submodule(module_name)
    except AttributeError:  # older checkpoints hold buffers that models compute today
        return checkpoint.read(name)
    weight = getattr(module, "weight", None) if attribute == "weight" else None
    kept = read_stored(checkpoint, name) if stored else None
    dtype = checkpoint.entries[name].dtype if kept is None else kept.dtype
    rounded = weight if isinstance(weight, NF4Tensor) and onto == "trained" else kept
    adapted = module if isinstance(module, LoraLinear) and attribute == "weight" else None
    if adapted is None and rounded is None:
        return checkpoint.read(name)
    value = checkpoint.read(name) if rounded is None else rounded.dequantize(torch.float32)
    return (value.to(dtype) if adapted is None else adapted.merged(value, dtype)).cpu()


def config_of(base: Path, model: Any) -> dict[str, Any]:
    """The base's configuration as it stands in its file, whose form older tools may know alone,
    without its quantization and without the names of code that comes with the base (none was run,
    none is delivered); with the ties that the model has."""
    config = atomic.read_json(base / "config.json")
    config = {k: v for k, v in config.items() if k not in ("quantization_config", "auto_map")}
    if untied_names(model):
        config[TIES] = False
        for part in config.values():
            if isinstance(part, dict) and TIES in part:
                part[TIES] = False
    return config


def write_config(base: Path, adapter: Path, target: Path, model: Any) -> None:
    """The base's configuration, and what belongs to the model beside it.

    Raises:
        StorageError: the disk said no.
    """
    atomic.write_json(target / "config.json", config_of(base, model))
    # what an adapter brings stands in place of the base's: tokenizer, templates, ends
    copy_companions(base, target, tokenizer=not (adapter / SETTINGS).is_file())
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", target / "generation_config.json")
    copy_companions(adapter, target)
    if (adapter / "generation_config.json").is_file():
        shutil.copyfile(adapter / "generation_config.json", target / "generation_config.json")

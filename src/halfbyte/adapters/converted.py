"""Adapters whose beginning changed their base (PiSSA, OLoRA), as plain LoRA of twice the rank.

PEFT takes the principal part of each weight out of the base when such an adapter begins, and again
whenever it is loaded: the model is W - s B0 A0 + s B A. On the unchanged base that is plain LoRA
with A and A0 above each other, B and -B0 beside each other, as PEFT's own conversion writes it. A0
and B0 are functions of W (Meng et al. 2024, arXiv:2404.02948; Büyükakyüz 2024, arXiv:2406.01775) as
long as nothing random is in them.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic
from ..files.model_config import read_config
from ..files.places import cache_directory
from ..files.safetensors import Checkpoint, read_header, read_tensor, write_safetensors
from ..model.architecture import build_empty
from ..model.targets import checkpoint_names
from ..quantization.bnb_format import quantized_names, read_stored, weight_names
from .lora import AdapterConfig
from .peft_config import CONFIG, read_settings
from .peft_files import ADAPTED, WEIGHTS

BEGINNINGS = ("pissa", "olora")
"""Those that are a function of the weight alone ("pissa_niter_4" draws numbers)."""


def plain_lora(directory: Path, base: Path) -> Path:
    """The directory of an adapter as plain LoRA: itself, or a conversion in the cache.

    Args:
        base: the directory of the base it was trained on.

    Raises:
        ModelError: its configuration is none.
        StorageError: the cache cannot be written.
    """
    settings = atomic.read_json(directory / CONFIG)
    if settings.get("init_lora_weights") not in BEGINNINGS:
        return directory
    files = [directory / CONFIG, directory / WEIGHTS, *Checkpoint(base).files]
    facts = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    target = cache_directory() / "adapters" / name
    if not (target / CONFIG).is_file():
        with atomic.new_directory(target, replace=True, doing="convert the adapter to") as building:
            _convert(directory, base, settings, building)
    return target


def _convert(directory: Path, base: Path, settings: dict[str, Any], target: Path) -> None:
    adapter = read_settings(settings, directory / CONFIG)
    entries = read_header(directory / WEIGHTS)
    tensors = {name: read_tensor(entry, name) for name, entry in entries.items()}
    for path, weight in _weights(base, {m[1] for n in entries if (m := ADAPTED.fullmatch(n))}):
        own = adapter.of(path)
        a0, b0 = beginning(settings["init_lora_weights"], weight, own)
        for name, other in (("lora_A", a0), ("lora_B", -b0)):
            key = next(
                k for k in tensors if (m := ADAPTED.fullmatch(k)) and m[1] == path and name in k
            )
            tensors[key] = torch.cat([tensors[key].float(), other], 0 if name == "lora_A" else 1)
    write_safetensors(target / WEIGHTS, tensors)
    grown = 2**0.5 if adapter.use_rslora else 2
    described = {
        **settings,
        "init_lora_weights": True,
        "r": 2 * adapter.r,
        "lora_alpha": adapter.alpha * grown,
        "rank_pattern": {name: 2 * r for name, r in adapter.rank_pattern.items()},
        "alpha_pattern": {name: alpha * grown for name, alpha in adapter.alpha_pattern.items()},
    }
    atomic.write_json(target / CONFIG, described)
    for file in directory.iterdir():
        if file.is_file() and file.name not in (CONFIG, WEIGHTS):
            shutil.copyfile(file, target / file.name)


def _weights(base: Path, paths: set[str]) -> Iterator[tuple[str, Tensor]]:
    """The base's weights of layers, fp32, by their paths."""
    checkpoint = Checkpoint(base)
    stored = quantized_names(set(checkpoint.entries))
    names = weight_names(checkpoint, stored)
    for name, target in checkpoint_names(build_empty(read_config(base)), names).items():
        path = target.removesuffix(".weight")
        if path in paths and path != target:
            whole = read_stored(checkpoint, name).dequantize if name in stored else None
            yield path, whole(torch.float32) if whole else checkpoint.read(name).float()


def beginning(kind: str, weight: Tensor, adapter: AdapterConfig) -> tuple[Tensor, Tensor]:
    """(A0 [r, in], B0 [out, r]) that PEFT begins with on a weight [out, in], fp32."""
    r, scaling = adapter.r, adapter.scaling
    if kind == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r].contiguous(), q[:, :r].contiguous()
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    roots = (values[:r] / scaling).sqrt()
    return roots.unsqueeze(1) * right[:r], left[:, :r] * roots

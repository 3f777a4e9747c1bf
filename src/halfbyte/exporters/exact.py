"""Every tensor of a merged model computed again, by another path than the one that wrote it: from
the files of base and adapter alone.

A merge is arithmetic, so whether it is right is a matter of bits and not of how alike two models
behave: W + s B A in fp64, rounded once, is what the file must hold. What only looks like the
adapter (a layer left out, a scale off by five percent, another adapter) is told from it at once,
six steps after a start as well.
"""

import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.experts import joined_layers, wrapped
from ..adapters.peft_config import CONFIG
from ..adapters.peft_files import WEIGHTS
from ..config.options import ModelOptions
from ..errors import VerificationError
from ..files.atomic import read_json
from ..files.safetensors import Checkpoint, read_header, read_tensor
from ..model.experts import DividedExperts
from ..model.targets import checkpoint_names, name_entries, quantizable, tied_names
from ..model.wrappers import other_class
from ..ops.fourbit import absmax_values
from ..progress import Progress
from ..quantization.bnb_format import quantized_names, read_stored, weight_names
from ..quantization.mxfp4 import is_held
from ..quantization.tensor import NF4Tensor
from ..quantization.weights import quantize_as

CHUNK = 1 << 22
"""Weights computed at once."""
NEAR = 2.0**-40
"""Relative error of sums in fp64 that may move a value over the border between two roundings."""
ADAPTER_KEY = re.compile(
    r"base_model\.model\.(.+)\.(lora_A|lora_B|lora_magnitude_vector)(?:\.default)?(?:\.weight)?"
)


@dataclass(frozen=True)
class Recomputed:
    """What was computed again, and found equal.

    Attributes:
        tensors, weights: all there are. adapted: tensors that the adapter changes.
        surviving: share of the adapter's change that is left where the sum is rounded to the type
            it is stored in (1: all): least, median and greatest of its layers.
    """

    tensors: int
    weights: int
    adapted: int
    surviving: tuple[float, float, float]


@dataclass(frozen=True)
class _OfExpert:
    """Which part of joined tensors is a layer's: that of an expert of so many, and of the layers
    joined in it."""

    parameter: str
    number: int
    experts: int
    part: int
    parts: int


class AdapterFile:
    """An adapter as its files say, read without the code that trains or merges it."""

    def __init__(self, directory: Path) -> None:
        self.config = read_json(directory / CONFIG)
        self.entries = read_header(directory / WEIGHTS)
        self.layers: dict[str, dict[str, str]] = {}
        self.whole: dict[str, str] = {}
        for key in self.entries:
            if match := ADAPTER_KEY.fullmatch(key):
                self.layers.setdefault(match.group(1), {})[match.group(2)] = key
            else:
                self.whole[key.removeprefix("base_model.model.")] = key
        self.of_experts: dict[str, _OfExpert] = {}
        self._kept: dict[str, Tensor] = {}

    def divide(self, model: Any) -> None:
        """Name what the file holds as the model does, and give layers of experts, whose tensors are
        joined in the file, each its part of them."""
        if (other := other_class(model)) is not None:
            self.layers = {other.name_here(path): keys for path, keys in self.layers.items()}
            self.whole = {other.name_here(name): key for name, key in self.whole.items()}
        for path, module in model.named_modules():
            if not isinstance(module, DividedExperts):
                continue
            for place, (parameter, names) in enumerate(joined_layers(module).items()):
                keys = self.layers.pop(path + wrapped(place, len(module.fused)), None)
                for number in range(module.num_experts if keys else 0):
                    for part, name in enumerate(names):
                        layer = f"{path}.{number}.{name}"
                        self.layers[layer] = keys or {}
                        self.of_experts[layer] = _OfExpert(
                            f"{path}.{parameter}", number, module.num_experts, part, len(names)
                        )

    def read(self, key: str) -> Tensor:
        if key not in self._kept:  # A and B of experts once for all of them
            if len(self._kept) > 1:
                self._kept.clear()
            self._kept[key] = read_tensor(self.entries[key], key)
        return self._kept[key]

    def scale(self, path: str, rank: int) -> float:
        """alpha / r, or with rsLoRA alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""
        alpha = self.config["lora_alpha"]
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = value
                break
        return alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def sums(self, path: str, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(W, W + s B A), fp64, some rows at a time; with DoRA rows of the trained norms."""
        keys = self.layers[path]
        a, b = (self.read(keys[name]).double() for name in ("lora_A", "lora_B"))
        if (own := self.of_experts.get(path)) is not None:
            path = own.parameter
            a = a.unflatten(0, (own.experts, -1))[own.number]
            b = b.unflatten(1, (-1, own.experts))[:, :, own.number].chunk(own.parts)[own.part]
        scale = self.scale(path, a.shape[0])
        norms = (
            self.read(keys["lora_magnitude_vector"]).double()
            if "lora_magnitude_vector" in keys
            else None
        )
        rows = max(1, CHUNK // weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            part = weight[start : start + rows].double()
            total = part + scale * torch.einsum("or,ri->oi", b[start : start + rows], a)
            if norms is not None:
                own = torch.linalg.vector_norm(total, dim=1, keepdim=True).clamp(min=1e-15)
                total = total / own * norms[start : start + rows].unsqueeze(1)
            yield part, total


def recompute(
    merged: Path,
    base: Path,
    adapter: Path,
    model: Any,
    onto: str,
    options: ModelOptions,
    progress: Progress,
) -> Recomputed:
    """Compute every tensor of a merged model again and compare it, bit for bit.

    Args:
        model: the base, on any device: only its modules' names are asked for.
        onto: "trained" or "original".
        options: how the base was held.

    Raises:
        VerificationError: a tensor is missing, unexpected, or another one; all in one message.
    """
    checker = _Checker(merged, base, AdapterFile(adapter), model, onto, options)
    return checker.run(progress)


class _Checker:
    def __init__(
        self,
        merged: Path,
        base: Path,
        adapter: AdapterFile,
        model: Any,
        onto: str,
        options: ModelOptions,
    ) -> None:
        self.merged, self.base, self.adapter = Checkpoint(merged), Checkpoint(base), adapter
        self.options, self.onto = options, onto
        adapter.divide(model)
        name_entries(model, self.base.entries)
        name_entries(model, self.merged.entries)
        self.stored = quantized_names(set(self.base.entries))
        names = weight_names(self.base, self.stored)
        self.targets = checkpoint_names(model, names)
        rounds = options.load_in_4bit and onto == "trained" and not self.stored
        in_4bit = quantizable(model) if rounds else set()
        self.rounded = {
            name
            for name in names
            if self.targets[name] in in_4bit and not is_held(self.base.entries[name])
        }
        ties = tied_names(model)
        self.whole = {ties.get(path, path): key for path, key in adapter.whole.items()}
        self.shares: list[float] = []
        self.met: set[str] = set()

    def run(self, progress: Progress) -> Recomputed:
        names = list(self.targets)
        problems = [f"missing: {name}" for name in sorted(set(names) - set(self.merged.entries))]
        problems += [
            f"unexpected: {name}" for name in sorted(set(self.merged.entries) - set(names))
        ]
        for name in progress(names, len(names), "computing it again"):
            if name in self.merged.entries and (wrong := self._compare(name)):
                problems.append(f"{name}: {wrong}")
        lost = set(self.adapter.layers) - self.met
        problems += [f"adapted, and nowhere in the model: {path}" for path in sorted(lost)]
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise VerificationError(
                "the merged model is not the adapter on its base; it was removed",
                found="; ".join(problems[:8]) + more,
                expected="in every tensor the sum of base and adapter, rounded once",
                ways_out=["use the adapter unmerged", "report this: a merge must not do it"],
            )
        weights = sum(torch.Size(e.shape).numel() for e in self.merged.entries.values())
        shares = self.shares or [1.0]
        return Recomputed(
            len(names),
            weights,
            len(self.shares),
            (min(shares), statistics.median(shares), max(shares)),
        )

    def _compare(self, name: str) -> str:
        """What is wrong with a tensor, "" if nothing."""
        found, target = self.merged.read(name), self.targets[name]
        if target in self.whole:
            return _same(found, self.adapter.read(self.whole[target]).to(found.dtype))
        path = target.rpartition(".")[0]
        adapted = path in self.adapter.layers and target == f"{path}.weight"
        if not adapted and name not in self.rounded and name not in self.stored:
            return _same(found, self.base.read(name))
        weight = self._weight(name)
        if found.shape != weight.shape:
            return f"{list(found.shape)}, not {list(weight.shape)}"
        if not adapted:
            return _same(found, weight.to(found.dtype))
        self.met.add(path)
        return self._compare_sum(found, path, weight)

    def _weight(self, name: str) -> Tensor:
        """The base's weight as it is merged onto, fp32; of 4 bits codes and scales go through plain
        PyTorch."""
        if name in self.stored:
            return _dequantized(read_stored(self.base, name))
        weight = self.base.read(name)
        if name not in self.rounded:
            return weight.float()
        known = (torch.float32, torch.bfloat16, torch.float16)
        return _dequantized(
            quantize_as(weight if weight.dtype in known else weight.float(), self.options)
        )

    def _compare_sum(self, found: Tensor, path: str, weight: Tensor) -> str:
        start, wrong, along, power = 0, 0, 0.0, 0.0
        for part, total in self.adapter.sums(path, weight):
            here = found[start : start + len(part)]
            start += len(part)
            change = total - part
            slack = NEAR * (part.abs() + change.abs())
            low, high = (total - slack).to(found.dtype), (total + slack).to(found.dtype)
            wrong += int(((here < low) | (here > high) | here.isnan()).sum())
            kept = here.double() - part.to(found.dtype).double()
            along += float((kept * change).sum())
            power += float(change.square().sum())
        self.shares.append(along / power if power else 1.0)
        return f"{wrong:,} of {found.numel():,} weights are not the sum" if wrong else ""


def _dequantized(stored: NF4Tensor) -> Tensor:
    """fp32, by plain PyTorch: the level of each code (the higher half of a byte first) times its
    block's scale."""
    q, count = stored.parts, stored.numel()
    values = q.quant_map[torch.stack((q.packed >> 4, q.packed & 15), 1).view(-1).int()]
    scales = absmax_values(q).repeat_interleave(q.block_size)
    return (values[:count] * scales[:count]).view(stored.shape)


def _same(found: Tensor, expected: Tensor) -> str:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"{found.dtype} {list(found.shape)}, not {expected.dtype} {list(expected.shape)}"
    if torch.equal(found.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8)):
        return ""
    return f"{int((found != expected).sum()):,} of {found.numel():,} weights are others"

"""Adapters of a mixture's experts, in PEFT's form and in ours.

PEFT adapts the parameters that transformers fuses all experts of a layer into: of ``gate_up_proj``
[E, 2 I, H] one A [E r, H] and one B [2 I, r E], whose column rank * E + expert is an expert's. Here
each expert's layers have their own A and B, of which gate and up share A, so that the two forms
hold the same numbers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..model.experts import (
    GATED,
    DividedExperts,
    experts_per_token,
    fused_experts,
    fused_parameter,
)
from .lora import AdapterConfig, LoraLinear

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class AdaptedExperts:
    """All experts of a layer that have an adapter on one of their parameters.

    key: of the parameter in PEFT's files, without a prefix. parameter: its path in transformers.
    layers: of each expert the layers that are joined in it.
    """

    key: str
    parameter: str
    layers: list[list[LoraLinear]]

    def tensors(self) -> dict[str, Tensor]:
        """A and B by their names in PEFT's files, fp32 on the CPU."""
        a = torch.cat([joined[0].lora_A.detach().cpu() for joined in self.layers])
        b = torch.stack(
            [torch.cat([layer.lora_B.detach().cpu() for layer in joined]) for joined in self.layers]
        )
        out = b.permute(1, 2, 0).reshape(b.shape[1], -1)
        return {f"{self.key}.lora_A.weight": a, f"{self.key}.lora_B.weight": out}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of `tensors`."""
        first = self.layers[0]
        count, (rank, width) = len(self.layers), first[0].lora_A.shape
        rows = sum(layer.out_features for layer in first)
        return {
            f"{self.key}.lora_A.weight": (count * rank, width),
            f"{self.key}.lora_B.weight": (rows, rank * count),
        }

    @torch.no_grad()
    def fill(self, a: Tensor, b: Tensor) -> None:
        """Copy A and B of PEFT's form into the layers."""
        count, rank = len(self.layers), self.layers[0][0].adapter.r
        each = b.view(b.shape[0], rank, count)
        for number, joined in enumerate(self.layers):
            joined[0].lora_A.copy_(a.view(count, rank, -1)[number])
            rows = each[:, :, number].split([layer.out_features for layer in joined])
            for layer, part in zip(joined, rows, strict=True):
                layer.lora_B.copy_(part)


def adapted_experts(model: nn.Module) -> Iterator[AdaptedExperts]:
    """Every parameter of experts that is adapted, in the model's order."""
    for path, module in model.named_modules():
        if not isinstance(module, DividedExperts):
            continue
        for place, (parameter, names) in enumerate(joined_layers(module).items()):
            layers: list[list[Any]] = [
                [getattr(getattr(module, str(number)), name) for name in names]
                for number in range(module.num_experts)
            ]
            if all(isinstance(layer, LoraLinear) for joined in layers for layer in joined):
                key = path + wrapped(place, len(module.fused))
                yield AdaptedExperts(key, f"{path}.{parameter}", layers)


def joined_layers(module: DividedExperts) -> dict[str, tuple[str, ...]]:
    """The matrices that experts had, in the order they had, and the layers each was divided
    into."""
    split = () if module.is_joined else ("gate_up_proj",)
    return {name: GATED[:2] if name in split else (name,) for name in module.fused}


def wrapped(place: int, count: int) -> str:
    """What PEFT adds to the path of experts for the adapter of their parameter at a place: it wraps
    them once for each, the last outermost."""
    return ".base_layer" * (count - 1 - place)


def of_experts(adapter: AdapterConfig, model: Any) -> AdapterConfig:
    """An adapter that adapts experts as well, each with its rank over the experts a token goes to:
    together they have the rank of a dense layer.

    Raises:
        UsageError: DoRA, which PEFT does not have of parameters.
    """
    if adapter.use_dora:
        raise UsageError(
            "experts take no DoRA: no other tool reads it of them",
            ways_out=["--use_dora false", "or leave --target_experts out"],
        )
    rank = max(1, adapter.r // experts_per_token(model.config))
    power = 0.5 if adapter.use_rslora else 1.0
    alpha = adapter.alpha * (rank / adapter.r) ** power  # the same scale
    ends = sorted({ending(name) for name in fused_experts(model)})
    # the first pattern that fits is taken: one that was asked for
    return replace(
        adapter,
        rank_pattern={**adapter.rank_pattern, **_beside(adapter.rank_pattern, ends, rank)},
        alpha_pattern={**adapter.alpha_pattern, **_beside(adapter.alpha_pattern, ends, alpha)},
    )


def ending(fused: str) -> str:
    """What a parameter of experts is called in every layer, as short as a pattern may be."""
    return ".".join(fused.split(".")[-2:])


def _beside(given: Mapping[str, Number], ends: list[str], value: Number) -> dict[str, Number]:
    return {end: value for end in ends if end not in given}


def fused_of(model: Any, names: list[str]) -> set[str]:
    """The parameters that transformers makes of those of some layers that are experts'."""
    return {fused for name in names if (fused := fused_parameter(model, name)) is not None}

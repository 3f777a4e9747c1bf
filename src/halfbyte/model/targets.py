"""Which weights of a model can be held in 4 bits or adapted, and what they are made of on disk.

A target is a weight that a layer multiplies by. Loading, planning, adapters and merging ask here,
so that a new kind of target is added in this file.
"""

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from ..errors import ModelError
from ..files.safetensors import Entry
from .experts import (
    WITHIN,
    Expert,
    OtherExpert,
    expert_parameter,
    fused_biases,
    fused_experts,
    parts_of_experts,
    routers,
)
from .linear import name_linear, transposed_on_disk, turn_entries
from .wrappers import beside_the_text, not_read


@dataclass(frozen=True)
class Target:
    """A weight that a layer multiplies by.

    Attributes:
        path: the module's, from the model on.
        attribute: the weight's name in it.
        is_head: whether it is the output head, which is neither quantized nor adapted by default.
        is_expert: whether it is one of a mixture's experts, which are quantized and not adapted.
    """

    path: str
    attribute: str
    is_head: bool
    is_expert: bool

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.path}.{self.attribute}"


def is_target(module: nn.Module, attribute: str) -> bool:
    """Return True if a module multiplies by its parameter of that name, and is not one of those
    that stay as they are (`mark_kept`)."""
    linear = isinstance(module, nn.Linear) and attribute == "weight"
    return linear and not getattr(module, KEPT, False)


KEPT = "kept_as_it_is"
"""The attribute of linear layers that are neither quantized nor adapted."""
_MULTIPLIED = re.compile(r"self\.(\w+)\.weight(?:\s*@|\.data\b|\.clamp\b)")
"""In a module's code, a weight that it multiplies by, or changes, itself, past the layer."""


def mark_kept(model: Any) -> None:
    """Mark linear layers that stay as they are: routers, which choose by small differences, those
    whose weight the module around them multiplies by itself (Mamba's ``dt_proj``), what computes
    something else than a linear layer, and what stands beside a wrapper's text model."""
    for layer in (*routers(model), *name_linear(model), *beside_the_text(model)):
        setattr(layer, KEPT, True)
    for module in model.modules():
        for name in _multiplied(type(module)):
            if isinstance(layer := module._modules.get(name), nn.Linear):
                setattr(layer, KEPT, True)


@cache
def _multiplied(kind: type) -> frozenset[str]:
    """The layers whose weights a class of transformers multiplies by itself."""
    if not kind.__module__.startswith("transformers."):
        return frozenset()
    try:
        return frozenset(_MULTIPLIED.findall(inspect.getsource(kind)))
    except (OSError, TypeError):
        return frozenset()


def targets(model: Any) -> list[Target]:
    """Return every target of a model, in the model's order."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    experts = {
        layer
        for part in model.modules()
        if isinstance(part, Expert | OtherExpert)
        for layer in part.children()
    }
    return [
        Target(path, attribute, module is head, module in experts)
        for path, module in model.named_modules()
        for attribute in ("weight",)
        if is_target(module, attribute)
    ]


def quantizable(model: Any) -> set[str]:
    """Return the names of the weights that are held in 4 bits: all targets but the output head."""
    return {target.name for target in targets(model) if not target.is_head}


def adaptable(model: Any) -> list[str]:
    """Return the paths of the layers that take an adapter: all targets' but the output head,
    experts, and the last layer of a Mamba block, whose weight fast kernels read past an adapter
    (PEFT refuses it)."""
    return [
        target.path
        for target in targets(model)
        if not (target.is_head or target.is_expert or _ends_mamba(model, target.path))
    ]


def _ends_mamba(model: Any, path: str) -> bool:
    block, _, name = path.rpartition(".")
    return name == "out_proj" and hasattr(model.get_submodule(block), "conv1d")


def experts(model: Any) -> list[str]:
    """Return the paths of the layers of a mixture's experts."""
    return [target.path for target in targets(model) if target.is_expert]


def tied_names(model: Any) -> dict[str, str]:
    """Return the names that a model's ties give a tensor beside its own one, each with that one:
    ``{"lm_head.weight": "model.embed_tokens.weight"}``."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def tied_head(model: Any, ties: dict[str, str] | None = None) -> dict[str, str]:
    """Of a model's ties, or of these, the output head's; other layers share weights as well."""
    head = model.get_output_embeddings()
    names = {f"{path}.weight" for path, module in model.named_modules() if module is head}
    found = tied_names(model) if ties is None else ties
    return {name: own for name, own in found.items() if names & {name, own}}


def untied_names(model: Any) -> dict[str, str]:
    """As `tied_names`, of the ties that were taken off when the model was built."""
    return dict(getattr(model, "untied", None) or {})


def name_entries(model: Any, entries: dict[str, Entry]) -> set[str]:
    """Give what a file holds the names and shapes that a model asks for, in place: experts that lie
    in one tensor each their own, matrices that lie the other way round (`model.linear`) as the
    model has them, and a tensor whose ties were taken off both of its names, of which it is the
    beginning.

    Args:
        entries: of the file, by name.

    Returns:
        Names that are another one's tensor once more.
    """
    fused = fused_experts(model)
    if fused:
        biases = fused_biases(model)
        ends = tuple({name.rpartition(".")[2] for name in biases})
        whole = [n for n, e in entries.items() if len(e.shape) == 3 or (ends and n.endswith(ends))]
        for source, target in _stored_as(model, whole).items():
            if target in fused or target in biases:
                parts = parts_of_experts(entries[source], model, target)
                if parts:
                    del entries[source]
                    entries |= {f"{source}{WITHIN}{part}": entry for part, entry in parts.items()}
    if turned := transposed_on_disk(model):
        whole = _stored_as(
            model, [name for name, entry in entries.items() if len(entry.shape) == 2]
        )
        turn_entries(entries, [source for source, target in whole.items() if target in turned])
    again: set[str] = set()
    for pair in untied_names(model).items():
        ends = tuple(".".join(name.split(".")[-2:]) for name in pair)
        named = checkpoint_names(model, [name for name in entries if name.endswith(ends)])
        there = {target: source for source, target in named.items() if target in pair}
        if len(there) == 1:
            ((target, source),) = there.items()
            (other,) = set(pair) - {target}
            entries[other] = entries[source]
            again.add(other)
    return again


def checkpoint_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Names on disk (as `name_entries` leaves them) to the model's names, by transformers' own
    renamings; of a tied tensor, its own name, whichever of them is on disk.

    Raises:
        ModelError: the model's layout on disk needs tensors to be joined or split, other than
            those of experts.
    """
    ties = tied_names(model)
    return {
        name: ties.get(target, target) for name, target in _stored_as(model, list(names)).items()
    }


def _stored_as(model: Any, names: list[str]) -> dict[str, str]:
    """Names on disk to what they are of a model, before its ties; a tensor of all experts is what
    transformers makes of it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    parts = {p: part for c in converters for part, p in enumerate(c.source_patterns)}
    fused, unread = fused_experts(model) | fused_biases(model), not_read(model)
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    state |= dict.fromkeys(fused, True)
    result = {}
    for name in names:
        source, within, part = name.partition(WITHIN)
        target, pattern = rename_source_key(
            source, renamings, converters, model.base_model_prefix, state
        )
        if target in fused and pattern is not None:
            gated = f"{target.rpartition('.')[0]}.gate_up_proj" in fused
            target = expert_parameter(target, name, parts[pattern], gated)
        elif pattern is not None and not unread(target):
            raise ModelError(
                f"{type(model).__name__} stores {name!r} in another layout than it computes with: "
                "not read yet",
                ways_out=["use a dense model"],
            )
        elif within:
            target = f"{target.rpartition('.')[0]}.{part}"
        result[name] = target
    return result

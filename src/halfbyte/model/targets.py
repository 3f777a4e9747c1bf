"""Which weights of a model can be held in 4 bits or adapted, and what they are made of on disk.

A target is a weight that a layer multiplies by. Loading, planning, adapters and merging ask here,
so that a new kind of target (the experts of a mixture, which are many tensors on disk and one in
the model) is added in this file.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ModelError


@dataclass(frozen=True)
class Target:
    """A weight that a layer multiplies by.

    Attributes:
        path: the module's, from the model on.
        attribute: the weight's name in it.
        is_head: whether it is the output head, which is neither quantized nor adapted by default.
    """

    path: str
    attribute: str
    is_head: bool

    @property
    def name(self) -> str:
        """The parameter's name in the model."""
        return f"{self.path}.{self.attribute}"


def is_target(module: nn.Module, attribute: str) -> bool:
    """Return True if a module multiplies by its parameter of that name."""
    return isinstance(module, nn.Linear) and attribute == "weight"


def targets(model: Any) -> list[Target]:
    """Return every target of a model, in the model's order."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return [
        Target(path, attribute, module is head)
        for path, module in model.named_modules()
        for attribute in ("weight",)
        if is_target(module, attribute)
    ]


def quantizable(model: Any) -> set[str]:
    """Return the names of the weights that are held in 4 bits: all targets but the output head."""
    return {target.name for target in targets(model) if not target.is_head}


def adaptable(model: Any) -> list[str]:
    """Return the paths of the layers that take an adapter: all targets' but the output head."""
    return [target.path for target in targets(model) if not target.is_head]


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


def name_untied(model: Any, entries: dict[str, Any]) -> None:
    """Give what a file holds once each of the names it has in a model whose ties were taken off:
    the beginning of both.

    Args:
        entries: of the file, by name; added to in place.
    """
    for pair in untied_names(model).items():
        ends = tuple(".".join(name.split(".")[-2:]) for name in pair)
        named = checkpoint_names(model, [name for name in entries if name.endswith(ends)])
        there = {target: source for source, target in named.items() if target in pair}
        if len(there) == 1:
            ((target, source),) = there.items()
            (other,) = set(pair) - {target}
            entries[other] = entries[source]


def checkpoint_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Names on disk to the model's names, by transformers' own renamings; of a tied tensor, its own
    name, whichever of them is on disk.

    Raises:
        ModelError: the model's layout on disk needs tensors to be joined or split
            (mixture-of-experts models).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    ties = tied_names(model)
    result = {}
    for name in names:
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        if pattern is not None:
            raise ModelError(
                f"{type(model).__name__} stores {name!r} in another layout than it computes with: "
                "not read yet",
                ways_out=["use a dense model"],
            )
        result[name] = ties.get(target, target)
    return result

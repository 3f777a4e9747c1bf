"""Which weights of a model can be held in 4 bits or adapted, and what they are made of on disk."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..errors import ModelError


def quantizable(model: Any) -> set[str]:
    """Names of the weights that are held in 4 bits: those of linear layers, but not the output
    head."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def checkpoint_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Names on disk to the model's names, by transformers' own renamings.

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
        result[name] = target
    return result

"""GPT-2's linear layers (transformers' ``Conv1D``) as `torch.nn.Linear`: the same products, of a
weight that lies the other way round in files."""

from typing import Any

from torch import Tensor, nn

from ..files.entries import Entry, TransposedEntry


def replace_conv1d(model: Any) -> None:
    """Put a linear layer in the place of each ``Conv1D`` of an empty model. Its weights' names are
    kept in the model's ``transposed_on_disk``."""
    from transformers.pytorch_utils import Conv1D

    found = [(path, part) for path, part in model.named_modules() if isinstance(part, Conv1D)]
    for path, part in found:
        width, out = part.weight.shape
        layer = nn.Linear(width, out, device="meta", dtype=part.weight.dtype)
        layer.bias = part.bias
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    if found:
        model.transposed_on_disk = {f"{path}.weight" for path, _ in found}


def transposed_on_disk(model: Any) -> set[str]:
    """The weights of a model that files hold the other way round."""
    return getattr(model, "transposed_on_disk", set())


def turn_entries(entries: dict[str, Entry], names: list[str]) -> None:
    """Have these tensors of a file read the other way round, in place; not what is stored in 4
    bits."""
    for name in names:
        if len(entries[name].shape) == 2 and f"{name}.absmax" not in entries:
            entries[name] = TransposedEntry.of(entries[name])


def as_on_disk(entry: Entry, tensor: Tensor) -> Tensor:
    """A tensor as the file that an entry is of would hold it."""
    return tensor.t().contiguous() if isinstance(entry, TransposedEntry) else tensor

"""Layers that compute what `torch.nn.Linear` does as `torch.nn.Linear`: GPT-2's (transformers'
``Conv1D``, whose weight lies the other way round in files), and subclasses that multiply by
themselves, such as Falcon's."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

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


STOOD_AS = "stood_as"
"""The attribute of a linear layer that was one of a subclass: the subclass' name."""


def name_linear(model: Any) -> list[nn.Module]:
    """Make linear layers of subclasses that compute the same plain ones, in place.

    Returns:
        Those of other subclasses: routers, and what adds something of its own.
    """
    others = []
    for module in model.modules():
        kind = type(module)
        if isinstance(module, nn.Linear) and kind is not nn.Linear:
            if _computes_the_same(kind):
                module.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
                setattr(module, STOOD_AS, kind.__name__)
            else:
                others.append(module)
    return others


@cache
def _computes_the_same(kind: type[nn.Linear]) -> bool:
    """Whether a subclass of transformers' computes x W^T + b, tried on random numbers. (The parents
    of torch's own ones read their weights past them.)"""
    if not kind.__module__.startswith("transformers."):
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(s, generator=generator) for s in ((4, 8), (4,), (2, 3, 8)))
    try:
        layer = kind(8, 4, bias=True)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
            found = layer(x)
    except Exception:  # takes other arguments, or needs more than a weight
        return False
    expected = functional.linear(x, weight, bias)
    return isinstance(found, Tensor) and torch.allclose(found, expected, atol=1e-5)


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
    return tensor.t().contiguous() if entry.is_turned else tensor

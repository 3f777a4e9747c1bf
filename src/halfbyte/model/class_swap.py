"""Modules that become, in place, subclasses of their own class."""

from typing import Any

from torch import nn

_classes: dict[tuple[type, type], type] = {}


def swap_class(module: nn.Module, kind: type, name: str | None = None) -> None:
    """Make a module, in place, of a class that is ``kind`` before what it was; called ``name``, or
    as it was."""
    own = type(module)
    if issubclass(own, kind):
        return
    key = (kind, own)
    if key not in _classes:
        attributes = {"__module__": own.__module__, "__reduce_ex__": _reduce}
        _classes[key] = type(name or own.__name__, (kind, own), attributes)
    module.__class__ = _classes[key]


def _reduce(module: nn.Module, protocol: Any) -> Any:
    """A module for pickle, which does not find a class by its name that was made here."""
    own, swaps = type(module), []
    while own in _classes.values():
        kind, below = own.__bases__
        swaps.append((kind, own.__name__))
        own = below
    return _made_again, (own, swaps[::-1]), module.__getstate__()


def _made_again(own: type, swaps: list[tuple[type, str]]) -> nn.Module:
    """A module without anything in it, of a class that `swap_class` makes."""
    module: Any = nn.Module.__new__(own)  # pyright: ignore[reportCallIssue]
    for kind, name in swaps:
        swap_class(module, kind, name)
    return module


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody wants to see or change what goes into a module or comes out of it."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module has a ``forward`` of its own, so that its class's does not run (hooks of
    accelerate)."""
    return "forward" in vars(module)

"""Modules that become, in place, subclasses of their own class."""

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
        _classes[key] = type(name or own.__name__, (kind, own), {"__module__": own.__module__})
    module.__class__ = _classes[key]


def is_wrapped(module: nn.Module) -> bool:
    """Whether a module has a ``forward`` of its own, so that its class's does not run (hooks of
    accelerate)."""
    return "forward" in vars(module)

"""The untouched base under a model that was quantized or trained: its original weights, read from
their files one by one as a pass reaches them.

So what 4 bits cost and what a training brought can be judged against the model it started from,
without room for that model: beside what is there it takes one weight in the compute dtype.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..files.safetensors import Checkpoint
from ..model.fp32 import around_calls
from ..model.targets import checkpoint_names, name_entries
from .bnb_format import quantized_names
from .tensor import NF4Tensor


class OriginalWeights:
    """Reads a base's original weights for a model made of it.

    Args:
        model: from `load_base`, adapted and trained since or not.
        path: the base's directory.
        whole: modules that are trained whole, whose weights are exchanged together.

    Attributes:
        available: False where the base is stored in 4 bits only.
        replaces_quantized: whether the model holds any of them in 4 bits.
    """

    def __init__(self, model: Any, path: Path, whole: Iterable[nn.Module] = ()) -> None:
        self.model, self.checkpoint, self.whole = model, Checkpoint(path), set(whole)
        name_entries(model, self.checkpoint.entries)
        stored = quantized_names(set(self.checkpoint.entries))
        self.available = not stored
        names = {} if stored else checkpoint_names(model, self.checkpoint.entries)
        self.sources = {target: source for source, target in names.items()}
        self.replaces_quantized = any(isinstance(p.data, NF4Tensor) for p in model.parameters())
        self._paths = {module: path for path, module in model.named_modules()}

    @contextlib.contextmanager
    def in_use(self, *, trained_too: bool = False) -> Iterator[None]:
        """Within this block the model computes with them, and with its adapter where that is on
        (`adapters.peft_files.lora_off`). Not for gradients.

        Args:
            trained_too: replace parameters that were trained themselves, not only quantized ones.
        """
        modules = exchanged(self.model, self.whole)
        with around_calls(modules, lambda part: self._exchange(part, trained_too)):
            yield

    @contextlib.contextmanager
    def _exchange(self, part: nn.Module, trained_too: bool) -> Iterator[None]:
        """Within this block the originals stand in the place of a module's parameters."""
        held: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for module in part.modules() if part in self.whole else (part,):
                for name, p in module._parameters.items():
                    if p is None or not (
                        isinstance(p.data, NF4Tensor) or (trained_too and p.requires_grad)
                    ):
                        continue
                    source = self.sources.get(f"{self._paths[module]}.{name}")
                    if source is None:  # an adapter's own
                        continue
                    value = self.checkpoint.read(source).to(p.device, p.data.dtype)
                    held.append((module, name, p))
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
            yield
        finally:
            for module, name, p in held:
                module._parameters[name] = p


def exchanged(model: nn.Module, whole: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules whose parameters are exchanged when they are called."""
    inside = {part for module in whole for part in module.modules() if part is not module}
    for module in model.modules():
        if module in whole or (module not in inside and module._parameters):
            yield module

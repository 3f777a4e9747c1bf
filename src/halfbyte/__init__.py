"""halfbyte: fine-tune large language models in 4 bits on whatever one machine has.

The names below are loaded when first used; ``import halfbyte`` itself imports nothing heavy. Some are functions whose
module has the same name (`train`, `load`, `merge`): the package always gives the function, and the module is reached
with ``from halfbyte.train import ...``.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adamw8bit import AdamW8bit as AdamW8bit
    from .adamw8bit import PagedAdamW as PagedAdamW
    from .adamw8bit import PagedAdamW8bit as PagedAdamW8bit
    from .config import TrainConfig as TrainConfig
    from .errors import DoesNotFit as DoesNotFit
    from .export import export as export
    from .hf import MemoryCallback as MemoryCallback
    from .hf import optimize as optimize
    from .load import load as load
    from .lora import attach_lora as attach_lora
    from .merge import merge as merge
    from .nf4 import NF4Tensor as NF4Tensor
    from .plan import MemoryPlan as MemoryPlan
    from .plan import plan as plan
    from .quantizer import BitsAndBytesConfig as BitsAndBytesConfig
    from .run import Run as Run
    from .train import train as train

_WHERE = {
    "AdamW8bit": "adamw8bit",
    "BitsAndBytesConfig": "quantizer",
    "DoesNotFit": "errors",
    "MemoryCallback": "hf",
    "MemoryPlan": "plan",
    "NF4Tensor": "nf4",
    "PagedAdamW": "adamw8bit",
    "PagedAdamW8bit": "adamw8bit",
    "Run": "run",
    "TrainConfig": "config",
    "attach_lora": "lora",
    "export": "export",
    "load": "load",
    "merge": "merge",
    "optimize": "hf",
    "plan": "plan",
    "train": "train",
}

__all__ = [
    "AdamW8bit",
    "BitsAndBytesConfig",
    "DoesNotFit",
    "MemoryCallback",
    "MemoryPlan",
    "NF4Tensor",
    "PagedAdamW",
    "PagedAdamW8bit",
    "Run",
    "TrainConfig",
    "attach_lora",
    "export",
    "load",
    "merge",
    "nf4",
    "optimize",
    "plan",
    "train",
]


def _lazily(name: str) -> property:
    def get(package: types.ModuleType) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)

    def ignore(package: types.ModuleType, module: Any) -> None:
        """The import system sets a submodule on its package; the function of that name stays."""

    return property(get, ignore)


class _Package(types.ModuleType):
    """This module's type: properties, so that names load on first use."""

    def __getattr__(self, name: str) -> Any:
        if name == "nf4":
            return importlib.import_module(f"{__name__}.nf4")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


for _name in _WHERE:
    setattr(_Package, _name, _lazily(_name))
sys.modules[__name__].__class__ = _Package

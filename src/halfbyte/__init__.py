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
    from .adapters.lora import attach_lora as attach_lora
    from .config.options import TrainConfig as TrainConfig
    from .engine.adamw8bit import AdamW8bit as AdamW8bit
    from .engine.adamw8bit import PagedAdamW as PagedAdamW
    from .engine.adamw8bit import PagedAdamW8bit as PagedAdamW8bit
    from .errors import DoesNotFit as DoesNotFit
    from .exporters.export import export as export
    from .exporters.merge import merge as merge
    from .integrations.optimize import MemoryCallback as MemoryCallback
    from .integrations.optimize import optimize as optimize
    from .integrations.quantizer import BitsAndBytesConfig as BitsAndBytesConfig
    from .planning.plan import MemoryPlan as MemoryPlan
    from .planning.plan import plan as plan
    from .quantization.load import load as load
    from .quantization.tensor import NF4Tensor as NF4Tensor
    from .run.directory import Run as Run
    from .training.trainer import train as train

_WHERE = {
    "AdamW8bit": "engine.adamw8bit",
    "BitsAndBytesConfig": "integrations.quantizer",
    "DoesNotFit": "errors",
    "MemoryCallback": "integrations.optimize",
    "MemoryPlan": "planning.plan",
    "NF4Tensor": "quantization.tensor",
    "PagedAdamW": "engine.adamw8bit",
    "PagedAdamW8bit": "engine.adamw8bit",
    "Run": "run.directory",
    "TrainConfig": "config.options",
    "attach_lora": "adapters.lora",
    "export": "exporters.export",
    "load": "quantization.load",
    "merge": "exporters.merge",
    "optimize": "integrations.optimize",
    "plan": "planning.plan",
    "train": "training.trainer",
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

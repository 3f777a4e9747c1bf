"""halfbyte: fine-tune large language models in 4 bits on whatever one machine has.

The names below are loaded when first used; ``import halfbyte`` itself imports nothing heavy.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import nf4 as nf4
    from .adapters.lora import attach_lora as attach_lora
    from .config.options import TrainConfig as TrainConfig
    from .engine.adamw8bit import AdamW8bit as AdamW8bit
    from .engine.paged_optimizers import PagedAdamW as PagedAdamW
    from .engine.paged_optimizers import PagedAdamW8bit as PagedAdamW8bit
    from .errors import DoesNotFit as DoesNotFit
    from .exporters.export import export as export
    from .exporters.merge import merge as merge
    from .integrations.memory_callback import MemoryCallback as MemoryCallback
    from .integrations.optimize import optimize as optimize
    from .planning.memory_plan import MemoryPlan as MemoryPlan
    from .planning.plan import plan as plan
    from .quantization.hf_quantizer import BitsAndBytesConfig as BitsAndBytesConfig
    from .quantization.tensor import NF4Tensor as NF4Tensor
    from .run.directory import Run as Run
    from .run.load import load as load
    from .training.trainer import train as train

if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    # GNU OpenMP, when torch loads it, reads how long threads that wait may spin: as long as a core
    # is theirs alone that is free, and beside a busy process it takes the core from what they wait
    # for (a training of SmolLM2: under a fifth of the quiet rate; like this, 0.62)
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

_WHERE = {
    "AdamW8bit": "engine.adamw8bit",
    "BitsAndBytesConfig": "quantization.hf_quantizer",
    "DoesNotFit": "errors",
    "MemoryCallback": "integrations.memory_callback",
    "MemoryPlan": "planning.memory_plan",
    "NF4Tensor": "quantization.tensor",
    "PagedAdamW": "engine.paged_optimizers",
    "PagedAdamW8bit": "engine.paged_optimizers",
    "Run": "run.directory",
    "TrainConfig": "config.options",
    "attach_lora": "adapters.lora",
    "export": "exporters.export",
    "load": "run.load",
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


def __getattr__(name: str) -> Any:
    if name == "nf4":
        return importlib.import_module(f"{__name__}.nf4")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

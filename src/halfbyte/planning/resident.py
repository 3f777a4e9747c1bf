"""What stays in memory from step to step, by part.

A part is what a person can do something about: the 4-bit codes, the adapters, the layer that is being computed. What
comes and goes is counted where it is made (`planning.tracker`).
"""

from typing import Any

from torch import Tensor, nn

from ..adapters.lora import LoraLinear
from ..adapters.modules_to_save import saved_modules
from ..engine.learner import Learner
from ..engine.paged_optimizers import is_paged
from ..model.host_embedding import host_table
from ..quantization.tensor import NF4Tensor

RESIDENT = (
    "4-bit codes",
    "scales",
    "16-bit layers",
    "embeddings and head",
    "norms and biases",
    "adapters",
    "gradients",
    "optimizer states",
)


def weights_by_part(model: Any) -> dict[str, list[Tensor]]:
    """The tensors of a model by part, tied ones once; NF4 weights as what they store."""
    parts: dict[str, list[Tensor]] = {part: [] for part in RESIDENT}
    embeddings = [e for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None]
    seen: set[int] = set()
    whole = {id(p) for _, module in saved_modules(model) for p in module.parameters()}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or id(p) in seen:
                continue
            seen.add(id(p))
            data = p if isinstance(p, NF4Tensor) else p.data
            if isinstance(data, NF4Tensor):
                codes, *scales = data.stored_tensors()
                if data.stop is not None:
                    continue  # it stays in a file
                parts["4-bit codes"].append(codes)
                parts["scales"] += scales
            elif (isinstance(module, LoraLinear) and name.startswith("lora_")) or (p.requires_grad and id(p) in whole):
                parts["adapters"].append(data)
            elif any(module is e for e in embeddings) and name == "weight":
                parts["embeddings and head"].append(data)
            elif isinstance(module, nn.Linear) and name == "weight":
                parts["16-bit layers"].append(data)
            else:
                parts["norms and biases"].append(data)
    parts["norms and biases"] += [b for b in model.buffers() if b is not None]
    return parts


def resident(learner: Learner) -> dict[str, list[Tensor]]:
    """What stays from step to step, by part."""
    parts = weights_by_part(learner.model)
    parts["gradients"] = list(learner.gradients)
    optimizer: Any = learner.optimizer
    if hasattr(optimizer, "resident_tensors"):
        parts["optimizer states"] = optimizer.resident_tensors()
    else:
        parts["optimizer states"] = [t for state in optimizer.state.values() for t in state.values()]
    return parts


def elsewhere(learner: Learner) -> list[Tensor]:
    """Tensors of states and weights that take no memory of the device: mapped files, pinned host memory."""
    optimizer: Any = learner.optimizer
    found = list(optimizer.state_tensors().values()) if is_paged(optimizer) else []
    if (table := host_table(learner.model)) is not None:
        found.append(table)
    for p in learner.model.parameters():
        data = p if isinstance(p, NF4Tensor) else p.data
        if isinstance(data, NF4Tensor) and data.stop is not None:
            found += data.stored_tensors()
    return found


def sizes(parts: dict[str, list[Tensor]]) -> dict[str, int]:
    """Bytes of each part, storage that is shared counted once, where it is met first."""
    seen: set[int] = set()
    found: dict[str, int] = {}
    for part, tensors in parts.items():
        found[part] = 0
        for t in tensors:
            storage = t.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                found[part] += storage.nbytes()
    return found

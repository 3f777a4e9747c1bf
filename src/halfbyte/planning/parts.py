"""What stays in memory from step to step, by part.

A part is what a person can do something about: the 4-bit codes, the adapters, the layer that is
being computed. What comes and goes is counted where it is made (`planning.tracker`).
"""

from typing import Any

from torch import Tensor

from ..adapters.lora import LoraLinear, has_adapter
from ..adapters.modules_to_save import trainable_modules
from ..engine.learner import Learner
from ..engine.paged_optimizers import is_paged
from ..ledger import RESIDENT, Part
from ..model.host_embedding import host_table
from ..model.targets import is_target
from ..quantization.tensor import NF4Tensor


def weights_by_part(model: Any) -> dict[Part, list[Tensor]]:
    """The tensors of a model by part, tied ones once; NF4 weights as what they store."""
    parts: dict[Part, list[Tensor]] = {part: [] for part in RESIDENT}
    embeddings = [
        e for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None
    ]
    seen: set[int] = set()
    beside = trainable_modules(model) if has_adapter(model) else ()
    whole = {id(p) for _, module in beside for p in module.parameters()}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is None or id(p) in seen:
                continue
            seen.add(id(p))
            data = p if isinstance(p, NF4Tensor) else p.data
            if isinstance(data, NF4Tensor):
                codes, *scales = data.stored_tensors()
                if data.streamed is not None:
                    continue  # it stays in a file
                parts[Part.CODES].append(codes)
                parts[Part.SCALES] += scales
            elif (isinstance(module, LoraLinear) and name.startswith("lora_")) or (
                p.requires_grad and id(p) in whole
            ):
                parts[Part.ADAPTERS].append(data)
            elif any(module is e for e in embeddings) and name == "weight":
                parts[Part.EMBEDDINGS].append(data)
            elif is_target(module, name):
                parts[Part.LAYERS].append(data)
            else:
                parts[Part.NORMS].append(data)
    parts[Part.NORMS] += [b for b in model.buffers() if b is not None]
    return parts


def on_device(learner: Learner) -> dict[Part, list[Tensor]]:
    """What stays from step to step, by part."""
    parts = weights_by_part(learner.model)
    parts[Part.GRADIENTS] = list(learner.gradients)
    optimizer: Any = learner.optimizer
    if hasattr(optimizer, "resident_tensors"):
        parts[Part.OPTIMIZER] = optimizer.resident_tensors()
    else:
        parts[Part.OPTIMIZER] = [t for state in optimizer.state.values() for t in state.values()]
    return parts


def offloaded(learner: Learner) -> list[Tensor]:
    """Tensors of states and weights that take no memory of the device: mapped files, pinned host
    memory."""
    optimizer: Any = learner.optimizer
    found = list(optimizer.state_tensors().values()) if is_paged(optimizer) else []
    if (table := host_table(learner.model)) is not None:
        found.append(table)
    for p in learner.model.parameters():
        data = p if isinstance(p, NF4Tensor) else p.data
        if isinstance(data, NF4Tensor) and data.streamed is not None:
            found += data.stored_tensors()
    return found


def sizes(parts: dict[Part, list[Tensor]]) -> dict[Part, int]:
    """Bytes of each part, storage that is shared counted once, where it is met first."""
    seen: set[int] = set()
    found: dict[Part, int] = {}
    for part, tensors in parts.items():
        found[part] = 0
        for t in tensors:
            storage = t.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                found[part] += storage.nbytes()
    return found

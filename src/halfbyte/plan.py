"""Where the bytes of a training go, before any weight is read: from config.json and the options alone.

The model is built on the meta device and every part is sized by the code that will allocate it (`nf4.stored_sizes`,
`AdamW8bit` itself on meta parameters, `loss.CHUNK_BYTES`), so the figures cannot drift from what happens. What the
runtime adds (interpreter, allocator slack, a GPU's context) is not in here.

    kept by checkpointing    L T d              one input per layer
    live in one layer        T (7 d + 2 kv + 3 ff), forward and gradient: recomputed, then gone
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from . import nf4
from .adamw8bit import AdamW8bit
from .config import LoraOptions, ModelOptions, TrainConfig
from .load import build_empty
from .lora import target_names
from .loss import CHUNK_BYTES

GRADIENT_BYTES = 4
LOGIT_COPIES = 3
"""Of a chunk of logits: in the compute dtype, in fp32, and their gradient; each no larger than the fp32 chunk."""


@dataclass(frozen=True)
class Part:
    """One line of the ledger. where: "device" (the memory the model computes in)."""

    part: str
    bytes: int
    where: str = "device"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of each part of a training, and their sum."""

    ledger: tuple[Part, ...]
    parameters: int
    lora_parameters: int
    quantized_parameters: int
    tokens: int

    @property
    def peak_bytes(self) -> int:
        return sum(part.bytes for part in self.ledger)

    def bytes_of(self, *parts: str) -> int:
        return sum(part.bytes for part in self.ledger if part.part in parts)

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak_bytes": self.peak_bytes}


class PlanOptions(ModelOptions, LoraOptions):
    """The options that memory depends on; a `config.TrainConfig` has them all."""

    optim: Literal["adamw_8bit", "adamw_torch"] = "adamw_8bit"


def plan_memory(
    model_config: Any,
    options: PlanOptions | TrainConfig,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    checkpointing: bool = True,
) -> MemoryPlan:
    """The ledger of one training step.

    Args:
        model_config: a transformers configuration. options: how the base is held and what is trained.
        tokens: of a micro-batch. dtype: compute dtype.
    """
    model = build_empty(model_config)
    model.tie_weights()
    text = model_config.get_text_config()
    head, size = model.get_output_embeddings(), dtype.itemsize
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    codes = scales = held = 0
    if options.load_in_4bit:
        block, nested = options.bnb_4bit_blocksize, options.bnb_4bit_use_double_quant
        sizes = [nf4.stored_sizes(m.weight.numel(), block, nested) for m in linear]
        codes, scales = (sum(column) for column in zip(*sizes, strict=True))
    else:
        held = sum(m.weight.numel() for m in linear) * size
    in_linear = {id(m.weight) for m in linear}
    embeddings = {id(e.weight) for e in (model.get_input_embeddings(), head) if e is not None}
    unique = {id(p): p for p in model.parameters()}
    rest = sum(p.numel() for i, p in unique.items() if i not in in_linear | embeddings)
    if options.full:
        trained = list(unique.values())
        adapters: list[nn.Parameter] = []
    else:
        adapters = _adapter_parameters(model, options)
        trained = adapters
    count = sum(p.numel() for p in trained)
    largest = max(m.weight.numel() for m in linear)
    width = text.num_key_value_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    live = tokens * (7 * text.hidden_size + 2 * width + 3 * text.intermediate_size) * size * 2
    layers = text.num_hidden_layers
    kept = layers * tokens * text.hidden_size * size if checkpointing else layers * live // 2
    ledger = (
        Part("4-bit codes", codes),
        Part("scales", scales),
        Part("16-bit layers", held),
        Part("embeddings and head", sum(unique[i].numel() for i in embeddings) * size),
        Part("norms and biases", rest * size),
        Part("adapters", sum(p.numel() for p in adapters) * 4),
        Part("gradients", count * (GRADIENT_BYTES if adapters else size)),
        Part("optimizer states", _optimizer_bytes(trained, options.optim)),
        Part("kept layer inputs", kept),
        Part("live layer", live),
        Part("logits chunk", LOGIT_COPIES * CHUNK_BYTES),
        Part("dequantized weight", largest * size if options.load_in_4bit else 0),
    )
    return MemoryPlan(
        ledger,
        parameters=sum(p.numel() for p in unique.values()),
        lora_parameters=sum(p.numel() for p in adapters),
        quantized_parameters=sum(m.weight.numel() for m in linear) if options.load_in_4bit else 0,
        tokens=tokens,
    )


def _adapter_parameters(model: Any, options: PlanOptions | TrainConfig) -> list[nn.Parameter]:
    """A and B of every adapted layer, on the meta device."""
    made = []
    for name in target_names(model, options.target_modules):
        layer = model.get_submodule(name)
        for shape in ((options.lora_r, layer.in_features), (layer.out_features, options.lora_r)):
            made.append(nn.Parameter(torch.empty(shape, device="meta")))
    return made


def _optimizer_bytes(trained: list[nn.Parameter], optim: str) -> int:
    if optim == "adamw_8bit":
        return sum(t.nbytes for t in AdamW8bit(trained).state_tensors().values())
    return sum(2 * 4 * p.numel() for p in trained)

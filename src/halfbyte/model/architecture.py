"""A model's empty shape: transformers' own class, on the ``meta`` device; and where and in what it
computes."""

import copy
from typing import Any

import torch

from ..errors import UsageError
from .experts import divide_experts
from .linear import replace_conv1d
from .meta import from_config
from .rope import forget_longer_passes
from .targets import mark_kept, tied_head
from .wrappers import is_wrapper, leave_towers

ROUTER_LOSSES = ("router_aux_loss_coef", "aux_loss_coef", "router_z_loss_coef")
"""What configurations of mixtures of experts call the weights of losses beside the tokens' own."""


def router_losses(config: Any) -> str:
    """A line where a model's configuration knows losses of its routers, else ""."""
    text = config.get_text_config()
    found = {name: value for name in ROUTER_LOSSES if (value := getattr(text, name, None))}
    if not found:
        return ""
    named = ", ".join(f"{name} {value:g}" for name, value in found.items())
    added = getattr(text, "output_router_logits", False)
    return f"the routers' own loss ({named}) is not trained on: the loss is that of the tokens" + (
        ", though output_router_logits in the model's config.json adds it in transformers"
        if added
        else ""
    )


def choose_device(name: str) -> torch.device:
    """The device an option names.

    Raises:
        UsageError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(
            "device cuda was asked for, but PyTorch sees no GPU", ways_out=["--device cpu"]
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype an option names; auto is bf16 where the hardware multiplies it, else fp32
    (GPU: fp16)."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[
            name
        ]
    if device.type == "cuda":
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        )
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def build_empty(config: Any, *, tied: bool = True) -> Any:
    """transformers' model with parameters on the meta device and real buffers.

    Args:
        tied: False: what the configuration ties is apart, and the model's ``untied`` says which
            names had been one tensor's.

    Raises:
        ModelError: transformers cannot build it; its message is quoted.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    untie = not tied and getattr(config.get_text_config(), TIES, False)
    if untie:
        untied(config)
    if getattr(config, "rescale_every", 0):
        # RWKV halves weights and hidden states layer by layer, in place, for fp16's range alone
        config.rescale_every = 0
    model = from_config(config)
    leave_towers(model)
    replace_conv1d(model)
    if type(model.config) is not type(config) and is_wrapper(config):
        model.config_of_wrapper = config
    divide_experts(model)
    mark_kept(model)
    forget_longer_passes(model)
    if untie:
        model.untied = tied_head(model, dict(model._tied_weights_keys or {}))
    return model


TIES = "tie_word_embeddings"


def untied(config: Any) -> None:
    """Have a configuration tie nothing, in place."""
    for each in {id(part): part for part in (config, config.get_text_config())}.values():
        setattr(each, TIES, False)


FP32_LIMIT = 3_000_000_000
"""Models up to this many parameters are compared in fp32 arithmetic, larger ones in the run's
compute dtype."""

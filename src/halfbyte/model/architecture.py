"""A model's empty shape: transformers' own class, on the ``meta`` device; and where and in what it
computes."""

import copy
from typing import Any

import torch

from ..errors import UsageError
from ..files.model_config import refused_by_transformers
from .rope import forget_longer_passes


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


def build_empty(config: Any) -> Any:
    """transformers' model with parameters on the meta device and real buffers.

    Raises:
        ModelError: transformers cannot build it; its message is quoted.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    refused = refused_by_transformers("transformers cannot build the model of this config.json")
    with refused, init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    forget_longer_passes(model)
    return model


FP32_LIMIT = 3_000_000_000
"""Models up to this many parameters are compared in fp32 arithmetic, larger ones in the run's
compute dtype."""

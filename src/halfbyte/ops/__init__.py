"""One contract per operation, plain PyTorch as its reference.

Each module here declares an operation with `torch.library` (schema, shape rules, messages), gives
its reference in plain PyTorch for every device, and a fake for ``meta`` tensors. Faster kernels
(C++ for CPUs, Triton for GPUs) register behind the same schema and are held to the plain one by the
tests.
"""

from .adamw8bit import adamw_8bit_step
from .attention import AttentionParams, attention, attention_grad
from .dropout import DROPOUT_RESOLUTION, NO_DROPOUT, Dropout, drop_threshold, dropout_mask
from .fourbit import (
    FourBit,
    add_low_rank,
    check_storage,
    dequantize_4bit,
    linear_4bit,
    linear_4bit_input_grad,
    quantize_4bit,
    quantize_absmax,
)
from .lora import lora_grads, lora_input
from .passes import ACTIVATIONS, cross_entropy, gated, gated_grad, rms_norm, rms_norm_grad
from .rotary import rotate

__all__ = [
    "ACTIVATIONS",
    "DROPOUT_RESOLUTION",
    "NO_DROPOUT",
    "AttentionParams",
    "Dropout",
    "FourBit",
    "adamw_8bit_step",
    "add_low_rank",
    "attention",
    "attention_grad",
    "check_storage",
    "cross_entropy",
    "dequantize_4bit",
    "drop_threshold",
    "dropout_mask",
    "gated",
    "gated_grad",
    "linear_4bit",
    "linear_4bit_input_grad",
    "lora_grads",
    "lora_input",
    "quantize_4bit",
    "quantize_absmax",
    "rms_norm",
    "rms_norm_grad",
    "rotate",
]

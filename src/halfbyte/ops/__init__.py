"""One contract per operation, plain PyTorch as its meaning.

Each module here declares an operation with `torch.library` (schema, shape rules, messages), gives its meaning in plain
PyTorch for every device, and a shape function for ``meta`` tensors. Faster spellings (C++ for CPUs, Triton for GPUs)
register behind the same schema and are held to the plain one by the tests.
"""

from .adamw8bit import adamw_8bit_step
from .dropout import DROPOUT_RESOLUTION, drop_threshold, dropout_mask
from .fourbit import (
    FourBit,
    check_storage,
    dequantize_4bit,
    linear_4bit,
    linear_4bit_input_grad,
    quantize_4bit,
    quantize_absmax,
)

__all__ = [
    "DROPOUT_RESOLUTION",
    "FourBit",
    "adamw_8bit_step",
    "check_storage",
    "dequantize_4bit",
    "drop_threshold",
    "dropout_mask",
    "linear_4bit",
    "linear_4bit_input_grad",
    "quantize_4bit",
    "quantize_absmax",
]

"""4-bit tensors by the names that scripts rely on: quantize, read and write them (`quantization`
has the rest)."""

from .quantization.bnb_format import read_checkpoint, write_checkpoint
from .quantization.tensor import NF4Tensor, quantize, stored_sizes

__all__ = ["NF4Tensor", "quantize", "read_checkpoint", "stored_sizes", "write_checkpoint"]

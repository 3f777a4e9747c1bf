"""A 4-bit weight that is to other packages what bitsandbytes' parameter is."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from .tensor import NF4Tensor, four_bit_linear, quantize


class _Half:
    """The size of an element of 4 bits, where bytes are counted as ``numel() * element_size()``."""

    def __rmul__(self, count: int) -> int:
        return count // 2


class Params4bit(NF4Tensor):
    """An `NF4Tensor` that is to other packages what bitsandbytes' parameter of this name is.

    PEFT leaves a weight of this name as it is when it raises all others to fp32, and asks it for
    what bitsandbytes' has. It computes in its own type, ``bnb_4bit_compute_dtype``, whatever that
    of the input is. Merging adds to it in place, and quantizes again; a clone, and any other
    arithmetic, is an ordinary tensor of the values.

    Args:
        data: `ops.FourBit`, or a tensor that is quantized now, with bitsandbytes' settings.
    """

    quant_storage = torch.uint8
    module = None
    bnb_quantized = True

    @staticmethod
    def __new__(cls, data: Any, *parts: Any, **settings: Any) -> Any:
        if isinstance(data, ops.FourBit):
            return NF4Tensor.__new__(cls, data, *parts, **settings)
        made = quantize(
            data.detach(),
            block_size=settings.get("blocksize") or 64,
            double_quant=settings.get("compress_statistics", True),
            quant_type=settings.get("quant_type", "fp4"),
        )
        return parameter(made, data.dtype)

    @property
    def compress_statistics(self) -> bool:
        """Whether the scales are in 8 bits."""
        return self.nested_absmax is not None

    @property
    def blocksize(self) -> int:
        return self.block_size

    @property
    def nbytes(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Bytes of the codes, as bitsandbytes counts them."""
        return self.packed.nbytes

    @property
    def quant_state(self) -> Any:
        """What bitsandbytes describes the codes by, in the same memory.

        Raises:
            AttributeError: bitsandbytes is not there.
        """
        try:
            from bitsandbytes.functional import QuantState
        except ImportError as error:
            raise AttributeError("quant_state is bitsandbytes', which is not installed") from error
        nested = None
        if self.nested_absmax is not None:
            nested = QuantState(
                absmax=self.nested_absmax,
                blocksize=self.nested_block_size,
                code=self.nested_quant_map,
                dtype=torch.float32,
            )
        return QuantState(
            absmax=self.absmax,
            shape=self.shape,
            code=self.quant_map,
            blocksize=self.block_size,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=self.nested_offset,
            state2=nested,
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            x, weight, bias = given["input"], given["weight"], given.get("bias")
            if isinstance(weight, NF4Tensor) and x.dtype != weight.dtype:
                bias = None if bias is None else bias.to(weight.dtype)
                return four_bit_linear(x.to(weight.dtype), weight, bias).to(x.dtype)
        if func is Tensor.element_size:
            return _Half()
        if str(func).startswith("bitsandbytes.dequantize_4bit"):
            return func(*[a.packed if isinstance(a, cls) else a for a in args], **kwargs)
        if func is Tensor.clone:  # to be changed, perhaps by something that takes gradients
            return args[0].dequantize()
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except NotImplementedError:
            name = getattr(func, "__name__", "")
            if name.endswith("_") and not name.endswith("__"):  # in place
                raise
            return func(*[_values(a) for a in args], **{k: _values(v) for k, v in kwargs.items()})


def _values(value: Any) -> Any:
    return value.dequantize() if isinstance(value, NF4Tensor) else value


def parameter(tensor: NF4Tensor, dtype: torch.dtype) -> nn.Parameter:
    """A 4-bit tensor as `Params4bit` that computes in a type."""
    return nn.Parameter(
        Params4bit(tensor._parts, tensor.shape, dtype, tensor.quant_type), requires_grad=False
    )

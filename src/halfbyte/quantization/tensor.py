"""`NF4Tensor`: a weight that holds exactly what a bitsandbytes 4-bit checkpoint stores, and looks
like its bf16 self.

The problem: a `torch.nn.Linear` should stay one, so that transformers, PEFT and everything else
that walks modules keeps working, while its frozen weight takes half a byte. So the weight is a
tensor subclass: to autograd and to ``.shape`` it is a [out, in] tensor of the compute dtype; inside
are ``packed`` codes, ``absmax`` scales and their own scales. ``F.linear`` on it runs
`ops.linear_4bit`, with the input gradient from the same 4 bits. Any other arithmetic raises by name
instead of silently expanding 140 GB.

The bytes are bitsandbytes' bytes, so reading and writing that format is a rename (`components`,
`from_components`; ``docs/format.md``). The subclass is not limited to NF4: ``quant_type`` says
which table of levels it uses.

The road not taken: a module class of our own (as bitsandbytes' ``Linear4bit``) needs every tool to
know it.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .. import codebooks, ops
from ..memory import recompute
from ..memory.streaming import StreamedGroup
from ..ops.fourbit import absmax_values
from ..ops.library import first_order

NESTED_BLOCK_SIZE = 256
_TENSORS = ("packed", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "nested_offset")


@cache
def _level_table(quant_type: str, device: torch.device) -> Tensor:
    return torch.tensor(codebooks.levels(quant_type), dtype=torch.float32, device=device)


@cache
def _scale_table(device: torch.device) -> Tensor:
    return torch.tensor(codebooks.dynamic_map(signed=True), dtype=torch.float32, device=device)


def stored_sizes(weights: int, block_size: int = 64, double_quant: bool = True) -> tuple[int, int]:
    """(bytes of codes, bytes of scales) of a 4-bit tensor of so many weights:
    `NF4Tensor.stored_bytes`, beforehand."""
    blocks = -(-weights // block_size)
    nested = -(-blocks // NESTED_BLOCK_SIZE)
    return -(-weights // 2), blocks + 4 * nested + 4 if double_quant else 4 * blocks


class NF4Tensor(Tensor):
    """A frozen 4-bit tensor. Made by `quantize` or read (`bnb_format.from_components`), not by the
    constructor.

    Attributes: ``packed`` uint8 [ceil(n / 2)], high nibble first; ``absmax`` uint8 codes when
    nested, else fp32; ``quant_map`` fp32 [16]; ``nested_absmax``, ``nested_quant_map``,
    ``nested_offset`` or None; ``block_size``, ``nested_block_size``, ``quant_type``. ``shape`` and
    ``dtype`` are those of the weight it stands for. ``streamed``: where its codes stay in a file,
    what has them read and let go (`memory.streaming.LayerStreamer`); else None.
    """

    packed: Tensor
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor | None
    nested_quant_map: Tensor | None
    nested_offset: Tensor | None
    block_size: int
    nested_block_size: int
    quant_type: str
    streamed: StreamedGroup | None

    @staticmethod
    def __new__(
        cls,
        parts: ops.FourBit,
        shape: torch.Size,
        dtype: torch.dtype,
        quant_type: str,
        streamed: StreamedGroup | None = None,
    ) -> "NF4Tensor":
        self = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=parts.packed.device
        )
        for name, value in zip(parts._fields, parts, strict=True):
            setattr(self, name, value)
        self.quant_type, self.streamed = quant_type, streamed
        return self

    @property
    def parts(self) -> ops.FourBit:
        """What the operations take; where it stays in a file, it is on its way from now on."""
        if self.streamed is not None:
            self.streamed.use()
        return self._parts

    @property
    def _parts(self) -> ops.FourBit:
        return ops.FourBit(
            self.packed,
            self.absmax,
            self.quant_map,
            self.nested_absmax,
            self.nested_quant_map,
            self.nested_offset,
            self.block_size,
            self.nested_block_size,
        )

    @property
    def stored_bytes(self) -> int:
        """Bytes of codes and scales (the two tables, shared by all tensors, not counted)."""
        return sum(t.nbytes for t in self.stored_tensors())

    def stored_tensors(self) -> list[Tensor]:
        """Codes and scales: packed, absmax and, nested, nested_absmax and nested_offset."""
        tensors = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return [t for t in tensors if t is not None]

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The values as an ordinary tensor of this shape, in ``dtype`` or the tensor's own."""
        return ops.dequantize_4bit(self.parts, self.numel(), dtype or self.dtype).view(self.shape)

    def with_dtype(self, dtype: torch.dtype) -> "NF4Tensor":
        """The same bytes presenting another compute dtype."""
        return type(self)(self._parts, self.shape, dtype, self.quant_type, self.streamed)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "NF4Tensor":
        parts = self._parts._replace(
            **{n: change(t) for n in _TENSORS if (t := getattr(self, n)) is not None}
        )
        return type(self)(parts, self.shape, self.dtype, self.quant_type)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        nested = ", double quantized" if self.nested_absmax is not None else ""
        return (
            f"NF4Tensor({list(self.shape)}, {self.quant_type}, block {self.block_size}{nested}, "
            f"{self.dtype}, {self.stored_bytes} bytes, {self.device})"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            "an NF4Tensor is not pickled: save its `bnb_format.components` as safetensors"
        )

    def __deepcopy__(self, memo: dict) -> Any:
        copy = self._map(Tensor.clone)
        return (
            torch.nn.Parameter(copy, requires_grad=False)
            if isinstance(self, torch.nn.Parameter)
            else copy
        )

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return _linear(*args, **kwargs)
        if func == _SET_DATA:
            return _set_data(*args)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DISPATCH:
            return _DISPATCH[func](*args, **(kwargs or {}))
        raise NotImplementedError(
            f"{func} is not defined on a 4-bit tensor; call .dequantize() first for an ordinary "
            "tensor"
        )


_SET_DATA: Any = Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]


def _set_data(tensor: NF4Tensor, value: Tensor) -> None:
    """``tensor.data = value``: what is inside follows; an ordinary tensor is quantized as this one
    is."""
    if not isinstance(tensor, NF4Tensor):
        raise TypeError("a tensor that is not in 4 bits does not take one that is")
    made = value if isinstance(value, NF4Tensor) else _quantized_like(tensor, value)
    with torch._C.DisableTorchFunctionSubclass():
        _SET_DATA(tensor, made)
    for name, part in zip(made._parts._fields, made._parts, strict=True):
        setattr(tensor, name, part)
    tensor.quant_type, tensor.streamed = made.quant_type, made.streamed


def _quantized_like(tensor: NF4Tensor, value: Tensor) -> NF4Tensor:
    """Values in 4 bits, in the form of another tensor."""
    if value.shape != tensor.shape:
        raise ValueError(f"{list(value.shape)} does not fit a 4-bit weight {list(tensor.shape)}")
    made = quantize(
        value.to(tensor.device),
        block_size=tensor.block_size,
        double_quant=tensor.nested_absmax is not None,
        quant_type=tensor.quant_type,
    )
    return type(tensor)(made._parts, made.shape, tensor.dtype, made.quant_type)


def _add_(tensor: NF4Tensor, other: Any, *, alpha: Any = 1) -> NF4Tensor:
    """In place: dequantized, added to in fp32, and quantized again, as bitsandbytes merges."""
    if tensor.streamed is not None:
        raise TypeError("a weight that is streamed from a file is not changed")
    other = other.dequantize(torch.float32) if isinstance(other, NF4Tensor) else other
    total = tensor.dequantize(torch.float32).add_(other, alpha=alpha)
    return _copy_(tensor, total)


def _copy_(tensor: NF4Tensor, source: Tensor, non_blocking: bool = False) -> NF4Tensor:
    """In place: what it holds becomes the source, quantized as this tensor is."""
    made = source if isinstance(source, NF4Tensor) else _quantized_like(tensor, source)
    for mine, theirs in zip(tensor.stored_tensors(), made.stored_tensors(), strict=True):
        mine.copy_(theirs)
    return tensor


def _set_(tensor: NF4Tensor, source: Tensor) -> NF4Tensor:
    """In place: the memory of another 4-bit tensor of this shape, as parametrizations put it
    back."""
    if not isinstance(source, NF4Tensor) or (source.shape, source.dtype) != (
        tensor.shape,
        tensor.dtype,
    ):
        raise TypeError("a 4-bit tensor is set to one of its shape and type alone")
    for name, part in zip(source._parts._fields, source._parts, strict=True):
        setattr(tensor, name, part)
    tensor.quant_type, tensor.streamed = source.quant_type, source.streamed
    return tensor


def _sub_(tensor: NF4Tensor, other: Any, *, alpha: Any = 1) -> NF4Tensor:
    return _add_(tensor, other, alpha=-alpha)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if not isinstance(weight, NF4Tensor) or weight.dim() != 2:
        raise TypeError(
            "a 4-bit tensor can only be the two-dimensional weight of F.linear, not its input or "
            "bias"
        )
    if weight.grad_fn is not None and torch.is_grad_enabled():
        raise TypeError(
            "something that takes gradients was added to a 4-bit weight, which passes none on: "
            ".dequantize() it first"
        )
    if x.shape[-1] != weight.shape[1]:
        raise ValueError(f"input [..., {x.shape[-1]}] does not fit a weight {list(weight.shape)}")
    return four_bit_linear(x, weight, bias)


def four_bit_linear(x: Tensor, weight: NF4Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, [.., out], for x [.., in] and a weight [out, in]."""
    return _FourBitLinear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]


class _FourBitLinear(torch.autograd.Function):
    """x W^T + b. Keeps the 4-bit weight as an attribute, so saved-tensor hooks never see it; the
    input is not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return recompute.product(lambda: ops.linear_4bit(x, weight.parts, weight.shape[0], bias))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        grad_x = ops.linear_4bit_input_grad(grad, ctx.weight.parts, ctx.weight.shape[1])
        grad_bias = grad.sum(tuple(range(grad.dim() - 1))) if ctx.needs_input_grad[2] else None
        return grad_x, None, grad_bias


def _detach(tensor: NF4Tensor) -> NF4Tensor:
    return type(tensor)(
        tensor._parts, tensor.shape, tensor.dtype, tensor.quant_type, tensor.streamed
    )


def _clone(tensor: NF4Tensor, *, memory_format: Any = None) -> NF4Tensor:
    return tensor._map(Tensor.clone)


def _to_copy(
    tensor: NF4Tensor, *, dtype: Any = None, device: Any = None, **ignored: Any
) -> NF4Tensor:
    if dtype is not None and dtype != tensor.dtype:
        raise TypeError(
            f"a 4-bit tensor is not cast from {tensor.dtype} to {dtype}: load the model with "
            f"dtype={dtype}, or call .dequantize(dtype)"
        )
    return tensor._map(lambda part: part.to(device=device, copy=True))


def _select(tensor: NF4Tensor, dim: int, index: int) -> NF4Tensor:
    """One of what is stacked along the first dimension (an expert's matrix): a part of the same
    memory, but for scales in 8 bits of a group that begins in the part before."""
    if dim != 0 or tensor.dim() < 2 or not -len(tensor) <= index < len(tensor):
        raise NotImplementedError(f"[{index}] along dimension {dim} of a 4-bit {tensor.shape}")
    number, weights = index % len(tensor), math.prod(tensor.shape[1:])
    blocks, left = divmod(weights, tensor.block_size)
    if left:
        raise NotImplementedError(
            f"a block of {tensor.block_size} weights is shared by two parts of {weights} each"
        )
    start, parts = number * blocks, tensor._parts
    packed = parts.packed[start * tensor.block_size // 2 :][: weights // 2]
    if parts.nested_absmax is None:
        parts = parts._replace(packed=packed, absmax=parts.absmax[start:][:blocks])
    else:
        size = tensor.nested_block_size
        first = start // size
        parts = parts._replace(
            packed=packed,
            absmax=parts.absmax[first * size : start + blocks],
            nested_absmax=parts.nested_absmax[first : -(-(start + blocks) // size)],
        )
        if start % size:  # not the first of a group of scales
            plain = absmax_values(parts)[start - first * size :]
            parts = ops.FourBit(packed, plain, parts.quant_map, None, None, None, *parts[-2:])
    return type(tensor)(parts, tensor.shape[1:], tensor.dtype, tensor.quant_type, tensor.streamed)


def _unbind(tensor: NF4Tensor, dim: int = 0) -> list[NF4Tensor]:
    return [_select(tensor, dim, number) for number in range(len(tensor))]


_aten: Any = torch.ops.aten
_DISPATCH: dict[Any, Callable] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten.clone.default: _clone,
    _aten._to_copy.default: _to_copy,
    _aten.add_.Tensor: _add_,
    _aten.sub_.Tensor: _sub_,
    _aten.copy_.default: _copy_,
    _aten.set_.source_Tensor: _set_,
    _aten.select.int: _select,
    _aten.unbind.int: _unbind,
}


def quantize(
    w: Tensor,
    *,
    block_size: int = 64,
    double_quant: bool = True,
    quant_type: str = "nf4",
    scale: str = "absmax",
) -> NF4Tensor:
    """Quantize a tensor of any shape (QLoRA, sections 2 and 3).

    Args:
        w: fp32, bf16 or fp16; any shape, contiguous or not.
        block_size: weights per scale, a power of two in 32..4096.
        double_quant: store the scales in 8 bits.
        quant_type: one of `codebooks.QUANT_TYPES`.
        scale: how a block's scale is chosen; "absmax", the only rule so far.

    Raises:
        TypeError: not a 16- or 32-bit float.
        ValueError: an unknown option, or a NaN or infinity, naming its block.
    """
    if scale != "absmax":
        raise ValueError(f'scale must be "absmax", got {scale!r}')
    quant_map = _level_table(quant_type, w.device)
    packed, absmax = ops.quantize_4bit(w.detach(), quant_map, block_size)
    refuse_non_finite(absmax, block_size)
    parts = ops.FourBit(packed, absmax, quant_map, None, None, None, block_size, NESTED_BLOCK_SIZE)
    if double_quant:
        table = _scale_table(w.device)
        codes, nested_absmax, offset = ops.quantize_absmax(absmax, table, NESTED_BLOCK_SIZE)
        parts = parts._replace(
            absmax=codes, nested_absmax=nested_absmax, nested_quant_map=table, nested_offset=offset
        )
    return NF4Tensor(parts, w.shape, w.dtype, quant_type)


def refuse_non_finite(absmax: Tensor, block_size: int) -> None:
    """Raise ValueError if a block holds a NaN or an infinity: its absolute maximum then is one,
    too."""
    if absmax.numel() and not absmax.is_meta and not math.isfinite(absmax.max().item()):
        finite = torch.isfinite(absmax)
        block = int((~finite).nonzero()[0])
        raise ValueError(
            f"{int((~finite).sum())} of {absmax.numel()} blocks hold a NaN or an infinity; the "
            f"first is block {block} (elements "
            f"{block * block_size}..{(block + 1) * block_size - 1} of the flattened tensor)"
        )

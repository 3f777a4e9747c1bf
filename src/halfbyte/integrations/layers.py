"""Layers of bitsandbytes and PEFT that compute with this package's operations.

They are made in place, subclasses of the layers' own classes (`model.class_swap`). Whatever a layer
is asked for beyond the ordinary (several adapters, DoRA, merged or disabled ones, hooks on its
parts) is answered by its own class.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..adapters.lora import lora_linear
from ..model.class_swap import has_hooks, is_wrapped
from ..quantization.experts import IMPLEMENTATION
from ..quantization.tensor import NESTED_BLOCK_SIZE, NF4Tensor, four_bit_linear


def stored_weight(weight: Tensor, dtype: torch.dtype) -> NF4Tensor | None:
    """bitsandbytes' parameter as a tensor of ours in the same memory; None where it is not
    quantized yet."""
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        return None
    nested = state.state2 if state.nested else None
    parts = ops.FourBit(
        weight.data.view(torch.uint8).view(-1),
        state.absmax.view(-1),
        state.code,
        nested.absmax.view(-1) if nested else None,
        nested.code if nested else None,
        state.offset if nested else None,
        state.blocksize,
        nested.blocksize if nested else NESTED_BLOCK_SIZE,
    )
    return NF4Tensor(parts, torch.Size(state.shape), dtype, state.quant_type)


class OptimizedFourBit(nn.Module):
    """bitsandbytes' 4-bit layer, computed by `ops.linear_4bit`.

    It never packs its weight anew for inference, after which the original's gradients are those of
    other weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        dtype = _computes_in(own, x)
        weight = stored_weight(own.weight, dtype)
        if weight is None:
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        bias = None if own.bias is None else own.bias.to(dtype)
        with _exactly(x):
            return four_bit_linear(x.to(dtype), weight, bias).to(x.dtype)


def _computes_in(layer: Any, x: Tensor) -> torch.dtype:
    """The type a layer of bitsandbytes computes in, by its own rule."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    return layer.compute_dtype or x.dtype


def _exactly(x: Tensor) -> Any:
    """Within this block products on the device of x run in the types they are given."""
    return torch.autocast(x.device.type, enabled=False)


class OptimizedLora(nn.Module):
    """PEFT's LoRA layer with one ordinary adapter, both branches at once (`lora.lora_linear`)."""

    kept_dtypes: dict[str, torch.dtype]
    """The types that adapters had, which trainers may have changed since (TRL rounds adapters to
    bf16)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own: Any = self
        name, base = self._ordinary(args, kwargs), own.get_base_layer()
        weight, dtype = (None, x.dtype) if name is None else _base_weight(base, x)
        if name is None or weight is None:
            return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        self._keep_dtype(name)
        a, b = own.lora_A[name].weight, own.lora_B[name].weight
        bias = None if base.bias is None else base.bias.to(dtype)
        with _exactly(x):
            y = lora_linear(
                x.to(dtype),
                weight,
                bias,
                a,
                b,
                own.scaling[name],
                self._dropout(own.lora_dropout[name]),
            )
        return y.to(x.dtype) if isinstance(weight, NF4Tensor) else y

    def _keep_dtype(self, name: str) -> None:
        own: Any = self
        a, b = own.lora_A[name].weight, own.lora_B[name].weight
        kept = self.kept_dtypes.get(name, a.dtype)
        if a.dtype != kept and a.requires_grad:
            for p in (a, b):
                p.data = p.data.to(kept)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Before the parts of a layer read a checkpoint, which holds them unrounded."""
        for name in self.kept_dtypes:
            self._keep_dtype(name)
        super()._load_from_state_dict(*args, **kwargs)

    @property
    def is_ordinary(self) -> bool:
        """Whether nothing but this layer's product is its output."""
        return self._ordinary((), {}) is not None

    def _ordinary(self, args: Any, kwargs: Any) -> str | None:
        """The one adapter to compute with, if there is nothing else to it."""
        own: Any = self
        if args or kwargs or own.disable_adapters or own.merged or len(own.active_adapters) != 1:
            return None
        name = own.active_adapters[0]
        if name not in own.lora_A or name in own.lora_variant or own.lora_bias.get(name):
            return None
        parts = (own.base_layer, own.lora_A[name], own.lora_B[name], own.lora_dropout[name])
        if any(map(has_hooks, parts)):
            return None
        return name if isinstance(own.lora_dropout[name], nn.Dropout | nn.Identity) else None

    def _dropout(self, module: nn.Module) -> ops.Dropout:
        p = module.p if isinstance(module, nn.Dropout) and module.training else 0.0
        if not p:
            return ops.NO_DROPOUT
        return ops.Dropout(ops.drop_threshold(p), int(torch.randint(0, 1 << 62, ())), 0, 0, 0)


class OptimizedExpertLora(nn.Module):
    """PEFT's LoRA on a parameter of a mixture's experts that is in 4 bits: its factors go beside
    each expert's 4-bit product (`quantization.experts`), where PEFT makes the sum of all experts
    and their changes in 16 bits."""

    @contextlib.contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        own: Any = self
        experts, name = own.get_base_layer(), own.parameter_name
        adapters = [adapter for adapter in active_adapters if adapter in own.lora_A]
        stack = getattr(experts, name)
        held = isinstance(stack, NF4Tensor) and stack.dim() == 3
        config: Any = getattr(experts, "config", None)
        runs = getattr(config, "_experts_implementation", None) == IMPLEMENTATION
        if len(adapters) != 1 or not (held and runs) or is_wrapped(experts):
            with super()._activate_lora(active_adapters):  # pyright: ignore[reportAttributeAccessIssue]
                yield
            return
        low_rank = experts.__dict__.setdefault("low_rank", {})
        low_rank[name] = own.get_delta_factors(adapters[0])
        try:
            yield
        finally:
            del low_rank[name]


def _base_weight(base: Any, x: Tensor) -> tuple[Tensor | None, torch.dtype]:
    """The frozen weight under an adapter and the type to compute in; None where PEFT has to."""
    weight = base.weight
    if is_wrapped(base):  # what wraps it may bring the weight first (accelerate's offloading)
        return None, x.dtype
    if isinstance(base, OptimizedFourBit):
        dtype = _computes_in(base, x)
        return stored_weight(weight, dtype), dtype
    if isinstance(weight, NF4Tensor):
        return weight, weight.dtype
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    usable = type(base) is nn.Linear and weight.dtype == dtype and not weight.requires_grad
    return (weight if usable else None), dtype

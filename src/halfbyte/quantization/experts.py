"""A mixture's experts in 4 bits for people's own scripts: in the parameters that transformers has.

Where halfbyte loads a model, each expert's matrices are layers of their own (`model.experts`). A
script that loads through transformers and adapts through PEFT names ``experts.gate_up_proj`` and
``experts.down_proj``, [experts, out, in], so there they stay what they are and are held in 4 bits
as one tensor each, of which an expert's matrix is a part. transformers runs what is registered
under `IMPLEMENTATION` with them: each chosen expert once, on all of its tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from ..memory import recompute
from ..model.experts import is_experts, over_experts
from ..ops.library import first_order
from .params4bit import parameter
from .tensor import NF4Tensor, quantize

IMPLEMENTATION = "halfbyte"
"""What transformers calls it (``experts_implementation``)."""


def expert_weights(module: nn.Module, block_size: int = 64) -> dict[str, nn.Parameter]:
    """The parameters of a mixture's experts that can be held in 4 bits, by name; none of another
    module, and none where a block of weights would be two experts'."""
    if not is_experts(module) or getattr(module, "has_post_expert_norm", False):
        return {}
    stacks = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
    whole = all(p.shape[1] * p.shape[2] % block_size == 0 for p in stacks.values())
    return stacks if whole else {}


def experts_forward(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What a layer's experts make of its tokens, [tokens, width]; of parameters in 4 bits and of
    ordinary ones (those that PEFT adapts, while it does).

    Args:
        module: the experts, a class of transformers' ``use_experts_implementation``.
        hidden_states: [tokens, width].
        top_k_index, top_k_weights: [tokens, k], as the router gives them.

    ``low_rank`` of the module, where there is one: by parameter, what is added to it, as (lhs
    [experts, .., r], rhs [experts, r, ..], scaling) of scaling lhs rhs, which is never made.
    """
    first = "gate_up_proj" if module.has_gate else "up_proj"
    # once: each reading of an adapted parameter would add the adapter anew
    stacks = {name: getattr(module, name).unbind(0) for name in (first, "down_proj")}
    factors = {
        name: (lhs.unbind(0), rhs.unbind(0), scaling)
        for name, (lhs, rhs, scaling) in getattr(module, "low_rank", {}).items()
    }

    def product(name: str, number: int, x: Tensor) -> Tensor:
        bias = getattr(module, f"{name}_bias")[number] if module.has_bias else None
        weight = stacks[name][number]
        if not module.is_transposed:
            y = functional.linear(x, weight, bias)
        else:
            y = _times(x, weight) if isinstance(weight, NF4Tensor) else x @ weight
            y = y if bias is None else y + bias
        if name not in factors:
            return y
        lhs, rhs, scaling = factors[name]
        a, b = lhs[number], rhs[number]
        if not module.is_transposed:
            a, b = b.T, a.T
        return y + scaling * ((x.to(a.dtype) @ a) @ b).to(y.dtype)

    def run(number: int, x: Tensor) -> Tensor:
        inner = product(first, number, x)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        return product("down_proj", number, inner)

    return over_experts(hidden_states, top_k_index, top_k_weights, module.num_experts, run)


def _times(x: Tensor, weight: NF4Tensor) -> Tensor:
    """x W, [n, out], of a matrix that is stored [in, out]."""
    return _Times.apply(x.to(weight.dtype), weight).to(x.dtype)  # pyright: ignore


class _Times(torch.autograd.Function):
    """The matrix is dequantized again for the gradient, and not kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Tensor) -> Tensor:
        ctx.weight = weight
        return recompute.product(lambda: x @ weight.dequantize())

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] @ ctx.weight.dequantize().T, None


def hold_experts(model: Any) -> int:
    """Quantize the frozen experts of a model that is in memory, in place, with the settings of its
    other 4-bit layers, or NF4 with double quantization; how many parameters."""
    settings = getattr(model.config, "quantization_config", None)
    count = 0
    for module in model.modules():
        for name, p in expert_weights(module).items():
            if isinstance(p, NF4Tensor) or p.requires_grad:
                continue
            made = quantize(
                p.data,
                double_quant=getattr(settings, "bnb_4bit_use_double_quant", True),
                quant_type=getattr(settings, "bnb_4bit_quant_type", "nf4"),
            )
            dtype = getattr(settings, "bnb_4bit_compute_dtype", None) or p.dtype
            module._parameters[name] = parameter(made, dtype)
            count += 1
    if count:
        use_held_experts(model)
    return count


def experts_in_16_bits(model: Any) -> str:
    """Of a model whose other layers are in 4 bits, how much of it its frozen experts are that are
    not: a line for people, or ""."""
    stacks = [
        p
        for module in model.modules()
        for p in expert_weights(module).values()
        if not isinstance(p, NF4Tensor) and not p.requires_grad
    ]
    if not stacks or not getattr(model, "is_loaded_in_4bit", False):
        return ""
    count = sum(p.numel() for p in stacks)
    return (
        f"its experts, {count:,} weights, are in {stacks[0].element_size() * 8} bits: "
        "optimize(model, quantize_experts=True) holds them in 4, which rounds them"
    )


def use_held_experts(model: Any) -> None:
    """Have a transformers model run its experts by `experts_forward`, in place."""
    ALL_EXPERTS_FUNCTIONS[IMPLEMENTATION] = experts_forward
    model.set_experts_implementation(IMPLEMENTATION)


def coverage(model: Any) -> str:
    """Of a model with experts, how much of it is in 4 bits: a line for people."""
    sizes = {
        name: (p.numel(), isinstance(p, NF4Tensor), p.dim() > 2)
        for name, p in model.named_parameters()
    }
    total = sum(n for n, _, _ in sizes.values())
    held = sum(n for n, in_4_bits, _ in sizes.values() if in_4_bits)
    stacked = sum(n for n, in_4_bits, stack in sizes.values() if in_4_bits and stack)
    return (
        f"{held / total:.1%} of {total:,} weights are in 4 bits; the experts, "
        f"{stacked / total:.1%}, among them"
    )

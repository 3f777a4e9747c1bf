"""Mixtures of experts: each expert's matrices as linear layers of their own.

transformers holds all experts of a layer in two three-dimensional parameters, which nothing can
quantize or adapt as it does a layer; most files hold each expert's matrices apart. So does a model
here, whichever the file does: ``experts.3.gate_proj``, ``up_proj`` and ``down_proj`` are
`torch.nn.Linear`, quantized, read, hashed and merged as every other. The tokens of a pass are
sorted by expert, each expert that is chosen runs once on all of its own, and the results return to
their tokens by the inverse permutation: sums have one order, whatever the threads.

Routers choose by small differences, so they stay in 16 bits and take no adapter.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..files.entries import Entry, MXFP4Entry, TransposedEntry
from .class_swap import swap_class

GATED, PLAIN = ("gate_proj", "up_proj", "down_proj"), ("up_proj", "down_proj")
"""An expert's matrices, where it has a gate and where it has none."""
JOINED = ("gate_up_proj", "down_proj")
"""An expert's matrices, where gate and up are one."""
IMAGINED = 16
"""Experts that stand for all where nothing but shapes is computed."""
ROUTERS = ("gate", "router", "wg", "shared_expert_gate")
"""What routers that are linear layers are called."""


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a layer (transformers' ``use_experts_implementation``
    made its class)."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


class Expert(nn.Module):
    """One expert, of the form most have: what is fused of a dense model's MLP is fused of it. Made
    by `divide_experts`."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class OtherExpert(nn.Module):
    """One expert of another form, whose matrices `DividedExperts` multiplies by: with a gate of its
    own, without one, or (gpt-oss) with gate and up interleaved in one matrix, ``gate_up_proj``."""


class DividedExperts(nn.Module):
    """The experts of a layer, each by itself: children "0", "1", ... are `Expert` or
    `OtherExpert`."""

    has_gate: bool
    num_experts: int
    act_fn: Any
    fused: list[str]
    """The matrices that were divided, in their order."""
    is_joined: bool
    """Whether gate and up are one matrix of an expert."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the experts each token goes to, [tokens, width].

        Args:
            hidden_states: [tokens, width].
            top_k_index, top_k_weights: [tokens, k], as the router gives them.
        """
        return over_experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.num_experts,
            lambda number, part: self._run(getattr(self, str(number)), part),
        )

    def _run(self, expert: Any, x: Tensor) -> Tensor:
        if isinstance(expert, Expert):
            return expert(x)
        own: Any = self
        if self.is_joined:
            return expert.down_proj(own._apply_gate(expert.gate_up_proj(x)))
        up = expert.up_proj(x)
        if not self.has_gate:
            return expert.down_proj(self.act_fn(up))
        both = torch.cat((expert.gate_proj(x), up), dim=-1)
        return expert.down_proj(own._apply_gate(both))


def over_experts(
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    num_experts: int,
    run: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """The weighted sum of the experts each token goes to, [tokens, width].

    Args:
        hidden_states: [tokens, width].
        top_k_index, top_k_weights: [tokens, k], as the router gives them.
        run: what an expert makes of its tokens, [n, width] both, by its number.
    """
    chosen = top_k_index.reshape(-1)
    order = torch.argsort(chosen, stable=True)
    counts = _counts(chosen, num_experts)
    # a router of several machines names experts that are elsewhere by a number too high
    order = order[: sum(counts)]
    k = top_k_index.shape[1]
    gathered = _Gather.apply(hidden_states, order, k)
    parts: Any = enumerate(gathered.split(counts))
    results = [run(number, part) for number, part in parts if len(part)]
    weights = top_k_weights.reshape(-1)[order].unsqueeze(1)
    weighted = torch.cat(results) * weights
    return _Return.apply(weighted, order, len(hidden_states), k).to(hidden_states.dtype)


def _counts(chosen: Tensor, num_experts: int) -> list[int]:
    """How many times each expert is chosen; of shapes alone, some stand for all: that takes as
    much memory, and hundreds less time."""
    if chosen.is_meta:
        some = min(num_experts, IMAGINED)
        each, more = divmod(len(chosen), some)
        counts = [each + (number < more) for number in range(some)]
        return counts + [0] * (num_experts - some)
    return torch.bincount(chosen, minlength=num_experts)[:num_experts].tolist()


class _Gather(torch.autograd.Function):
    """Rows of [tokens, width] in the order of the experts they go to, each k times; gradients of a
    token are summed in the order of its experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.shape, ctx.k = x.shape, k
        return x[order // k]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (order,), (dy,) = ctx.saved_tensors, grads
        return _back(dy, order, ctx.shape[0], ctx.k), None, None


class _Return(torch.autograd.Function):
    """[chosen, width] in the order of the experts to [tokens, width], summed over a token's k."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order: Tensor, tokens: int, k: int) -> Tensor:
        ctx.save_for_backward(order)
        ctx.k = k
        return _back(y, order, tokens, k)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (order,), (dy,) = ctx.saved_tensors, grads
        return dy[order // ctx.k], None, None, None


def _back(y: Tensor, order: Tensor, tokens: int, k: int) -> Tensor:
    """Sums over each token's k places; one that no expert here was chosen for counts nothing."""
    whole = len(order) == tokens * k
    places = y.new_empty(tokens * k, y.shape[1]) if whole else y.new_zeros(tokens * k, y.shape[1])
    places[order] = y
    return places.view(tokens, k, -1).sum(1)


def divide_experts(model: Any) -> None:
    """Give each expert of an empty model its own linear layers, in place. What transformers fuses
    is kept by name in the model's ``fused_experts``, and biases in ``fused_biases``: parameters
    there are no more."""
    fused: set[str] = set()
    biases: set[str] = set()
    for path, module in list(model.named_modules()):
        if is_experts(module) and not module.has_post_expert_norm and module.down_proj.dim() == 3:
            gone = _divide(module)
            fused |= {f"{path}.{name}" for name in module.fused}
            biases |= {f"{path}.{name}" for name in gone if name not in module.fused}
    if fused:
        model.fused_experts, model.fused_biases = fused, biases


def fused_experts(model: Any) -> set[str]:
    """The matrices of a model that `divide_experts` divided."""
    return getattr(model, "fused_experts", set())


def fused_biases(model: Any) -> set[str]:
    """The biases of all experts of a layer that `divide_experts` divided."""
    return getattr(model, "fused_biases", set())


def _divide(module: Any) -> list[str]:
    """The parameters of experts as layers, in place; returns the names they had."""
    from transformers.integrations.moe import _default_apply_gate

    joined = module.is_transposed or module.has_bias or not module.is_concatenated
    names = (JOINED if joined else GATED) if module.has_gate else PLAIN
    sizes = module.down_proj.shape[1:]
    width, inner = reversed(sizes) if module.is_transposed else sizes
    like = module.down_proj
    activation: Any = getattr(module, "act_fn", None)
    activation = nn.SiLU() if activation is functional.silu else activation
    own_gate = joined or type(module)._apply_gate is not _default_apply_gate
    usual = module.has_gate and not own_gate and isinstance(activation, nn.Module)
    for number in range(module.num_experts):
        expert = Expert() if usual else OtherExpert()
        for name in names:
            out = 2 * inner if name == JOINED[0] else inner
            size = (inner, width) if name == "down_proj" else (width, out)
            with torch.device("meta"):
                layer = nn.Linear(*size, bias=module.has_bias, dtype=like.dtype)
            expert.add_module(name, layer)
        if usual:
            expert.act_fn = activation
        module.add_module(str(number), expert)
    module.fused = [name for name, p in module._parameters.items() if p is not None and p.dim() > 2]
    module.is_joined = joined and module.has_gate
    gone = [name for name, p in module._parameters.items() if p is not None and _of_each(module, p)]
    for name in gone:
        del module._parameters[name]
    swap_class(module, DividedExperts)
    return gone


def _of_each(module: Any, parameter: Tensor) -> bool:
    """Whether a parameter of experts holds something of each, and no more."""
    return parameter.dim() > 2 or (module.has_bias and parameter.shape[0] == module.num_experts)


def expert_parameter(fused: str, source: str, part: int, gated: bool) -> str:
    """The name in the model of an expert's matrix.

    Args:
        fused: the parameter that transformers makes of it and of others.
        source: its name on disk, whose last number is the expert's.
        part: which of the tensors of an expert that are joined it is.
        gated: whether experts have a gate, whose matrix is then joined with another.
    """
    path, _, attribute = fused.rpartition(".")
    number = next(piece for piece in reversed(source.split(".")) if piece.isdigit())
    layer = GATED[part] if attribute == "gate_up_proj" and gated else attribute
    return f"{path}.{number}.{layer}.weight"


def fused_parameter(model: Any, path: str) -> str | None:
    """The parameter that transformers makes of an expert's layer and of others, by the layer's
    path; None of a layer that is no expert's."""
    names = fused_experts(model)
    stack, _, layer = path.rpartition(".")
    stack, _, number = stack.rpartition(".")
    if not names or not number.isdigit():
        return None
    found = (f"{stack}.{layer}", f"{stack}.gate_up_proj" if layer != "down_proj" else "")
    return next((name for name in found if name in names), None)


def experts_per_token(config: Any) -> int:
    """How many experts each token goes to, by a model's configuration."""
    text = config.get_text_config()
    names = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")
    found = (getattr(text, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and n > 0), 1)


WITHIN = "::"
"""Between the name of a tensor that holds all experts of a layer and that of a part of it."""


def parts_of_experts(entry: Entry, model: Any, fused: str) -> dict[str, Entry]:
    """Where each expert's part lies in a tensor that holds those of all, [experts, out, in] (or
    [experts, in, out], or of biases [experts, out]; in MXFP4 always [experts, out, in]), by
    ``number.layer.weight``; nothing where it has another shape.

    Args:
        fused: the parameter it is in transformers.
    """
    path, _, attribute = fused.rpartition(".")
    module = model.get_submodule(path)
    kind = "bias" if fused in fused_biases(model) else "weight"
    if len(entry.shape) != (2 if kind == "bias" else 3) or not entry.shape[0]:
        return {}
    count, rows, *width = entry.shape
    split = attribute == "gate_up_proj" and not module.is_joined
    layers = GATED[:2] if split else (attribute.removesuffix("_bias"),)
    each, left = divmod(rows, len(layers))
    if left:
        return {}
    size = each * math.prod(width) * entry.dtype.itemsize

    def part(place: int) -> Entry:
        if isinstance(entry, MXFP4Entry):
            return entry.matrix(place * each, each, module.is_transposed)
        start = entry.start + place * size
        return replace(entry, shape=(each, *width), start=start, nbytes=size)

    found = {
        f"{number}.{layer}.{kind}": part(number * len(layers) + place)
        for number in range(count)
        for place, layer in enumerate(layers)
    }
    if isinstance(entry, MXFP4Entry):
        return found
    turned = module.is_transposed and kind == "weight"
    return {key: TransposedEntry.of(e) for key, e in found.items()} if turned else found


def joined_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parts that `parts_of_experts` divided as the tensors they lie in, in the order they have
    there; emptied as they are joined."""
    whole: dict[str, list[str]] = {}
    for name in tensors:
        whole.setdefault(name.partition(WITHIN)[0], []).append(name)
    found = {}
    for source, names in whole.items():
        if names == [source]:
            found[source] = tensors[source]
            continue
        first = tensors[names[0]]
        parts = {name: name.partition(WITHIN)[2].split(".") for name in names}
        layers = sorted({layer for _, layer, _ in parts.values()}, key=(*GATED, *JOINED).index)
        place = first.new_empty(len(names), *first.shape)
        for name, (number, layer, _) in parts.items():
            place[int(number) * len(layers) + layers.index(layer)] = tensors.pop(name)
        rows = len(layers) * first.shape[0]
        found[source] = place.view(len(names) // len(layers), rows, *first.shape[1:])
    return found


def routers(model: Any) -> Iterator[nn.Module]:
    """The linear layers by which tokens are sent to experts, which are no layers to quantize or
    adapt."""
    for block in model.modules():
        counts = {child.num_experts for child in block.children() if is_experts(child)}
        if not counts:
            continue
        for path, module in block.named_modules():
            last = path.split(".")
            if isinstance(module, nn.Linear) and not last[0].startswith("experts"):
                small = module.out_features in {1, *counts}
                if small and not set(ROUTERS).isdisjoint(last):
                    yield module

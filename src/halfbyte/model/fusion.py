"""A model's own norms and MLPs, computed in one pass where they are of a known form.

A module is recognized by the body of its ``forward``: names of arguments, locals and attributes are
replaced by numbers, and the rest is compared by its hash with the forms known here. What is
recognized becomes, in place, a subclass of its own class whose ``forward`` runs the fused
operation. Before it stays, one of each kind is run on random numbers, forward and backward, beside
the original; a kind that differs by more than rounding is left as it was. Nothing is looked up by a
model's name, and a model that nothing is known of trains as it always did.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..memory import recompute
from ..ops import cpu, gpu
from ..ops.library import first_order
from . import attention
from .class_swap import has_hooks, is_wrapped, swap_class
from .fp32 import as_near, distance, in_fp32, typical_distance
from .recognize import AttentionSpec, MlpSpec, NormSpec, Spec, spec_of

SAME_FORM = 1e-5
"""Relative difference in fp32 (norm over norm) of two ways to compute the same: the accuracy of the
activations' polynomials, with a margin."""
TRIED = 96
"""Tokens that a fused module is tried on."""
COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, spec: NormSpec, eps: float) -> Tensor:
        y, inverse = ops.rms_norm(x, weight, eps, spec.offset, spec.cast_first)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = spec.offset
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        dy, dweight = grads[0], None
        dx = (
            ops.rms_norm_grad(dy, x, weight, inverse, ctx.offset)
            if ctx.needs_input_grad[0]
            else None
        )
        if ctx.needs_input_grad[1]:
            each = dy.float() * x.float() * inverse.unsqueeze(-1)
            dweight = each.reshape(-1, each.shape[-1]).sum(0).to(weight.dtype)
        return dx, dweight, None, None


class FusedNorm(nn.Module):
    """A model's RMSNorm in one pass; its class is also a subclass of the original's."""

    weight: nn.Parameter
    spec: NormSpec

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        return _Norm.apply(x, self.weight, self.spec, getattr(self, self.spec.eps))  # pyright: ignore[reportReturnType]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ops.gated(gate, up, activation)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return *ops.gated_grad(grads[0], gate, up, ctx.activation), None


class FusedMLP(nn.Module):
    """A model's gated MLP, its activation and product in one pass; its class is also a subclass of
    the original's.

    ``tile``: run on so many tokens at a time; 0: on all at once.
    """

    spec: MlpSpec
    tile: int = 0

    def forward(self, x: Tensor) -> Tensor:
        if has_hooks(getattr(self, self.spec.act)):
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        if not 0 < self.tile < x.shape[-2]:
            return self.whole(x)
        # the parameters inside need gradients even where x does not
        trigger = torch.empty(0, device=x.device, requires_grad=torch.is_grad_enabled())
        return _Tiles.apply(x, self, trigger)  # pyright: ignore[reportReturnType]

    def whole(self, x: Tensor) -> Tensor:
        """The result for all tokens of x at once."""
        spec = self.spec
        if spec.up is None:
            gate, up = getattr(self, spec.gate)(x).chunk(2, -1)
        else:
            gate, up = getattr(self, spec.gate)(x), getattr(self, spec.up)(x)
        return getattr(self, spec.down)(_Gated.apply(gate, up, spec.activation))


class _Tiles(torch.autograd.Function):
    """An MLP of x [..., T, d], tile of tokens after tile, forward and, computed again, backward.

    What is alive at a time is what an MLP needs for one tile (TiledMLP of ALST, arXiv:2506.13996).
    Adapters' dropout masks are the whole's. Gradients of parameters are sums over tiles, so they
    may differ in their last bits.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, mlp: FusedMLP, trigger: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.mlp, ctx.tile = mlp, mlp.tile

        def compute() -> Tensor:
            out = torch.empty_like(x)
            for first, part in _tiles(x, ctx.tile):
                with _at_token(mlp, first):
                    out.narrow(-2, first, part.shape[-2]).copy_(mlp.whole(part))
            return out

        return recompute.as_one_product(compute)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        for first, part in _tiles(x, ctx.tile):
            given = part.detach().requires_grad_(dx is not None)
            with torch.enable_grad(), _at_token(ctx.mlp, first):
                y = ctx.mlp.whole(given)
            if y.requires_grad:
                with _at_token(ctx.mlp, first):
                    torch.autograd.backward(y, grads[0].narrow(-2, first, part.shape[-2]))
            if dx is not None and given.grad is not None:
                dx.narrow(-2, first, part.shape[-2]).copy_(given.grad)
        return dx, None, None


def _tiles(x: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, x.shape[-2], size):
        yield first, x.narrow(-2, first, min(size, x.shape[-2] - first))


@contextlib.contextmanager
def _at_token(mlp: FusedMLP, first: int) -> Iterator[None]:
    """Within this block the adapters of an MLP know that their input begins with this token of what
    it was."""
    clocks = {
        id(clock): clock for m in mlp.modules() if (clock := getattr(m, "clock", None)) is not None
    }
    before = [(clock, clock.first) for clock in clocks.values()]
    try:
        for clock, at in before:
            clock.first = at + first
        yield
    finally:
        for clock, at in before:
            clock.first = at


def tile_mlps(model: nn.Module, tokens: int) -> int:
    """Have a model's fused MLPs run on so many tokens at a time; their number."""
    mlps = [module for module in model.modules() if isinstance(module, FusedMLP)]
    for mlp in mlps:
        mlp.tile = tokens
    return len(mlps)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return ops.rotate(x[0], cos, sin).unsqueeze(0)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ops.rotate(grads[0][0], *ctx.saved_tensors, back=True).unsqueeze(0), None, None


class FusedAttention(nn.Module):
    """A model's own attention with the rotation in one pass; its class is also a subclass of the
    original's."""

    spec: AttentionSpec
    training: bool
    attention_dropout: float

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> Any:
        config: Any = self.config
        attend = {
            attention.NAME: attention.segment_attention,
            attention.CAUSAL: attention.causal_attention,
        }.get(config._attn_implementation)
        if (
            attend is None
            or past_key_values is not None
            or position_embeddings is None
            or hidden_states.shape[0] != 1
        ):
            return super().forward(  # pyright: ignore[reportCallIssue]
                hidden_states,
                position_embeddings,
                attention_mask,
                past_key_values=past_key_values,
                **more,
            )
        spec = self.spec
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            getattr(self, name)(hidden_states).view(shape) for name in (spec.q, spec.k, spec.v)
        )
        if spec.q_norm is not None and spec.k_norm is not None:
            q, k = getattr(self, spec.q_norm)(q), getattr(self, spec.k_norm)(k)
        cos, sin = (t[0] for t in position_embeddings)
        q, k = _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)
        if spec.window:
            window = (
                getattr(config, "sliding_window", None)
                if spec.window == "config"
                else getattr(self, spec.window)
            )
            more["sliding_window"] = window
        dropout = self.attention_dropout if self.training else 0.0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        scaling = getattr(self, spec.scaling)
        out, weights = attend(
            self, q, k, v, attention_mask, dropout=dropout, scaling=scaling, **more
        )
        return getattr(self, spec.o)(out.reshape(*hidden_states.shape[:-1], -1)), weights


# --- on a model -----------------------------------------------------------------------------------


@dataclass
class Fused:
    """What became of a model's modules: counts by kind, and why some were left alone."""

    norms: int = 0
    mlps: int = 0
    attentions: int = 0
    left: dict[str, str] = field(default_factory=dict)
    """Class name to reason."""

    def line(self) -> str:
        counts = (
            (self.norms, "norms"),
            (self.mlps, "MLPs"),
            (self.attentions, "rotary embeddings"),
        )
        done = [f"{count} {name}" for count, name in counts if count]
        left = [f"{name} ({why})" for name, why in self.left.items()]
        return f"fused: {', '.join(done) or 'nothing'}" + (
            f"; left as they are: {', '.join(left)}" if left else ""
        )


def _fused(module: nn.Module, kind: type, spec: Spec) -> None:
    swap_class(module, kind, f"Fused{type(module).__name__}")
    module.spec = spec  # pyright: ignore[reportArgumentType]


def _revert(module: nn.Module) -> None:
    module.__class__ = type(module).__bases__[1]
    del module.spec


def fuse(model: nn.Module) -> Fused:
    """Fuse what is known of a model, in place; nothing without the C++ library or Triton: it would
    be no faster."""
    result = Fused()
    if not _is_served(next(model.parameters())):
        return result
    dtype = compute_dtype(model)
    judged: dict[tuple[Any, ...], str] = {}
    for module in list(model.modules()):
        own = type(module)
        if isinstance(module, FusedNorm | FusedMLP | FusedAttention) or is_wrapped(module):
            continue
        spec = spec_of(module)
        if spec is None:
            if "RMSNorm" in own.__name__ or "MLP" in own.__name__:
                result.left.setdefault(own.__name__, "of a form not known here")
            continue
        kind = {NormSpec: FusedNorm, MlpSpec: FusedMLP, AttentionSpec: FusedAttention}[type(spec)]
        width = _width(module, spec)
        if width is None:
            result.left.setdefault(own.__name__, "its parts are no linear layers")
            continue
        key = (own, spec, width)
        if key not in judged:
            own_dtype = next(module.parameters()).dtype if kind is FusedNorm else dtype
            judged[key] = _disagreement(module, kind, spec, width, own_dtype)
        if judged[key]:
            result.left.setdefault(own.__name__, judged[key])
            continue
        _fused(module, kind, spec)
        result.norms += kind is FusedNorm
        result.mlps += kind is FusedMLP
        result.attentions += kind is FusedAttention
    return result


def _is_served(tensor: Tensor) -> bool:
    """Whether fused passes compute on the device of a tensor, or on the one it stands for."""
    return gpu.computes(tensor) or cpu.serves(tensor)


def _width(module: Any, spec: Spec) -> int | None:
    """Of what a module reads; None where its parts do not say."""
    if isinstance(spec, NormSpec):
        return module.weight.shape[0]
    part = getattr(module, spec.q if isinstance(spec, AttentionSpec) else spec.gate)
    return getattr(part, "in_features", None)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What a model computes in: the type of its first frozen floating parameter (packed weights are
    of none)."""
    floating = [p for p in model.parameters() if p.dtype in COMPUTED_IN]
    return next((p.dtype for p in floating if not p.requires_grad), floating[0].dtype)


def _disagreement(module: nn.Module, kind: type, spec: Spec, width: int, dtype: torch.dtype) -> str:
    """Why a fused module is not as good as its original, "" if it is.

    In fp32 results and gradients must be the same; in the compute dtype, as near to those.
    """
    if dtype not in COMPUTED_IN:
        return f"it computes in {dtype}"
    if next(module.parameters()).is_meta:
        return ""  # nothing to compare; a plan takes the forms' word for it
    with in_fp32(module):
        reference = _trial(module, spec, width, torch.float32)
        with _as_fused(module, kind, spec):
            found = _trial(module, spec, width, torch.float32)
    far = max(map(distance, found, reference))
    if far > SAME_FORM:
        return f"its own results differ by {far:.1%} in fp32"
    if dtype == torch.float32:
        return ""
    own = _trial(module, spec, width, dtype)
    with _as_fused(module, kind, spec):
        found = _trial(module, spec, width, dtype)
    for what, fused, before, exact in zip(
        ("results", "gradients"), found, own, reference, strict=True
    ):
        mine, its = typical_distance(fused, exact), typical_distance(before, exact)
        if not as_near(mine, its, dtype):
            return f"fused, its {what} are {mine:.2%} from fp32, its own {its:.2%}"
    return ""


def _trial(module: nn.Module, spec: Spec, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Result and input gradient of a module on random numbers, the same in every dtype."""
    generator = torch.Generator("cpu").manual_seed(0)
    attends = isinstance(spec, AttentionSpec)
    shape = (1, TRIED, width) if attends else (TRIED, width)
    device = next(module.parameters()).device
    x = torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)
    # numbers that 16 bits hold exactly, so that every dtype is given the same ones
    x = x.bfloat16().to(device, dtype)
    call = functools.partial(_attend, module) if attends else module
    with torch.enable_grad():
        given = x.clone().requires_grad_()
        y = call(given)
        weights = torch.linspace(-1, 1, y.numel(), device=device, dtype=torch.float32)
        weights = weights.bfloat16().view_as(y).to(dtype)
        return y.detach(), torch.autograd.grad(y, given, weights)[0]


@contextlib.contextmanager
def _as_fused(module: nn.Module, kind: type, spec: Spec) -> Iterator[None]:
    _fused(module, kind, spec)
    try:
        yield
    finally:
        _revert(module)


def _attend(module: Any, hidden: Tensor) -> Tensor:
    """An attention's result for two rows, at angles of no model."""
    tokens = torch.arange(TRIED, device="cpu", dtype=torch.float32)
    angles = torch.outer(
        tokens, torch.linspace(1, 0.01, module.head_dim // 2, device="cpu", dtype=torch.float32)
    )
    both = torch.cat((angles, angles), 1)[None].to(hidden.device)
    rotation = (both.cos().to(hidden.dtype), both.sin().to(hidden.dtype))
    cu_seqlens = torch.tensor([0, TRIED // 3, TRIED], dtype=torch.int32, device="cpu")
    attention.register()
    config, before = module.config, module.config._attn_implementation
    config._attn_implementation = attention.NAME
    try:
        return module(
            hidden, position_embeddings=rotation, attention_mask=None, cu_seq_lens_q=cu_seqlens
        )[0]
    finally:
        config._attn_implementation = before

"""A model's own norms and MLPs, computed in one pass where they are of a known form.

A module is recognized by the body of its ``forward``: names of arguments, locals and attributes are replaced by
numbers, and the rest is compared by its hash with the forms known here. What is recognized becomes, in place, a
subclass of its own class whose ``forward`` runs the fused operation. Before it stays, one of each kind is run on random
numbers, forward and backward, beside the original; a kind that differs by more than rounding is left as it was. Nothing
is looked up by a model's name, and a model that nothing is known of trains as it always did.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .ops import cpu

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}
"""Relative difference (norm over norm) that a few roundings more or less can cause: four units of the last place.
In fp32 it is the accuracy of the activations' polynomials, with a margin."""


@functools.cache
def normal_form(function: Callable[..., Any]) -> tuple[str, tuple[str, ...]]:
    """The body of a method with numbers for names, and the attributes of ``self`` in the order of their numbers.

    Raises:
        OSError, TypeError: its source is not at hand.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    me, *arguments = [argument.arg for argument in tree.args.args]
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    stored = {
        node.id
        for statement in body
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    names = {name: f"v{i}" for i, name in enumerate(arguments)}
    attributes: dict[str, str] = {}

    class Renamer(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.Name:
            if node.id in names or node.id in stored:
                node.id = names.setdefault(node.id, f"v{len(names)}")
            elif node.id == me:
                node.id = "self"
            return node

        def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
            if isinstance(node.value, ast.Name) and node.value.id == me:
                node.attr = attributes.setdefault(node.attr, f"a{len(attributes)}")
            self.generic_visit(node)
            return node

    return "\n".join(ast.unparse(Renamer().visit(statement)) for statement in body), tuple(attributes)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- norms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormForm:
    """How an RMSNorm rounds (`ops.rms_norm`), and which attribute holds its eps."""

    eps: str
    offset: float
    cast_first: bool


_NORMS: dict[str, tuple[float, bool]] = {
    "f3eb51cb9fe99ac0": (0.0, True),  # Llama's: the quotient is cast, then multiplied
    "3fd67a4923a43db3": (0.0, False),  # gpt-oss's: multiplied, then cast
    "74ceb8cbf8f11c55": (0.0, False),  # the same with the weight in fp32
    "f0d3a1774fc2b09e": (1.0, False),  # Gemma's: 1 + weight, in fp32, with a helper for the quotient
    "c95ba60b59dcaeb0": (0.0, False),  # Moshi's: likewise without the 1
}


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, form: NormForm, eps: float) -> Tensor:
        y, inverse = ops.rms_norm(x, weight, eps, form.offset, form.cast_first)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = form.offset
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        dy, dweight = grads[0], None
        dx = ops.rms_norm_grad(dy, x, weight, inverse, ctx.offset) if ctx.needs_input_grad[0] else None
        if ctx.needs_input_grad[1]:
            each = dy.float() * x.float() * inverse.unsqueeze(-1)
            dweight = each.reshape(-1, each.shape[-1]).sum(0).to(weight.dtype)
        return dx, dweight, None, None


class FusedNorm(nn.Module):
    """A model's RMSNorm in one pass; its class is also a subclass of the original's."""

    weight: nn.Parameter
    form: NormForm

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.weight.dtype:
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        return _Norm.apply(x, self.weight, self.form, getattr(self, self.form.eps))  # pyright: ignore[reportReturnType]


def norm_form(module: nn.Module) -> NormForm | None:
    """The form of an RMSNorm, None if it is not known."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or getattr(module, "bias", None) is not None:
        return None
    try:
        text, names = normal_form(type(module).forward)
        if "_norm" in names:
            helper, names = normal_form(type(module)._norm)  # pyright: ignore[reportAttributeAccessIssue]
            text = f"{text}\n--\n{helper}"
    except (OSError, TypeError, SyntaxError, AttributeError, AssertionError):
        return None
    known = _NORMS.get(_digest(text))
    return None if known is None or not names else NormForm(names[0], *known)


# --- MLPs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MlpForm:
    """Names of an MLP's parts; ``up`` is None where one layer computes both halves, the gate first."""

    gate: str
    up: str | None
    down: str
    activation: str


_MLPS = {
    "34dea4c3151471a2": ("down", "activation", "gate", "up"),  # Llama's
    "acf31888bbcc4c94": ("down", "activation", "gate", "up"),  # the same without a local name
    "c17739aeb6e90d0c": ("gate", "activation", "down"),  # Phi's and GLM's: both halves from one product
}
"""Digest of a form to what its attributes are, in order."""


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ops.gated(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        return *ops.gated_grad(grads[0], gate, up, ctx.activation), None


class FusedMLP(nn.Module):
    """A model's gated MLP, its activation and product in one pass; its class is also a subclass of the original's."""

    form: MlpForm

    def forward(self, x: Tensor) -> Tensor:
        form = self.form
        if form.up is None:
            gate, up = getattr(self, form.gate)(x).chunk(2, -1)
        else:
            gate, up = getattr(self, form.gate)(x), getattr(self, form.up)(x)
        return getattr(self, form.down)(_Gated.apply(gate, up, form.activation))


def activation_name(function: Callable[[Tensor], Tensor]) -> str | None:
    """Which of `ops.ACTIVATIONS` a function computes, judged by its values."""
    x = torch.linspace(-100, 100, 20001, device="cpu", dtype=torch.float32)
    one = torch.ones_like(x)
    try:
        values = function(x)
    except (TypeError, RuntimeError):
        return None
    for name in ops.ACTIVATIONS:
        with cpu.using("torch"):
            expected = ops.gated(x, one, name)
        if values.shape == x.shape and bool(((values - expected).abs() <= 1e-5 * x.abs().clamp(min=1)).all()):
            return name
    return None


def mlp_form(module: nn.Module) -> MlpForm | None:
    """The form of a gated MLP, None if it is not known."""
    try:
        text, names = normal_form(type(module).forward)
    except (OSError, TypeError, SyntaxError, AssertionError):
        return None
    roles = _MLPS.get(_digest(text))
    if roles is None or len(names) != len(roles):
        return None
    found = dict(zip(roles, names, strict=True))
    activation = activation_name(getattr(module, found["activation"]))
    if activation is None:
        return None
    return MlpForm(found["gate"], found.get("up"), found["down"], activation)


# --- on a model -------------------------------------------------------------------------------------------------------


@dataclass
class Fused:
    """What became of a model's modules: counts by kind, and why some were left alone."""

    norms: int = 0
    mlps: int = 0
    left: dict[str, str] = field(default_factory=dict)
    """Class name to reason."""

    def line(self) -> str:
        done = [f"{count} {name}" for count, name in ((self.norms, "norms"), (self.mlps, "MLPs")) if count]
        left = [f"{name} ({why})" for name, why in self.left.items()]
        return f"fused: {', '.join(done) or 'nothing'}" + (f"; left as they are: {', '.join(left)}" if left else "")


_classes: dict[tuple[type, type], type] = {}


def _become(module: nn.Module, kind: type, form: NormForm | MlpForm) -> None:
    own = type(module)
    key = (kind, own)
    if key not in _classes:
        _classes[key] = type(f"Fused{own.__name__}", (kind, own), {})
    module.__class__ = _classes[key]
    module.form = form  # pyright: ignore[reportArgumentType]


def _revert(module: nn.Module) -> None:
    module.__class__ = type(module).__bases__[1]
    del module.form


def fuse(model: nn.Module) -> Fused:
    """Fuse what is known of a model on the CPU, in place; nothing without the C++ library: it would be no faster."""
    result = Fused()
    if not cpu.serves(next(model.parameters())):
        return result
    judged: dict[tuple[Any, ...], bool] = {}
    for module in list(model.modules()):
        own = type(module)
        if isinstance(module, FusedNorm | FusedMLP):
            continue
        form = mlp_form(module) if list(module.children()) else norm_form(module)
        if form is None:
            if "RMSNorm" in own.__name__ or "MLP" in own.__name__:
                result.left.setdefault(own.__name__, "of a form not known here")
            continue
        kind = FusedNorm if isinstance(form, NormForm) else FusedMLP
        width = next(module.parameters()).shape[-1]
        key = (own, form, width)
        if key not in judged:
            judged[key] = _agrees(module, kind, form, width)
        if not judged[key]:
            result.left.setdefault(own.__name__, "its own results differ")
            continue
        _become(module, kind, form)
        result.norms += kind is FusedNorm
        result.mlps += kind is FusedMLP
    return result


def _agrees(module: nn.Module, kind: type, form: NormForm | MlpForm, width: int) -> bool:
    """Whether results and gradients of the fused module are its own, up to rounding."""
    first = next(module.parameters())
    dtype = first.dtype
    if dtype not in TOLERANCE:
        return False
    if first.is_meta:
        return True  # nothing to compare; a plan takes the forms' word for it
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(5, width, generator=generator, device="cpu", dtype=torch.float32).to(dtype)

    def run() -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            given = x.clone().requires_grad_()
            y = module(given)
            weights = torch.linspace(-1, 1, y.numel(), device="cpu", dtype=torch.float32).view_as(y).to(dtype)
            return y.detach(), torch.autograd.grad(y, given, weights)[0]

    expected = run()
    _become(module, kind, form)
    try:
        found = run()
    finally:
        _revert(module)
    return all(_near(mine, theirs, TOLERANCE[dtype]) for mine, theirs in zip(found, expected, strict=True))


def _near(mine: Tensor, theirs: Tensor, tolerance: float) -> bool:
    difference = (mine.float() - theirs.float()).norm()
    return mine.shape == theirs.shape and bool(difference <= tolerance * theirs.float().norm())

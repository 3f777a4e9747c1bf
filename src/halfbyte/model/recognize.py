"""Norms, MLPs and attention of known forms, recognized by the body of their ``forward``.

Names of arguments, locals and attributes are replaced by numbers, and the rest is compared by its
hash with the forms known here. Nothing is looked up by a model's name.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import cpu


@functools.cache
def normalized_source(function: Callable[..., Any]) -> tuple[str, tuple[str, ...]]:
    """The body of a method with numbers for names, and the attributes of ``self`` in the order of
    their numbers.

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

    return "\n".join(ast.unparse(Renamer().visit(statement)) for statement in body), tuple(
        attributes
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- norms ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NormSpec:
    """How an RMSNorm rounds (`ops.rms_norm`), and which attribute holds its eps."""

    eps: str
    offset: float
    cast_first: bool


# Gemma's: 1 + weight, in fp32, with a helper for the quotient
_NORMS: dict[str, tuple[float, bool]] = {
    "f3eb51cb9fe99ac0": (0.0, True),  # Llama's: the quotient is cast, then multiplied
    "3fd67a4923a43db3": (0.0, False),  # gpt-oss's: multiplied, then cast
    "74ceb8cbf8f11c55": (0.0, False),  # the same with the weight in fp32
    "f0d3a1774fc2b09e": (
        1.0,
        False,
    ),
    "c95ba60b59dcaeb0": (0.0, False),  # Moshi's: likewise without the 1
}


def norm_spec(module: nn.Module) -> NormSpec | None:
    """The form of an RMSNorm, None if it is not known."""
    weight = getattr(module, "weight", None)
    if (
        not isinstance(weight, Tensor)
        or weight.dim() != 1
        or getattr(module, "bias", None) is not None
    ):
        return None
    try:
        text, names = normalized_source(type(module).forward)
        if "_norm" in names:
            helper, names = normalized_source(type(module)._norm)  # pyright: ignore[reportAttributeAccessIssue]
            text = f"{text}\n--\n{helper}"
    except (OSError, TypeError, SyntaxError, AttributeError, AssertionError):
        return None
    known = _NORMS.get(_digest(text))
    return None if known is None or not names else NormSpec(names[0], *known)


# --- MLPs -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MlpSpec:
    """Names of an MLP's parts; ``up`` is None where one layer computes both halves, the gate
    first. act: the part that is the activation; activation: what that computes."""

    gate: str
    up: str | None
    down: str
    act: str
    activation: str


# Phi's and GLM's: both halves from one product
_MLPS = {
    "34dea4c3151471a2": ("down", "activation", "gate", "up"),  # Llama's
    "acf31888bbcc4c94": ("down", "activation", "gate", "up"),  # the same without a local name
    "c17739aeb6e90d0c": (
        "gate",
        "activation",
        "down",
    ),
}
"""Digest of a form to what its attributes are, in order."""


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
        if values.shape == x.shape and bool(
            ((values - expected).abs() <= 1e-5 * x.abs().clamp(min=1)).all()
        ):
            return name
    return None


def mlp_spec(module: nn.Module) -> MlpSpec | None:
    """The form of a gated MLP, None if it is not known."""
    try:
        text, names = normalized_source(type(module).forward)
    except (OSError, TypeError, SyntaxError, AssertionError):
        return None
    roles = _MLPS.get(_digest(text))
    if roles is None or len(names) != len(roles):
        return None
    found = dict(zip(roles, names, strict=True))
    activation = activation_name(getattr(module, found["activation"]))
    if activation is None:
        return None
    return MlpSpec(found["gate"], found.get("up"), found["down"], found["activation"], activation)


# --- attention ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionSpec:
    """Names of an attention's parts (`_ATTENTIONS`); norms are None where there are none."""

    q: str
    k: str
    v: str
    o: str
    q_norm: str | None
    k_norm: str | None
    scaling: str
    window: str
    """The attribute with the sliding window, "config" if it is the configuration's, "" if there is
    none."""


_PLAIN = ("dim", "q", "k", "v", "layer", "config", "training", "dropout", "scaling", "o")
_WINDOWED = (*_PLAIN[:-1], "window", "o")
_ATTENTIONS = {
    "f127e6b176ce868b": (_PLAIN, ""),  # Llama's
    "2cfedf801caa4409": (_PLAIN, "config"),  # Mistral's
    "2c9ff5c53edaef9b": (_WINDOWED, ""),  # Qwen2's
    "092dbd71a8ad9b70": (("dim", "q_norm", "q", "k_norm", "k", "v", *_WINDOWED[4:]), ""),  # Qwen3's
}
"""Digest of a form to what its attributes are, in order, and whether the configuration has the
window."""
_ROTATIONS = {("301644f6e15c52c4", "80dd76d885763d92")}
"""Digests of ``apply_rotary_pos_emb`` and ``rotate_half`` beside an attention which do what
`ops.rotate` does."""


def attention_spec(module: nn.Module) -> AttentionSpec | None:
    """The form of an attention with rotary embedding, None if it is not known."""
    forward = type(module).forward
    try:
        text, names = normalized_source(forward)
        around = forward.__globals__
        beside = [
            _digest(normalized_source(around[name])[0])
            for name in ("apply_rotary_pos_emb", "rotate_half")
        ]
    except (OSError, TypeError, SyntaxError, AttributeError, AssertionError, KeyError):
        return None
    known = _ATTENTIONS.get(_digest(text))
    if known is None or len(names) != len(known[0]) or tuple(beside) not in _ROTATIONS:
        return None
    roles, window = known
    found = dict(zip(roles, names, strict=True))
    if (found["dim"], found["config"], found["dropout"]) != (
        "head_dim",
        "config",
        "attention_dropout",
    ):
        return None
    return AttentionSpec(
        *(found["q"], found["k"], found["v"], found["o"]),
        *(found.get("q_norm"), found.get("k_norm")),
        *(found["scaling"], found.get("window") or window),
    )


def is_function_of(function: Any, module: str, name: str) -> bool:
    """Whether a function is the one that a module defines by this name; not what a package put in
    its place, nor what wraps it, but for transformers' own word that an argument is going."""
    while getattr(function, "__globals__", {}).get("__name__") == "transformers.utils.deprecation":
        function = getattr(function, "__wrapped__", None)
    code, around = getattr(function, "__code__", None), getattr(function, "__globals__", {})
    return code is not None and code.co_name == name and around.get("__name__") == module


Spec = NormSpec | MlpSpec | AttentionSpec


def spec_of(module: nn.Module) -> Spec | None:
    """What a module is, if it is of a form that is fused here."""
    return (
        (mlp_spec(module) or attention_spec(module))
        if list(module.children())
        else norm_spec(module)
    )

"""A module as it computes in fp32: what roundings are judged by.

Two ways of computing the same in 16 bits differ by the roundings of both, and on real weights that
can be percent. Whether a faster way is as good is told by its distance to fp32 beside the
original's own.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

ALLOWANCE = 1.5
"""Times the original's distance to fp32 that another way may have."""
ONE_ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Largest relative difference that rounding a result once can cause."""


@contextlib.contextmanager
def in_fp32(module: nn.Module) -> Iterator[None]:
    """Within this block a module computes in fp32; 4-bit weights stay as they are stored."""
    before: list[tuple[nn.Module, str, Any]] = []
    computes: list[tuple[Any, str, Any]] = []
    try:
        part: Any
        for part in module.modules():
            for name, p in part._parameters.items():
                if p is not None and (wide := _wide(p)) is not p:
                    before.append((part, name, p))
                    part._parameters[name] = wide
            # of bitsandbytes' layers, and of modules that are trained whole
            for name in ("compute_dtype", "computes_in"):
                if (own := getattr(part, name, None)) is not None:
                    computes.append((part, name, own))
                    setattr(part, name, torch.float32)
        yield
    finally:
        for part, name, p in before:
            part._parameters[name] = p
        for part, name, own in computes:
            setattr(part, name, own)


def _wide(p: nn.Parameter) -> nn.Parameter:
    data: Any = p if hasattr(p, "with_dtype") else p.data
    if hasattr(data, "with_dtype"):
        return nn.Parameter(data.with_dtype(torch.float32), requires_grad=False)
    if p.dtype in (torch.bfloat16, torch.float16):
        return nn.Parameter(p.data.float(), requires_grad=False)
    return p


@contextlib.contextmanager
def model_in_fp32(model: nn.Module) -> Iterator[None]:
    """Within this block a model computes in fp32, each layer widened when it is reached and no
    longer: what it takes beside the model is one layer in fp32."""

    def widen(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out.float()

    tables, others = [], []
    for module in parts(model):
        (tables if isinstance(module, nn.Embedding) else others).append(module)
    # of a table, what is looked up and not the whole
    hooks = [table.register_forward_hook(widen) for table in tables]
    try:
        with around_calls(others, in_fp32):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def around_calls(
    modules: Iterable[nn.Module],
    within: Callable[[nn.Module], contextlib.AbstractContextManager[None]],
) -> Iterator[None]:
    """Within this block each call of one of the modules runs in the context made for it; what was
    entered last is left first, in a module's own calls of others and where blocks are nested."""
    entered: list[contextlib.AbstractContextManager[None]] = []
    hooks: list[Any] = []

    def enter(module: nn.Module, *given: Any) -> None:
        context = within(module)
        context.__enter__()
        entered.append(context)

    def leave(*given: Any) -> None:
        entered.pop().__exit__(None, None, None)

    try:
        for module in modules:
            hooks.append(module.register_forward_pre_hook(enter))
            hooks.append(module.register_forward_hook(leave, prepend=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        while entered:  # a call that failed
            leave()


def parts(model: nn.Module) -> Iterator[nn.Module]:
    """The layers of a model, and outside of these the modules that hold parameters of their own."""
    layers = {
        layer
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
        for layer in stack
        if any(True for _ in layer.parameters())
    }
    inside = {part for layer in layers for part in layer.modules() if part is not layer}
    for module in model.modules():
        if module not in inside and (module in layers or module._parameters):
            yield module


def distance(found: Tensor, reference: Tensor) -> float:
    """Relative difference, norm over norm; infinite where the shapes differ or a value is not
    finite."""
    if found.shape != reference.shape:
        return float("inf")
    wide = reference.detach().float()
    value = float((found.detach().float() - wide).norm() / wide.norm().clamp(min=1e-30))
    return value if value == value else float("inf")


def typical_distance(found: Tensor, reference: Tensor) -> float:
    """Median over tokens [.., d] of the relative difference.

    On real weights a softmax that saturates makes some tokens' differences a hundred times the
    others'; which ones is a matter of luck, and a norm over all tells nothing but that.
    """
    if found.shape != reference.shape:
        return float("inf")
    wide = reference.detach().float()
    each = (found.detach().float() - wide).norm(dim=-1) / wide.norm(dim=-1).clamp(min=1e-30)
    return float(each.nan_to_num(float("inf")).median())


def as_near(mine: float, own: float, dtype: torch.dtype) -> bool:
    """Whether a distance to fp32 is as small as the original's own, up to `ALLOWANCE` and one
    rounding."""
    return mine <= max(ALLOWANCE * own, ONE_ROUNDING[dtype])

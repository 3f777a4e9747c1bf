"""Layers that a trainer checkpoints, run again with a tape of what they keep."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.utils.checkpoint import checkpoint

from ..engine.selftest import perturb_zeros, trial_gradients
from ..memory.process import UNASKED_SHARE, headroom
from ..memory.recompute import KEEPS, ActivationTape, Keep, Playback
from ..model import fusion
from ..model.class_swap import is_wrapped, swap_class
from .layers import OptimizedLora


class CheckpointedLayer(nn.Module):
    """A decoder layer which, where a trainer has it checkpointed, is run again with a tape of what
    it keeps (`memory.recompute`), by PyTorch's own checkpointing: whatever goes with that (DDP,
    several inputs and outputs, frozen ones) goes with this."""

    again: "_Again"
    number: int

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        return self._run

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Any) -> None:
        """Whatever a trainer would have run the layer by is not needed."""

    @_disable_dynamo  # it cannot trace what a tape does, and the layer's operations are not its own
    def _run(self, function: Callable[..., Any], *given: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*given)
        # what was found out about the layer's last product holds for modules that only do what they
        # did then
        plain = all(not m._forward_hooks and _is_plain(m) for m in self.modules())
        tape, state = self.again.tape(self.number, given[0]), _adapters_of(self)

        def blocks() -> tuple[Any, Any]:
            return self.again.recording(tape, plain), _Replaying(self, tape, state)

        return checkpoint(
            function, *given, use_reentrant=False, preserve_rng_state=True, context_fn=blocks
        )


class _Replaying:
    """Within this block a layer is run again for its gradients; of a graph that is kept, each
    time."""

    def __init__(self, layer: nn.Module, tape: ActivationTape, before: Any) -> None:
        self.layer, self.before = layer, before
        self.tape: ActivationTape | None = tape

    def __enter__(self) -> None:
        if _adapters_of(self.layer) != self.before:
            raise RuntimeError(
                "adapters were switched, merged or disabled between a layer's forward and its "
                "backward pass, for which it is run again: the gradients would be another model's"
            )
        self.block, self.tape = Playback(self.tape), None  # a tape is played once
        self.block.__enter__()

    def __exit__(self, *error: object) -> None:
        self.block.__exit__(*error)


def _adapters_of(layer: nn.Module) -> Any:
    """Which adapters a layer computes with; of its first adapted one, since PEFT switches all."""
    first: Any = next((m for m in layer.modules() if isinstance(m, OptimizedLora)), None)
    return first and (tuple(first.active_adapters), first.disable_adapters, first.merged)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's output is no more than it was when its layer was tried."""
    if is_wrapped(module):
        return False
    if isinstance(module, OptimizedLora):
        return module.is_ordinary
    return not (type(module).__module__.startswith("peft.") and hasattr(module, "base_layer"))


class _Again:
    """What the layers of a model keep, decided at the first of them."""

    def __init__(self, keep: str, bytes_per_token: int) -> None:
        self.keep, self.bytes_per_token = keep, bytes_per_token
        self.skips = True
        self.now: Keep = "none"

    def tape(self, number: int, hidden: Tensor) -> ActivationTape:
        """For the layer of this number."""
        if number == 0:
            self.now = self._choose(hidden)
        return ActivationTape(self.now)

    @contextlib.contextmanager
    def recording(self, tape: ActivationTape, plain: bool) -> Iterator[None]:
        """Within this block a layer runs for the first time. plain: its last product may be left
        out when it is run again."""
        with Playback(tape):
            yield
        # if a result that is skipped did matter, it would show
        tape.recorded(self.skips and plain, math.nan)

    def _choose(self, hidden: Tensor) -> Keep:
        """With auto: everything where it takes no more than half of the memory that is free."""
        if self.keep != "auto":
            return next(keep for keep in KEEPS if keep == self.keep)
        left = headroom(hidden.device)
        needed = self.bytes_per_token * hidden.numel() // hidden.shape[-1]
        return "all" if left is not None and needed <= left * UNASKED_SHARE else "none"


def checkpoint_with_tapes(inner: Any, keep: str) -> str:
    """Have checkpointed layers run with tapes, if that gives the same gradients; a line for
    people."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [
        module for module in inner.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if layers and isinstance(layers[0], CheckpointedLayer):  # optimized before
        layers[0].again.keep = keep
        return ""
    if not layers or not getattr(inner, "supports_gradient_checkpointing", True):
        return "layers that are checkpointed are left to PyTorch: they take no other function"
    outputs = sum(_output_widths(layers))
    again = _Again("none", fusion.compute_dtype(inner).itemsize * outputs)
    before = [dict(layer.__dict__) for layer in layers]
    classes = [type(layer) for layer in layers]
    with perturb_zeros(inner):
        for layer in layers:
            layer.gradient_checkpointing = False
        expected = trial_gradients(inner, packing=False)
        for number, layer in enumerate(layers):
            layer.__dict__.pop("_gradient_checkpointing_func", None)
            swap_class(layer, CheckpointedLayer)
            layer.__dict__.update(again=again, number=number, gradient_checkpointing=True)
        same = expected is not None and trial_gradients(inner, packing=False) == expected
        if expected is not None and not same:
            again.skips = False
            same = trial_gradients(inner, packing=False) == expected
    for layer, own, attributes in zip(layers, classes, before, strict=True):
        layer.__dict__.pop("gradient_checkpointing", None)
        if not same:
            layer.__class__ = own
            layer.__dict__.pop("again"), layer.__dict__.pop("number")
        kept = ("gradient_checkpointing", "_gradient_checkpointing_func")[: 1 if same else 2]
        layer.__dict__.update({name: attributes[name] for name in kept if name in attributes})
    if not same:
        return "layers that are checkpointed are left to PyTorch: run here, gradients differ"
    again.keep = keep
    return (
        "layers that are checkpointed keep their "
        f"input{'' if keep == 'none' else f' (kept_activations {keep})'}"
    )


def _output_widths(layers: list[Any]) -> Iterator[int]:
    """Of the products whose results layers may keep."""
    modules = [m for layer in layers for m in layer.modules()]
    inside = {
        id(inner)
        for m in modules
        if isinstance(m, OptimizedLora)
        for inner in m.modules()
        if inner is not m
    }
    chosen: list[Any] = [
        m for m in modules if isinstance(m, nn.Linear | OptimizedLora) and id(m) not in inside
    ]
    yield from (m.out_features for m in chosen)

"""What a decoder layer keeps for its backward pass, and what it computes a second time.

A layer keeps its input and computes the rest again (Chen et al. 2016, arXiv:1604.06174). Some of
the rest is dear: the products with the 4-bit weights and attention. Their results can be kept too,
so that only norms, activations and rotations are computed twice:

    none       the layer's input; everything is computed twice
    attention  also the results of the products before attention, and of attention where it is
               fused (`ops.attention`); nothing in a layer that has no attention
    mlp_in     also the result of the first product after attention: what the MLP reads then
               costs a norm
    all        the results of all products

The last product of a layer is never computed twice where nothing but the layer's output depends on
it. Results are the same bits whichever is chosen: the same operations run on the same numbers.

While a layer runs, its products and its attention ask here (`product`, `attention_result`) whether
their result is at hand. A layer is run by the function that transformers calls for a checkpointed
layer, once to record and once to replay: `Recompute` in a training of ours, whose inputs can wait
elsewhere; PyTorch's own checkpointing, with a tape, in other people's (`integrations.optimize`).
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ModelError
from ..ledger import Part, counted_as
from ..ops import dequantized
from ..ops.library import first_order
from .offload import OffloadPool

Keep = Literal["none", "attention", "mlp_in", "all"]
KEEPS: tuple[Keep, ...] = get_args(Keep)
Result = TypeVar("Result", Tensor, tuple[Tensor, Tensor])


class Skipped:
    """In place of a result of which only the shape matters."""

    def __init__(self, like: Tensor, fill: float | None) -> None:
        self.shape, self.dtype, self.device, self.fill = like.shape, like.dtype, like.device, fill

    def tensor(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return out if self.fill is None else out.fill_(self.fill)


class ActivationTape:
    """Results of one layer in the order in which they were computed; None where one was not
    kept."""

    def __init__(self, keep: Keep) -> None:
        self.level = KEEPS.index(keep)
        self.results: list[Any] = []
        self.versions: list[tuple[int, ...]] = []
        self.remembered: list[Tensor] = []
        self.levels: list[int] = []  # the least level at which each is kept
        self.replaying = False
        self.after_attention = -1  # products since attention, or -1 before it
        self.last_product: tuple[int, Tensor] | None = None

    def take(self, compute: Callable[[], Any], is_product: bool) -> Any:
        if self.replaying:
            if not self.results:
                raise ModelError(
                    "a layer computed more products when it was run again than the first time"
                )
            result, version = self.results.pop(0), self.versions.pop(0)
            if isinstance(result, Skipped):
                return result.tensor()
            # what was changed in place since is not the result any more
            return compute() if result is None or _versions(result) != version else result
        level = (
            3
            if is_product and self.after_attention > 0
            else 2
            if is_product and self.after_attention == 0
            else 1
        )
        with counted_as(Part.KEPT_ACTIVATIONS) if self.level >= level else contextlib.nullcontext():
            result = compute()
        self.results.append(result if self.level >= level else None)
        self.versions.append(_versions(result))
        self.levels.append(level)
        if is_product:
            self.last_product = (len(self.results) - 1, result)
            if self.after_attention >= 0:
                self.after_attention += 1
        else:
            self.after_attention = 0
        return result

    def recorded(self, skip_last: bool, fill: float | None) -> bool:
        """The layer has run; it is played back from the first product on. Returns whether one will
        be skipped."""
        if self.after_attention < 0 and self.level < KEEPS.index("all"):
            # no attention, so nothing lies before it
            self.results = [None] * len(self.results)
        skipping = skip_last and self.last_product is not None
        if skipping and self.last_product is not None:
            position, result = self.last_product
            self.results[position] = Skipped(result, fill)
        self.last_product, self.replaying = None, True
        return skipping


def _versions(result: Any) -> tuple[int, ...]:
    """How often each tensor of a result was changed in place."""
    return tuple(t._version for t in (result if isinstance(result, tuple) else (result,)))


_running = threading.local()


def product(compute: Callable[[], Tensor]) -> Tensor:
    """The result of a product with a weight, computed or at hand."""
    tape: ActivationTape | None = getattr(_running, "tape", None)
    return compute() if tape is None else tape.take(compute, True)


def attention_result(compute: Callable[[], Result]) -> Result:
    """The result of attention, computed or at hand."""
    tape: ActivationTape | None = getattr(_running, "tape", None)
    return compute() if tape is None else tape.take(compute, False)


def as_one_product(compute: Callable[[], Tensor]) -> Tensor:
    """The result of several products of which one alone leaves what it gives, computed or at
    hand."""

    def apart() -> Tensor:
        with Playback(None):
            return compute()

    return product(apart)


def remember(compute: Callable[[], Tensor]) -> Tensor:
    """A small result that is kept whatever else is, computed or at hand."""
    tape: ActivationTape | None = getattr(_running, "tape", None)
    if tape is None:
        return compute()
    if tape.replaying:
        return tape.remembered.pop(0)
    tape.remembered.append(compute())
    return tape.remembered[-1]


def pass_attention() -> None:
    """Attention happens here, but its result cannot be kept."""
    tape: ActivationTape | None = getattr(_running, "tape", None)
    if tape is not None and not tape.replaying:
        tape.after_attention = 0


class Playback:
    """Within this block products and attention go by the tape (None: by none, each is computed)."""

    def __init__(self, tape: ActivationTape | None) -> None:
        self.tape = tape

    def __enter__(self) -> None:
        self.before = getattr(_running, "tape", None)
        _running.tape = self.tape

    def __exit__(self, *error: object) -> None:
        _running.tape = self.before


class Recompute:
    """Runs the checkpointed layers of a model.

    Args:
        keep: what layers keep beside their input.
        layers: their number.
        kept_layers: that many keep it, the last ones, whose backward passes come first; the others
            keep their input alone. Negative: all.
        away: directory of the file that inputs wait in (on a GPU: pinned host memory); None: they
            wait where the model computes.
    """

    def __init__(
        self,
        keep: Keep = "none",
        layers: int = 0,
        kept_layers: int = -1,
        away: Path | None = None,
    ) -> None:
        self.keep: Keep = keep if kept_layers else "none"
        self.layers = layers
        self.kept_layers = min(kept_layers, layers) if kept_layers >= 0 else layers
        if self.keep == "none":
            self.kept_layers = 0
        self.inputs = OffloadPool(layers, away)
        self.skip_last = False
        self.skipped = False
        self.fill: float | None = (
            None  # what a skipped result holds; a test puts NaN in, to see whether it matters
        )

    def keep_nothing(self) -> None:
        """Keep nothing but inputs; takes effect when the layers are given what runs them again."""
        self.keep, self.kept_layers = "none", 0

    def layer(self, number: int) -> Callable[..., Tensor]:
        """What runs layer ``number``: `transformers` calls it as ``run(function, hidden_states,
        *others)``."""
        keeps = number >= self.layers - self.kept_layers
        return functools.partial(self.run, self.keep if keeps else "none")

    def run(
        self, keep: Keep, function: Callable[..., Tensor], hidden: Tensor, *others: Any
    ) -> Tensor:
        """A layer's result; what ``keep`` says is kept of it."""
        if not torch.is_grad_enabled():
            return function(hidden, *others)
        call = _Call(function, others)
        # the adapters inside need gradients even where the layer's input does not: the first
        # layer's
        trigger = torch.empty(0, requires_grad=True)
        return _Layer.apply(self, keep, call, trigger, hidden, *call.differentiable())  # pyright: ignore[reportReturnType]


class _Call:
    """What a layer is called with beside its input."""

    def __init__(self, function: Callable[..., Any], others: tuple[Any, ...]) -> None:
        self.function = getattr(function, "func", function)
        own = getattr(function, "args", ()), getattr(function, "keywords", {})
        self.leaves, self.form = pytree.tree_flatten((*own, others))
        self.places = [
            i for i, v in enumerate(self.leaves) if isinstance(v, Tensor) and v.requires_grad
        ]

    def differentiable(self) -> list[Tensor]:
        """The tensors among them that need gradients, as embeddings for each layer do."""
        return [self.leaves[i] for i in self.places]

    def __call__(self, hidden: Tensor, differentiable: Sequence[Tensor]) -> Any:
        leaves = list(self.leaves)
        for i, tensor in zip(self.places, differentiable, strict=True):
            leaves[i] = tensor
        before, keywords, others = pytree.tree_unflatten(leaves, self.form)
        return self.function(*before, hidden, *others, **keywords)


class _Layer(torch.autograd.Function):
    """One layer: run without a graph, run again with one when its gradient is asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Recompute,
        keep: Keep,
        call: _Call,
        trigger: Tensor,
        hidden: Tensor,
        *differentiable: Tensor,
    ) -> Any:
        ctx.set_materialize_grads(False)
        ctx.tape = ActivationTape(keep)
        with Playback(ctx.tape):
            out = call(hidden, differentiable)
        # some families' layers give a tuple: the hidden states, and what was asked for beside them
        if not isinstance(out, Tensor) and type(out) is not tuple:
            raise ModelError(f"a layer returns {type(out).__name__}, not tensors")
        run.skipped |= ctx.tape.recorded(run.skip_last, run.fill)
        ctx.input, ctx.call = run.inputs.put(hidden), call
        ctx.differentiable = [t.detach() for t in differentiable]
        return out

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if ctx.input is None:
            raise ModelError(
                "a layer that is run again for its gradients has one backward pass, not two "
                "(retain_graph)"
            )
        needed = ctx.needs_input_grad[4:]
        hidden = ctx.input.take().detach()
        given = [
            t.requires_grad_(need)
            for t, need in zip([hidden, *ctx.differentiable], needed, strict=True)
        ]
        with dequantized.layer():
            with torch.enable_grad(), Playback(ctx.tape):
                out = ctx.call(given[0], given[1:])
            ctx.tape = ctx.call = ctx.differentiable = None
            outs = out if isinstance(out, tuple) else (out,)
            pairs = [
                (o, g)
                for o, g in zip(outs, grads, strict=True)
                if g is not None and isinstance(o, Tensor) and o.requires_grad
            ]
            if pairs:
                torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        ctx.input = None  # its place may be taken from here on
        return None, None, None, None, *(t.grad for t in given)


def recompute_layers(model: Any, run: Recompute | None) -> int:
    """Have every layer that transformers can checkpoint run by ``run`` (None: by no one, all is
    kept). Their number."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [
        module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = run is not None
        if run is not None:
            object.__setattr__(layer, "_gradient_checkpointing_func", run.layer(number))
    return len(layers)

"""LoRA on a linear layer whose base is frozen, in 4 bits or 16 (Hu et al. 2021, arXiv:2106.09685).

    y = x W^T + b + s * drop(x) A^T B^T
    A: [r, in], B: [out, r], s = alpha / r (rsLoRA: alpha / sqrt(r))

One autograd function computes both branches, so that only x, u,
the rounded A and B and the 4-bit weight are kept for the backward pass:

    u  = drop(x) A^T                       [.., r]
    du = dy (s B)                          [.., r]
    dB = s * dy^T u,   dA = du^T drop(x),   dx = dy W + drop^T(du A)

The dropout mask is a function of (seed, step, micro-batch, layer) (`ops.Dropout`): it is
recomputed, never stored, and the factor 1 / (1 - p) is folded into s, and s into B before B is
rounded. A and B are fp32 masters; products run in the dtype of x, and the adapter's term joins the
base's before the sum is rounded.

DoRA (Liu et al. 2024, arXiv:2402.09353) scales each output to a trained magnitude m: y = (m / n) *
(x W^T + s drop(x) A^T B^T) + b, where n, which takes no gradient, holds the norms of the rows of W
+ s B A. They are found without that matrix: n^2 = |W|^2 + 2 s B . (A W^T)^T + s^2 B A A^T . B, row
by row, which costs a product with r tokens. With dropout PEFT drops the base's input in the changed
part, too; here it is the adapter's alone, as in LoRA.

`LoraLinear` is a `torch.nn.Linear` with two more parameters, made in place from one: the model
keeps its module names and the checkpoint keeps its tensor names. Files are PEFT's (`adapter`). The
road not taken is a wrapper module, which renames every weight below it.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import ops
from ..errors import UsageError
from ..memory import recompute
from ..model.experts import Expert, OtherExpert, fused_parameter
from ..model.targets import adaptable, experts, targets
from ..model.wrappers import other_class
from ..ops.library import first_order
from ..quantization.tensor import NF4Tensor

_Number = TypeVar("_Number", int, float)

MERGED_AT_ONCE = 1 << 22
"""Weights that are added to in fp64 at a time."""


@dataclass
class DropoutClock:
    """The counters every mask of a model is a function of; the training loop sets them, the layers
    read them."""

    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    first: int = 0
    """Token of the micro-batch that what is computed now begins with."""


@dataclass(frozen=True)
class AdapterConfig:
    """What describes an adapter, apart from its weights.

    rank_pattern, alpha_pattern: other r and alpha for the layers whose path, or its end after a
    dot, matches the regular expression, as in PEFT; the first that does.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_dora: bool = False

    def of(self, name: str) -> "AdapterConfig":
        """What holds for one layer, by its path."""
        r, alpha = (
            _by_pattern(self.rank_pattern, name, self.r),
            _by_pattern(self.alpha_pattern, name, self.alpha),
        )
        return replace(self, r=r, alpha=alpha, rank_pattern={}, alpha_pattern={})

    @property
    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.r) if self.use_rslora else self.alpha / self.r


def _by_pattern(patterns: Mapping[str, _Number], name: str, default: _Number) -> _Number:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


class LoraLinear(nn.Linear):
    """A linear layer with an adapter. Made by `from_linear`; has ``lora_A`` [r, in] and ``lora_B``
    [out, r] in fp32.

    With DoRA also ``lora_magnitude_vector`` [out] in fp32, else None; and ``weight_squares`` [out],
    the squared norms of the weight's rows.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter | None
    weight_squares: Tensor
    adapter: AdapterConfig
    layer_index: int
    clock: DropoutClock

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        adapter: AdapterConfig,
        layer_index: int,
        clock: DropoutClock,
        generator: torch.Generator,
    ) -> "LoraLinear":
        """Turn a linear layer into this class in place; A is Kaiming-uniform (PEFT's choice), B
        zero."""
        device = linear.weight.device
        bound = 1 / math.sqrt(linear.in_features)
        fp32: Any = {"dtype": torch.float32}
        where = "meta" if device.type == "meta" else "cpu"
        a = torch.empty(adapter.r, linear.in_features, device=where, **fp32)
        if not a.is_meta:
            a.uniform_(-bound, bound, generator=generator)
        linear.__class__ = cls
        assert isinstance(linear, LoraLinear)
        linear.lora_A = nn.Parameter(a.to(device))
        linear.lora_B = nn.Parameter(
            torch.zeros(linear.out_features, adapter.r, device=device, **fp32)
        )
        linear.adapter, linear.layer_index, linear.clock = adapter, layer_index, clock
        linear.lora_magnitude_vector, linear._norms = None, None
        if adapter.use_dora:
            squares = linear._squares()
            linear.register_buffer("weight_squares", squares, persistent=False)
            linear.lora_magnitude_vector = nn.Parameter(squares.sqrt())
        return linear

    def forward(self, input: Tensor) -> Tensor:
        bias = self.bias if self.lora_magnitude_vector is None else None
        y = lora_linear(
            input,
            self.weight,
            bias,
            self.lora_A,
            self.lora_B,
            self.adapter.scaling,
            self._dropout(),
        )
        if self.lora_magnitude_vector is None:
            return y
        norms = recompute.remember(self.norms) if self.training else self._norms_at_rest()
        y = (y * (self.lora_magnitude_vector / norms)).to(y.dtype)
        return y if self.bias is None else y + self.bias

    def trained(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters, by their names in PEFT's files."""
        found = {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}
        if self.lora_magnitude_vector is not None:
            found["lora_magnitude_vector"] = self.lora_magnitude_vector
        return found

    @torch.no_grad()
    def _squares(self) -> Tensor:
        if self.weight.is_meta:
            return torch.empty(self.out_features, dtype=torch.float32, device="meta")
        return torch.cat([rows.float().square().sum(1) for rows in self.base_weight().split(1024)])

    @torch.no_grad()
    def norms(self) -> Tensor:
        """Norms of the rows of W + s B A, fp32 [out]."""
        a, b, s = self.lora_A, self.lora_B, self.adapter.scaling
        if isinstance(self.weight, NF4Tensor):
            aw = ops.linear_4bit(a, self.weight.parts, self.out_features)
        else:
            aw = functional.linear(a.to(self.weight.dtype), self.weight).float()
        squares = (
            self.weight_squares
            + 2 * s * (b * aw.t()).sum(1)
            + s * s * ((b @ (a @ a.t())) * b).sum(1)
        )
        return squares.clamp(min=1e-30).sqrt()

    _norms: tuple[tuple[int, int], Tensor] | None

    def _norms_at_rest(self) -> Tensor:
        """`norms`, computed once as long as nothing is trained."""
        versions = (self.lora_A._version, self.lora_B._version)
        if self._norms is None or self._norms[0] != versions:
            with torch.inference_mode(False):  # what is kept has to serve training, too
                self._norms = (versions, self.norms())
        return self._norms[1]

    def train(self, mode: bool = True) -> "LoraLinear":
        self._norms = None
        return super().train(mode)

    def _dropout(self) -> ops.Dropout:
        if not self.training or not self.adapter.dropout:
            return ops.NO_DROPOUT
        threshold, clock = ops.drop_threshold(self.adapter.dropout), self.clock
        first = clock.first * self.in_features
        return ops.Dropout(
            threshold, clock.seed, clock.step, clock.micro_batch, self.layer_index, first
        )

    def merged(self, weight: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the adapter makes of a weight, [out, in]: W + s B A, with DoRA its rows of the
        trained norms; computed in fp64 and rounded once."""
        a, b = (p.detach().to(weight.device).double() for p in (self.lora_A, self.lora_B))
        magnitude = self.lora_magnitude_vector
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        rows = max(1, MERGED_AT_ONCE // weight.shape[1])
        for start in range(0, weight.shape[0], rows):
            here = slice(start, start + rows)
            total = weight[here].double() + (b[here] @ a) * self.adapter.scaling
            if magnitude is not None:
                norms = total.norm(dim=1).clamp(min=1e-15)
                total *= (magnitude.detach().to(weight.device)[here] / norms).unsqueeze(1)
            out[here] = total
        return out

    def base_weight(self) -> Tensor:
        """The frozen weight as an ordinary tensor."""
        return (
            self.weight.dequantize() if isinstance(self.weight, NF4Tensor) else self.weight.detach()
        )


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout: ops.Dropout,
) -> Tensor:
    """x W^T + bias + scaling * drop(x) a^T b^T, [.., out], with gradients for all but the weight.

    Args:
        x: [.., in].
        weight: [out, in], an `NF4Tensor` or a frozen one in the type of x.
        a: [r, in].
        b: [out, r].
    """
    return _LoraLinear.apply(x, weight, bias, a, b, scaling, dropout)  # pyright: ignore[reportReturnType]


class _LoraLinear(torch.autograd.Function):
    """Both branches at once; the argument at the top of this file is its derivation."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scaling: float,
        dropout: ops.Dropout,
    ) -> Tensor:
        scale = scaling * ops.DROPOUT_RESOLUTION / (ops.DROPOUT_RESOLUTION - dropout.threshold)
        narrow_a, narrow_b = a.to(x.dtype), (b * scale).to(x.dtype)
        u = ops.lora_input(x, narrow_a, dropout)
        ctx.save_for_backward(x, u, narrow_a, narrow_b)
        ctx.weight, ctx.scale, ctx.dropout = weight, scale, dropout
        return recompute.product(lambda: _product(x, weight, bias, u, narrow_b))

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, u, a, b = ctx.saved_tensors
        (dy,) = grads
        du, da, db = ops.lora_grads(dy, x, u, b, ctx.scale, ctx.dropout)
        dx = _input_grad(dy, ctx.weight, du, a, ctx.dropout) if ctx.needs_input_grad[0] else None
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, da, db, None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, u: Tensor, b: Tensor) -> Tensor:
    """x W^T + bias + u b^T."""
    if isinstance(weight, NF4Tensor):
        return ops.linear_4bit(x, weight.parts, weight.shape[0], bias, u, b)
    y = functional.linear(x, weight, bias)
    y.view(-1, y.shape[-1]).addmm_(u.reshape(-1, u.shape[-1]), b.t())
    return y


def _input_grad(dy: Tensor, weight: Tensor, du: Tensor, a: Tensor, dropout: ops.Dropout) -> Tensor:
    """dy W + drop(du a)."""
    if isinstance(weight, NF4Tensor):
        return ops.linear_4bit_input_grad(dy, weight.parts, weight.shape[1], du, a, dropout)
    return ops.add_low_rank(dy @ weight, du, a, dropout)


# --- on a model -----------------------------------------------------------------------------------


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(path, layer) of every adapted layer, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


def has_adapter(model: nn.Module) -> bool:
    """Return True if any layer of the model is adapted."""
    return next(lora_layers(model), None) is not None


def target_names(model: Any, target_modules: str, target_experts: bool = False) -> list[str]:
    """Paths of the linear layers that ``target_modules`` selects (all but the output embedding).

    Args:
        target_modules: "all-linear", last names separated by commas, or a regular expression
            matching whole paths.
        target_experts: those of a mixture's experts, too.

    Raises:
        UsageError: nothing matches, or a name in the list matches nothing; tells what there is.
    """
    if target_experts:
        if not (more := experts(model)):
            raise UsageError(
                f"{type(model).__name__} has no experts to adapt",
                ways_out=["leave --target_experts out"],
            )
        return [*target_names(model, target_modules), *more]
    linear = adaptable(model)
    if target_modules == "all-linear":
        chosen, unmatched = linear, []
    elif re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", target_modules):
        suffixes = [part.strip() for part in target_modules.split(",")]
        chosen = [name for name in linear if any(ends_with(name, suffix) for suffix in suffixes)]
        unmatched = [
            suffix for suffix in suffixes if not any(ends_with(name, suffix) for name in linear)
        ]
    else:
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise UsageError(
                f"target_modules is no valid regular expression: {error}", found=target_modules
            ) from error
        other = other_class(model)  # whose paths people write as well
        called = {n: (n, other.name_there(n)) if other is not None else (n,) for n in linear}
        chosen = [name for name in linear if any(map(pattern.fullmatch, called[name]))]
        unmatched = []
    if heads := [
        target.path
        for target in targets(model)
        if target.is_head and _names(target_modules, target.path)
    ]:
        raise UsageError(
            f"target_modules names {', '.join(heads)}, the output head: it takes no adapter here",
            ways_out=[
                f"leave it out, or train it whole: --modules_to_save {heads[0].rpartition('.')[2]}"
            ],
        )
    if unmatched or not chosen:
        there = sorted({name.rpartition(".")[2] for name in linear})
        of_experts = any(ends_with(name, suffix) for name in experts(model) for suffix in unmatched)
        ways = ["leave them out: --target_experts true adapts the experts of every layer"]
        raise UsageError(
            f"target_modules matches no linear layer: {', '.join(unmatched) or target_modules}",
            found="they are those of experts" if of_experts else "",
            expected=f"all-linear, or some of {', '.join(there)}, or a regular expression",
            ways_out=ways if of_experts else [],
        )
    return chosen


def _names(target_modules: str, path: str) -> bool:
    """Whether a layer is asked for by the end of its path, in a list of such."""
    return any(ends_with(path, part.strip()) for part in target_modules.split(","))


def ends_with(name: str, suffix: str) -> bool:
    """Whether a module's path is this one, or ends with it after a dot."""
    return name == suffix or name.endswith("." + suffix)


def attach_lora(
    model: Any,
    adapter: AdapterConfig,
    target_modules: str | list[str] = "all-linear",
    *,
    seed: int = 42,
) -> list[str]:
    """Freeze the model and put an adapter on its linear layers, in place. Returns the adapted
    paths.

    Args:
        target_modules: as for `target_names`, or a list of whole paths.

    The initial A of a layer is a function of (seed, its path). Every layer shares one
    `DropoutClock` (``.clock``).
    """
    names = (
        target_names(model, target_modules) if isinstance(target_modules, str) else target_modules
    )
    model.requires_grad_(False)
    clock = DropoutClock(seed)
    for index, name in enumerate(names):
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        fused = fused_parameter(model, name)
        # PEFT adapts experts as parameters, which it gives no dropout
        own = adapter.of(name) if fused is None else replace(adapter.of(fused), dropout=0.0)
        LoraLinear.from_linear(model.get_submodule(name), own, index, clock, generator)
    share_inputs(model)
    return names


def share_inputs(model: Any) -> None:
    """Let gate and up of an expert have one A, in place: PEFT adapts both as one matrix."""
    for expert in model.modules():
        if isinstance(expert, Expert | OtherExpert):
            layers = dict(expert.named_children())
            gate, up = layers.get("gate_proj"), layers.get("up_proj")
            if isinstance(gate, LoraLinear) and isinstance(up, LoraLinear):
                up.lora_A = gate.lora_A

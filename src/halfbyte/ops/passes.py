"""Passes over rows that a model makes between its products: normalization, gated activations,
cross-entropy.

In plain PyTorch each is half a dozen passes over memory with as many temporaries, and a cast on the
way in and out. Here each is one pass in fp32 registers with one rounding at its end.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..ledger import Part
from . import cpu, cpu_calls, gpu, gpu_calls
from .fourbit import FLOATS
from .library import as_wide, define, record_workspace

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
"""SiLU; GELU by its tanh formula; GELU by erf (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""


def _check(name: str, like: Tensor, **others: Tensor) -> None:
    if like.dtype not in FLOATS:
        raise TypeError(f"{name} computes in fp32, bf16 or fp16, not {like.dtype}")
    for what, tensor in others.items():
        if tensor.dtype != like.dtype:
            raise TypeError(f"{name}: {what} must be {like.dtype}, got {tensor.dtype}")


# --- RMSNorm --------------------------------------------------------------------------------------


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float = 0.0, cast_first: bool = False
) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) (Zhang & Sennrich 2019, arXiv:1910.07467).

    Args:
        x: [..., width], fp32, bf16 or fp16.
        weight: [width], of the same dtype.
        offset: 1 where a model stores weight - 1 (Gemma).
        cast_first: round the quotient to the dtype of x before it is multiplied (Llama) instead of
            only at the end.

    Returns:
        y like x, and fp32 [...]: 1 / sqrt(mean(x^2) + eps).
    """
    _check("rms_norm", x, weight=weight)
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"the weight must be [{x.shape[-1]}], got {list(weight.shape)}")
    return torch.ops.halfbyte.rms_norm(x, weight, eps, offset, cast_first)


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, offset: float, cast_first: bool
) -> tuple[Tensor, Tensor]:
    wide = as_wide(x)
    inverse = (wide.square().mean(-1) + eps).rsqrt()
    quotient = wide * inverse.unsqueeze(-1)
    if cast_first:
        quotient = as_wide(quotient.to(x.dtype))
    return (quotient * (as_wide(weight) + offset)).to(x.dtype), inverse


def rms_norm_grad(
    dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float = 0.0
) -> Tensor:
    """The gradient of `rms_norm` with respect to x, like x. inverse: its second result."""
    _check("rms_norm", x, gradient=dy, weight=weight)
    if dy.shape != x.shape or inverse.shape != x.shape[:-1] or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"gradient {list(dy.shape)} or inverse {list(inverse.shape)} do not fit x "
            f"{list(x.shape)}"
        )
    return torch.ops.halfbyte.rms_norm_grad(dy, x, weight, inverse, offset)


def _rms_norm_grad(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, offset: float) -> Tensor:
    g, inverse = as_wide(dy) * (as_wide(weight) + offset), inverse.unsqueeze(-1)
    normal = as_wide(x) * inverse
    return ((g - normal * (g * normal).mean(-1, keepdim=True)) * inverse).to(x.dtype)


# --- gated activations ----------------------------------------------------------------------------


def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up (Shazeer 2020, arXiv:2002.05202), rounded once.

    Args:
        gate, up: [..., width], the rows of each at one stride.
        activation: one of `ACTIVATIONS`.
    """
    _check("gated", gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"gate {list(gate.shape)} and up {list(up.shape)} differ")
    return torch.ops.halfbyte.gated(gate, up, ACTIVATIONS.index(activation))


def gated_grad(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Gradients of `gated` with respect to gate and up."""
    _check("gated", gate, up=up, gradient=dy)
    if not dy.shape == gate.shape == up.shape:
        raise ValueError(
            f"gradient {list(dy.shape)}, gate {list(gate.shape)} and up {list(up.shape)} differ"
        )
    return torch.ops.halfbyte.gated_grad(dy, gate, up, ACTIVATIONS.index(activation))


def _activation(x: Tensor, activation: int) -> Tensor:
    if activation == 0:
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if activation == 1 else "none")


def _gated(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    return (_activation(as_wide(gate), activation) * as_wide(up)).to(gate.dtype)


def _gated_grad(dy: Tensor, gate: Tensor, up: Tensor, activation: int) -> tuple[Tensor, Tensor]:
    wide, g = as_wide(gate), as_wide(dy)
    if activation == 0:
        dgate = torch.ops.aten.silu_backward(g * as_wide(up), wide)
    else:
        params = "tanh" if activation == 1 else "none"
        dgate = torch.ops.aten.gelu_backward(g * as_wide(up), wide, approximate=params)
    return dgate.to(gate.dtype), (g * _activation(wide, activation)).to(gate.dtype)


# --- cross-entropy --------------------------------------------------------------------------------


def cross_entropy(
    logits: Tensor, labels: Tensor, grad: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each row and its gradient, from one reading of the logits.

    Args:
        logits: [n, vocabulary], fp32, bf16 or fp16.
        labels: int64 [n]; a row whose label is no index has no loss.
        grad: like logits, contiguous, to write into; allocated where absent.

    Returns:
        losses fp32 [n]; softmax(logits) - onehot(label), like logits.
    """
    _check("cross_entropy", logits)
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"logits {list(logits.shape)} take int64 labels [{logits.shape[0]}]")
    if grad is None:
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    elif grad.shape != logits.shape or grad.dtype != logits.dtype or not grad.is_contiguous():
        raise ValueError(f"grad must be contiguous {logits.dtype} {list(logits.shape)}")
    return torch.ops.halfbyte.cross_entropy(logits, labels, grad), grad


def _cross_entropy(logits: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    wide = as_wide(logits)
    counted = (labels >= 0) & (labels < logits.shape[1])
    at = labels.where(counted, labels.new_zeros(())).unsqueeze(1)
    logs = wide.log_softmax(1)
    losses = -logs.gather(1, at).squeeze(1) * counted
    grad_logits = logs.exp_()
    grad_logits.scatter_add_(1, at, grad_logits.new_full(at.shape, -1.0))
    grad.copy_(grad_logits.mul_(counted.unsqueeze(1)))
    return losses


# --- shapes ---------------------------------------------------------------------------------------


def _norm_fake(x: Tensor, *args) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _like_second(dy: Tensor, x: Tensor, *args) -> Tensor:
    return x.new_empty(x.shape)


def _like_first(x: Tensor, *args) -> Tensor:
    return x.new_empty(x.shape)


def _two_like_second(dy: Tensor, x: Tensor, *args) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _loss_fake(logits: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    if not (cpu.serves(logits) or gpu.computes(logits, "cross_entropy")):
        record_workspace(Part.LOGITS, 2 * 4 * logits.numel())  # in fp32, and their logarithms
    return logits.new_empty(labels.shape, dtype=torch.float32)


for _name, _schema, _reference, _fake, _cpp in (
    (
        "rms_norm",
        "(Tensor x, Tensor weight, float eps, float offset, bool cast_first) -> (Tensor, Tensor)",
        _rms_norm,
        _norm_fake,
        cpu_calls._rms_norm,
    ),
    (
        "rms_norm_grad",
        "(Tensor dy, Tensor x, Tensor weight, Tensor inverse, float offset) -> Tensor",
        _rms_norm_grad,
        _like_second,
        cpu_calls._rms_norm_grad,
    ),
    (
        "gated",
        "(Tensor gate, Tensor up, int activation) -> Tensor",
        _gated,
        _like_first,
        cpu_calls._gated,
    ),
    (
        "gated_grad",
        "(Tensor dy, Tensor gate, Tensor up, int activation) -> (Tensor, Tensor)",
        _gated_grad,
        _two_like_second,
        cpu_calls._gated_grad,
    ),
    (
        "cross_entropy",
        "(Tensor logits, Tensor labels, Tensor(a!) grad) -> Tensor",
        _cross_entropy,
        _loss_fake,
        cpu_calls._cross_entropy,
    ),
):
    define(_name + _schema, _reference, _fake)
    cpu.register(_name, _reference, _cpp)


# --- the small cases by which a GPU is judged ---


def _norm_case(device: torch.device) -> tuple:
    return gpu.sample(device, 3, 50), gpu.sample(device, 50, seed=1), 1e-6, 0.0, True


def _wide_norm_case(device: torch.device) -> tuple:
    return *_norm_case(device)[:3], 1.0, False


def _norm_grad_case(device: torch.device) -> tuple:
    x, weight, eps, offset, cast_first = _norm_case(device)
    return (
        gpu.sample(device, 3, 50, seed=2),
        x,
        weight,
        _rms_norm(x, weight, eps, offset, cast_first)[1],
        offset,
    )


def gated_example(device: torch.device) -> tuple:
    return gpu.sample(device, 3, 50), gpu.sample(device, 3, 50, seed=1), 0


def _gelu(activation: int) -> gpu.Case:
    return lambda device: (*gated_example(device)[:2], activation)


def _gated_grad_case(device: torch.device) -> tuple:
    return gpu.sample(device, 3, 50, seed=2), *gated_example(device)


def _gelu_grad(activation: int) -> gpu.Case:
    return lambda device: (*_gated_grad_case(device)[:3], activation)


def _cross_entropy_case(device: torch.device) -> tuple:
    logits = gpu.sample(device, 4, 5000)
    return logits, torch.tensor([0, 4999, -100, 17], device=device), torch.empty_like(logits)


gpu.register("rms_norm", _rms_norm, gpu_calls.rms_norm, _norm_case, _wide_norm_case)
gpu.register("rms_norm_grad", _rms_norm_grad, gpu_calls.rms_norm_grad, _norm_grad_case)
gpu.register("gated", _gated, gpu_calls.gated, gated_example, _gelu(1), _gelu(2))
gpu.register(
    "gated_grad", _gated_grad, gpu_calls.gated_grad, _gated_grad_case, _gelu_grad(1), _gelu_grad(2)
)
gpu.register("cross_entropy", _cross_entropy, gpu_calls.cross_entropy, _cross_entropy_case)

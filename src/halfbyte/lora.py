"""LoRA on a linear layer whose base is frozen, in 4 bits or 16 (Hu et al. 2021, arXiv:2106.09685).

    y = x W^T + b + s * drop(x) A^T B^T        A: [r, in], B: [out, r], s = alpha / r (rsLoRA: alpha / sqrt(r))

One autograd function computes both branches, so that only x, u,
the rounded A and B and the 4-bit weight are kept for the backward pass:

    u  = drop(x) A^T                       [.., r]
    du = dy (s B)                          [.., r]
    dB = s * dy^T u,   dA = du^T drop(x),   dx = dy W + drop^T(du A)

The dropout mask is a function of (seed, step, micro-batch, layer) (`ops.Dropout`): it is recomputed, never stored, and
the factor 1 / (1 - p) is folded into s, and s into B before B is rounded. A and B are fp32 masters; products run in
the dtype of x, and the adapter's term joins the base's before the sum is rounded.

`LoraLinear` is a `torch.nn.Linear` with two more parameters, made in place from one: the model keeps its module names
and the checkpoint keeps its tensor names. Files are PEFT's. The road not taken is a wrapper module, which renames every
weight below it.
"""

import contextlib
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import ops, recompute
from .errors import ModelError, UsageError
from .hub import Entry, read_header, read_json, read_tensor, write_json, write_safetensors
from .nf4 import NF4Tensor

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


@dataclass
class DropoutClock:
    """The counters every mask of a model is a function of; the training loop sets them, the layers read them."""

    seed: int = 0
    step: int = 0
    micro_batch: int = 0
    first: int = 0
    """Token of the micro-batch that what is computed now begins with."""


@dataclass(frozen=True)
class AdapterConfig:
    """What describes an adapter, apart from its weights.

    rank_pattern, alpha_pattern: other r and alpha for the layers whose path, or its end after a dot, matches the
    regular expression, as in PEFT; the first that does.
    """

    r: int
    alpha: int
    dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, int] = field(default_factory=dict)

    def of(self, name: str) -> "AdapterConfig":
        """What holds for one layer, by its path."""
        r, alpha = _by_pattern(self.rank_pattern, name, self.r), _by_pattern(self.alpha_pattern, name, self.alpha)
        return AdapterConfig(r, alpha, self.dropout, self.use_rslora)

    @property
    def scaling(self) -> float:
        return self.alpha / math.sqrt(self.r) if self.use_rslora else self.alpha / self.r


def _by_pattern(patterns: Mapping[str, int], name: str, default: int) -> int:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


class LoraLinear(nn.Linear):
    """A linear layer with an adapter. Made by `from_linear`; has ``lora_A`` [r, in] and ``lora_B`` [out, r] in fp32."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
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
        """Turn a linear layer into this class in place; A is Kaiming-uniform (PEFT's choice), B zero."""
        device = linear.weight.device
        bound = 1 / math.sqrt(linear.in_features)
        a = torch.empty(adapter.r, linear.in_features, device="meta" if device.type == "meta" else "cpu")
        if not a.is_meta:
            a.uniform_(-bound, bound, generator=generator)
        linear.__class__ = cls
        assert isinstance(linear, LoraLinear)
        linear.lora_A = nn.Parameter(a.to(device))
        linear.lora_B = nn.Parameter(torch.zeros(linear.out_features, adapter.r, device=device))
        linear.adapter, linear.layer_index, linear.clock = adapter, layer_index, clock
        return linear

    def forward(self, input: Tensor) -> Tensor:
        return _LoraLinear.apply(  # pyright: ignore[reportReturnType]
            input, self.weight, self.bias, self.lora_A, self.lora_B, self.adapter.scaling, self._dropout()
        )

    def _dropout(self) -> ops.Dropout:
        if not self.training or not self.adapter.dropout:
            return ops.NO_DROPOUT
        threshold, clock = ops.drop_threshold(self.adapter.dropout), self.clock
        first = clock.first * self.in_features
        return ops.Dropout(threshold, clock.seed, clock.step, clock.micro_batch, self.layer_index, first)

    def delta(self) -> Tensor:
        """s B A in fp32 [out, in]: what the adapter adds to the weight."""
        return (self.lora_B.detach() @ self.lora_A.detach()) * self.adapter.scaling

    def base_weight(self) -> Tensor:
        """The frozen weight as an ordinary tensor."""
        return self.weight.dequantize() if isinstance(self.weight, NF4Tensor) else self.weight.detach()


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


# --- on a model -------------------------------------------------------------------------------------------------------


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(path, layer) of every adapted layer, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within this block the model is its base: adapted layers are the linear layers they were made from."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = LoraLinear


def target_names(model: Any, target_modules: str) -> list[str]:
    """Paths of the linear layers that ``target_modules`` selects (all but the output embedding).

    Args:
        target_modules: "all-linear", last names separated by commas, or a regular expression matching whole paths.

    Raises:
        UsageError: nothing matches, or a name in the list matches nothing; tells what there is.
    """
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    if target_modules == "all-linear":
        chosen, unmatched = linear, []
    elif re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)*", target_modules):
        suffixes = [part.strip() for part in target_modules.split(",")]
        chosen = [name for name in linear if any(_ends_with(name, suffix) for suffix in suffixes)]
        unmatched = [suffix for suffix in suffixes if not any(_ends_with(name, suffix) for name in linear)]
    else:
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise UsageError(f"target_modules is no valid regular expression: {error}", found=target_modules) from error
        chosen, unmatched = [name for name in linear if pattern.fullmatch(name)], []
    if unmatched or not chosen:
        there = sorted({name.rpartition(".")[2] for name in linear})
        raise UsageError(
            f"target_modules matches no linear layer: {', '.join(unmatched) or target_modules}",
            expected=f"all-linear, or some of {', '.join(there)}, or a regular expression",
        )
    return chosen


def _ends_with(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith("." + suffix)


def attach_lora(
    model: Any, adapter: AdapterConfig, target_modules: str | list[str] = "all-linear", *, seed: int = 42
) -> list[str]:
    """Freeze the model and put an adapter on its linear layers, in place. Returns the adapted paths.

    Args:
        target_modules: as for `target_names`, or a list of whole paths.

    The initial A of a layer is a function of (seed, its path). Every layer shares one `DropoutClock` (``.clock``).
    """
    names = target_names(model, target_modules) if isinstance(target_modules, str) else target_modules
    model.requires_grad_(False)
    clock = DropoutClock(seed)
    for index, name in enumerate(names):
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        LoraLinear.from_linear(model.get_submodule(name), adapter.of(name), index, clock, generator)
    return names


# --- files, as PEFT reads and writes them -----------------------------------------------------------------------------


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter under PEFT's names, fp32 on the CPU."""
    tensors = {}
    for name, layer in lora_layers(model):
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = layer.lora_A.detach().cpu()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = layer.lora_B.detach().cpu()
    return tensors


def adapter_config(model: Any, base_model: str) -> dict[str, Any]:
    """adapter_config.json for the model's adapter."""
    layers = dict(lora_layers(model))
    adapter = next(iter(layers.values())).adapter
    ranks = Counter(layer.adapter.r for layer in layers.values())
    alphas = Counter(layer.adapter.alpha for layer in layers.values())
    r, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "target_modules": _shortest_targets(model, list(layers)),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {name: layer.adapter.r for name, layer in layers.items() if layer.adapter.r != r},
        "alpha_pattern": {name: layer.adapter.alpha for name, layer in layers.items() if layer.adapter.alpha != alpha},
        "use_dora": False,
    }


def _shortest_targets(model: Any, names: list[str]) -> list[str]:
    """Last names where they select exactly these layers in PEFT (which matches by suffix), else whole paths."""
    last = sorted({name.rpartition(".")[2] for name in names})
    everything = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    matched = {name for name in everything if any(_ends_with(name, suffix) for suffix in last)}
    return last if matched == set(names) else sorted(names)


def save_adapter(model: Any, directory: Path, base_model: str) -> None:
    """The adapter as PEFT writes it: adapter_model.safetensors and adapter_config.json."""
    write_safetensors(directory / WEIGHTS, adapter_tensors(model))
    write_json(directory / CONFIG, adapter_config(model, base_model))


_UNSUPPORTED = {
    "use_dora": "DoRA",
    "modules_to_save": "modules_to_save",
    "layers_to_transform": "layers_to_transform",
    "target_parameters": "target_parameters",
    "lora_bias": "lora_bias",
    "trainable_token_indices": "trainable_token_indices",
}


def load_adapter(model: Any, directory: Path, *, seed: int = 0) -> dict[str, Any]:
    """Put a PEFT adapter on a model, in place. Returns its configuration.

    Raises:
        ModelError: no LoRA adapter, a feature we do not have, or tensors that do not fit; all mismatches at once.
    """
    config = read_json(directory / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{directory} is not a LoRA adapter", found=f"peft_type {config.get('peft_type')!r}")
    used = [label for key, label in _UNSUPPORTED.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append(f"bias={config['bias']}")
    if used:
        raise ModelError(f"the adapter in {directory} uses {', '.join(used)}, which is not supported here")
    adapter = AdapterConfig(
        config["r"],
        config["lora_alpha"],
        config.get("lora_dropout", 0.0),
        bool(config.get("use_rslora")),
        config.get("rank_pattern") or {},
        config.get("alpha_pattern") or {},
    )
    entries = read_header(directory / WEIGHTS)
    names = _adapted_names(entries)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    strangers = [name for name in names if name not in linear]
    if not names or strangers:
        raise ModelError(
            f"the adapter in {directory} does not fit this model",
            found=f"adapts {', '.join(strangers[:5])}" if names else "no lora_A / lora_B tensors",
            expected="linear layers of the base model it was trained on",
        )
    attach_lora(model, adapter, names, seed=seed)
    restore_adapter(model, entries, directory / WEIGHTS)
    return config


def _adapted_names(entries: dict[str, Entry]) -> list[str]:
    pattern = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_[AB](\.default)?\.weight")
    return sorted({match.group(1) for name in entries if (match := pattern.fullmatch(name))})


def restore_adapter(model: nn.Module, entries: dict[str, Entry], file: Path) -> None:
    """Copy an adapter file's tensors into the model's adapter.

    Raises:
        ModelError: missing, unexpected or misshapen tensors, all in one message.
    """
    wanted = {
        f"{_PREFIX}{name}.{key}.weight": getattr(layer, key)
        for name, layer in lora_layers(model)
        for key in ("lora_A", "lora_B")
    }
    found = {name.replace(".default.weight", ".weight"): entry for name, entry in entries.items()}
    problems = [f"missing: {name}" for name in wanted.keys() - found.keys()]
    problems += [f"unexpected: {name}" for name in found.keys() - wanted.keys()]
    problems += [
        f"{name}: {list(found[name].shape)} in the file, {list(parameter.shape)} in the model"
        for name, parameter in wanted.items()
        if name in found and found[name].shape != tuple(parameter.shape)
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise ModelError(f"the adapter {file} does not fit this model", found=listed)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(read_tensor(found[name], name))

"""What plugs into transformers, PEFT and TRL: `optimize` for a model, `MemoryCallback` for a
trainer.

A script that loads a model with bitsandbytes and adapts it with PEFT computes, layer by layer, what
`lora` computes in one operation. So `optimize` makes the modules at hand, in place, subclasses of
their own classes: the 4-bit layers and PEFT's LoRA layers, norms, MLPs and attention of known
forms, and the layers that are recomputed. Names, parameters, ``state_dict``, merging and saving are
theirs as before, and whatever a layer is asked for beyond the ordinary (several adapters, DoRA,
merged or disabled ones) is answered by its own class.

Dropout masks are drawn from PyTorch's generator, one number per layer and pass: the script's seed
decides them, and a layer that is run again draws the same.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..adapters.lora import lora_linear
from ..engine.loss import causal_lm_loss
from ..engine.selftest import checkpoint_layers
from ..memory.process import UNASKED_SHARE, headroom
from ..memory.recompute import KEEPS, Keep, Recompute
from ..model import attention, fusion
from ..model.class_swap import is_wrapped, swap_class
from ..model.recognize import spec_of
from ..ops import cpu, gpu
from ..progress import to_stderr
from ..quantization.tensor import NESTED_BLOCK_SIZE, NF4Tensor, four_bit_linear

# --- layers ---------------------------------------------------------------------------------------


def stored_weight(weight: Tensor, dtype: torch.dtype) -> NF4Tensor | None:
    """bitsandbytes' parameter as a tensor of ours in the same memory; None where it is not
    quantized yet."""
    state: Any = getattr(weight, "quant_state", None)
    if state is None:
        return None
    nested = state.state2 if state.nested else None
    parts = ops.FourBit(
        weight.data.view(torch.uint8).view(-1),
        state.absmax.view(-1),
        state.code,
        nested.absmax.view(-1) if nested else None,
        nested.code if nested else None,
        state.offset if nested else None,
        state.blocksize,
        nested.blocksize if nested else NESTED_BLOCK_SIZE,
    )
    return NF4Tensor(parts, torch.Size(state.shape), dtype, state.quant_type)


class _FourBit(nn.Module):
    """bitsandbytes' 4-bit layer, computed by `ops.linear_4bit`.

    It never packs its weight anew for inference, after which the original's gradients are those of
    other weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        own: Any = self
        dtype = _computes_in(own, x)
        weight = stored_weight(own.weight, dtype)
        if weight is None:
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        bias = None if own.bias is None else own.bias.to(dtype)
        with _exactly(x):
            return four_bit_linear(x.to(dtype), weight, bias).to(x.dtype)


def _computes_in(layer: Any, x: Tensor) -> torch.dtype:
    """The type a layer of bitsandbytes computes in, by its own rule."""
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    return layer.compute_dtype or x.dtype


def _exactly(x: Tensor) -> Any:
    """Within this block products on the device of x run in the types they are given."""
    return torch.autocast(x.device.type, enabled=False)


class _Lora(nn.Module):
    """PEFT's LoRA layer with one ordinary adapter, both branches at once (`lora.lora_linear`)."""

    kept_dtypes: dict[str, torch.dtype]
    """The types that adapters had, which trainers may have changed since (TRL rounds adapters to
    bf16)."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        own: Any = self
        name, base = self._ordinary(args, kwargs), own.get_base_layer()
        weight, dtype = (None, x.dtype) if name is None else _base_weight(base, x)
        if name is None or weight is None:
            return super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        a, b = own.lora_A[name].weight, own.lora_B[name].weight
        kept = self.kept_dtypes.get(name, a.dtype)
        if a.dtype != kept and a.requires_grad:
            for p in (a, b):
                p.data = p.data.to(kept)
        bias = None if base.bias is None else base.bias.to(dtype)
        with _exactly(x):
            y = lora_linear(
                x.to(dtype),
                weight,
                bias,
                a,
                b,
                own.scaling[name],
                self._dropout(own.lora_dropout[name]),
            )
        return y.to(x.dtype) if isinstance(weight, NF4Tensor) else y

    @property
    def is_ordinary(self) -> bool:
        """Whether nothing but this layer's product is its output."""
        return self._ordinary((), {}) is not None

    def _ordinary(self, args: Any, kwargs: Any) -> str | None:
        """The one adapter to compute with, if there is nothing else to it."""
        own: Any = self
        if args or kwargs or own.disable_adapters or own.merged or len(own.active_adapters) != 1:
            return None
        name = own.active_adapters[0]
        if name not in own.lora_A or name in own.lora_variant or own.lora_bias.get(name):
            return None
        return name if isinstance(own.lora_dropout[name], nn.Dropout | nn.Identity) else None

    def _dropout(self, module: nn.Module) -> ops.Dropout:
        p = module.p if isinstance(module, nn.Dropout) and module.training else 0.0
        if not p:
            return ops.NO_DROPOUT
        return ops.Dropout(ops.drop_threshold(p), int(torch.randint(0, 1 << 62, ())), 0, 0, 0)


def _base_weight(base: Any, x: Tensor) -> tuple[Tensor | None, torch.dtype]:
    """The frozen weight under an adapter and the type to compute in; None where PEFT has to."""
    weight = base.weight
    if is_wrapped(base):  # what wraps it may bring the weight first (accelerate's offloading)
        return None, x.dtype
    if isinstance(base, _FourBit):
        dtype = _computes_in(base, x)
        return stored_weight(weight, dtype), dtype
    if isinstance(weight, NF4Tensor):
        return weight, weight.dtype
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    usable = type(base) is nn.Linear and weight.dtype == dtype and not weight.requires_grad
    return (weight if usable else None), dtype


# --- layers that are run again --------------------------------------------------------------------


class _Checkpointed(nn.Module):
    """A decoder layer which, where a trainer has it checkpointed, is run again by `recompute`
    instead of by PyTorch."""

    again: "_Again"
    number: int

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., Any]:
        return self._run

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Any) -> None:
        """Whatever a trainer would have run the layer by is not needed."""

    def _run(self, function: Callable[..., Tensor], hidden: Tensor, *others: Any) -> Tensor:
        # what was found out about the layer's last product holds for modules that only do what they
        # did then
        plain = all(not m._forward_hooks and _is_plain(m) for m in self.modules())
        return self.again(self.number, plain, function, hidden, *others)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module's output is no more than it was when its layer was tried."""
    if is_wrapped(module):
        return False
    if isinstance(module, _Lora):
        return module.is_ordinary
    return not (type(module).__module__.startswith("peft.") and hasattr(module, "base_layer"))


class _Again:
    """Runs the layers of a model, and decides at the first of them what all keep."""

    def __init__(self, run: Recompute, keep: str, bytes_per_token: int) -> None:
        self.run, self.keep, self.bytes_per_token = run, keep, bytes_per_token
        self.skips = run.skip_last
        self.now: Keep = "none"
        run.fill = math.nan  # if a result that is skipped did matter, it would show

    def __call__(
        self,
        number: int,
        plain: bool,
        function: Callable[..., Tensor],
        hidden: Tensor,
        *others: Any,
    ) -> Tensor:
        if number == 0:
            self.now = self._choose(hidden)
        self.run.skip_last = self.skips and plain
        return self.run.run(self.now, function, hidden, *others)

    def _choose(self, hidden: Tensor) -> Keep:
        """With auto: everything where it takes no more than half of the memory that is free."""
        if self.keep != "auto":
            return next(keep for keep in KEEPS if keep == self.keep)
        left = headroom(hidden.device)
        needed = self.bytes_per_token * hidden.numel() // hidden.shape[-1]
        return "all" if left is not None and needed <= left * UNASKED_SHARE else "none"


def _checkpoint(inner: Any, keep: str) -> str:
    """Have checkpointed layers run by `recompute`; a line for people."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers: list[Any] = [
        module for module in inner.modules() if isinstance(module, GradientCheckpointingLayer)
    ]
    if layers and isinstance(layers[0], _Checkpointed):  # optimized before
        layers[0].again.keep = keep
        return ""
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [
        (m, {name: m.__dict__[name] for name in names if name in m.__dict__})
        for m in inner.modules()
    ]
    hooked = hasattr(inner, "_require_grads_hook") or hasattr(inner, "_require_grads_hooks")
    line, run = checkpoint_layers(inner, "none", packing=False, restore_rng=True)
    for module, values in before:
        for name in names:
            module.__dict__.pop(name, None)
        module.__dict__.update(values)
    if hooked:
        inner.enable_input_require_grads()
    if run is None:
        return line
    outputs = sum(_output_widths(layers))
    again = _Again(run, keep, fusion.compute_dtype(inner).itemsize * outputs)
    for number, layer in enumerate(layers):
        layer.__dict__.pop("_gradient_checkpointing_func", None)
        swap_class(layer, _Checkpointed)
        layer.__dict__.update(again=again, number=number)
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
        if isinstance(m, _Lora)
        for inner in m.modules()
        if inner is not m
    }
    chosen: list[Any] = [
        m for m in modules if isinstance(m, nn.Linear | _Lora) and id(m) not in inside
    ]
    yield from (m.out_features for m in chosen)


# --- a model --------------------------------------------------------------------------------------


@dataclass
class _Done:
    lora: int = 0
    four_bit: int = 0
    packed: int = 0
    other: int = 0
    wrapped: int = 0


def _what_was_done(done: _Done, fused: str, narrowed: int) -> Iterator[str]:
    """Lines for people: layers replaced and left alone, bytes won back."""
    yield f"{done.lora} LoRA layers, {done.four_bit} other 4-bit layers; {fused}"
    if done.other:
        yield f"left as they are: {done.other} LoRA layers of other kinds (DoRA, ...)"
    if done.wrapped:
        yield (
            f"left as they are: {done.wrapped} modules whose forward something else has replaced "
            "(accelerate's hooks)"
        )
    if done.packed:
        yield (
            f"{done.packed} layers had been evaluated before: bitsandbytes has rounded their "
            "scales to bf16"
        )
    if narrowed:
        yield f"back from fp32, losing nothing: {narrowed / 2**20:,.1f} MiB less"


def optimize(
    model: Any,
    *,
    kept_activations: str = "auto",
    say: Callable[[str], None] = to_stderr,
) -> Any:
    """Make a transformers model with PEFT's adapters train faster and in less memory, in place.

    Call it after ``get_peft_model``, before a trainer is made. 4-bit layers of bitsandbytes (or of
    ours), LoRA layers, dropout, norms, MLPs and rotary embeddings compute with this package's
    operations; results and gradients are the same up to rounding in the compute dtype, dropout
    masks are others. Frozen parameters that ``prepare_model_for_kbit_training`` raised to fp32 go
    back to the compute dtype where that changes no value; hidden states and logits are then in that
    type, too, as in a model that was never prepared. Where checkpointing is on, a backward pass
    runs once (no ``retain_graph``). Adapters stay in the type they have now. PEFT, TRL, merging and
    saving go on as before.

    Args:
        model: a transformers model or a PEFT model of one.
        kept_activations: what checkpointed layers keep beside their input: "none", "attention",
            "mlp_in", "all", or "auto": all, where it takes at most half of the memory that is free.
        say: takes lines for people.

    Returns:
        The same model.

    Raises:
        ValueError: kept_activations is none of these.
    """
    if kept_activations not in (*KEEPS, "auto"):
        raise ValueError(
            f"kept_activations must be one of {', '.join((*KEEPS, 'auto'))}, not "
            f"{kept_activations!r}"
        )
    from transformers.loss.loss_utils import LOSS_MAPPING

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if why := _unserved(next(inner.parameters()).device):
        say(f"the model is left as it is: {why}")
        return model
    done = _replace_layers(inner)
    narrowed = _undo_upcasts(inner)
    if inner.config._attn_implementation == "sdpa" and cpu.serves(next(inner.parameters())):
        attention.register()
        inner.set_attn_implementation(attention.CAUSAL)
    if getattr(inner, "loss_function", None) is LOSS_MAPPING["ForCausalLM"]:
        inner.loss_function = causal_lm_loss
    modes = [(module, module.training) for module in inner.modules()]
    inner.eval()
    fused = fusion.fuse(inner)
    inner.train()
    checkpointing = (
        _checkpoint(inner, kept_activations)
        if any(p.requires_grad for p in inner.parameters())
        else ""
    )
    for module, training in modes:
        module.training = training
    for line in (*_what_was_done(done, fused.line(), narrowed), checkpointing):
        if line:
            say(line)
    return model


def _unserved(device: torch.device) -> str:
    """Why nothing would be faster on a device, "" where it would."""
    if device.type == "cpu":
        return cpu.why() if cpu.active() is None else ""
    if device.type == "cuda":
        return "" if gpu.wanted() and gpu.serves("dequantize_4bit") else gpu.why()
    return f"there is nothing faster for {device.type} yet"


def _replace_layers(inner: Any) -> _Done:
    done = _Done()
    under: set[int] = set()
    for module in list(inner.modules()):
        if is_wrapped(module):
            done.wrapped += bool(_kind(module)) or spec_of(module) is not None
            continue
        kind = _kind(module)
        if kind == "peft":
            under.add(id(module.get_base_layer()))
            plain = [name for name in module.lora_A if name not in module.lora_variant]
            done.other += not plain
            swap_class(module, _Lora)
            module.kept_dtypes = {name: module.lora_A[name].weight.dtype for name in plain}
            done.lora += bool(plain)
        elif kind == "bitsandbytes":
            done.packed += _unpack(module)
            swap_class(module, _FourBit)
            done.four_bit += id(module) not in under
    return done


def _kind(module: nn.Module) -> str:
    """ "peft": one of its LoRA layers on a linear one; "bitsandbytes": its 4-bit layer; "" for
    others and ours."""
    if isinstance(module, _Lora | _FourBit):
        return ""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit):
        return "bitsandbytes"
    if type(module).__module__.startswith("peft.tuners.lora."):
        return "peft" if type(module).__name__ in ("Linear", "Linear4bit") else ""
    return ""


def _unpack(layer: Any) -> bool:
    """Undo what bitsandbytes does to a weight for inference on CPUs, as far as it can be; whether
    it had been done.

    The codes come back as they were; the scales were rounded to bf16.
    """
    state: Any = getattr(layer.weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return False
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    layer.weight.data, state = _convert_weight_packed_for_cpu_inverse(layer.weight.data, state)
    if state.nested:
        state.offset = state.offset.float()
    else:
        state.absmax = state.absmax.T.reshape(-1).float()
    layer.weight.quant_state = state
    return True


def _undo_upcasts(inner: Any) -> int:
    """Frozen fp32 parameters into the type that the 4-bit layers compute in, if every value
    survives; bytes won."""
    modules: list[Any] = [m for m in inner.modules() if isinstance(m, _FourBit)]
    dtypes = {m.compute_dtype for m in modules} | {
        p.dtype for p in inner.parameters() if isinstance(p, NF4Tensor)
    }
    dtypes -= {None, torch.float32}
    if len(dtypes) != 1:
        return 0
    (dtype,) = dtypes
    stays = tuple(getattr(inner, "_keep_in_fp32_modules", None) or ())
    wide = [
        p
        for name, p in inner.named_parameters()
        if p.dtype == torch.float32
        and not p.requires_grad
        and "lora_" not in name
        and not isinstance(p, NF4Tensor)
        if not any(part in name for part in stays)
    ]
    # all or none: where two types meet without autocast, PyTorch refuses
    trained_wide = any(
        p.dtype == torch.float32 and p.requires_grad and "lora_" not in name
        for name, p in inner.named_parameters()
    )
    if trained_wide or not all(_survives(p.data, dtype) for p in wide):
        return 0
    for p in wide:
        p.data = p.data.to(dtype)
    return sum(p.data.nbytes for p in wide)


def _survives(values: Tensor, dtype: torch.dtype) -> bool:
    return all(torch.equal(rows.to(dtype).float(), rows) for rows in values.split(1 << 12))

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

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.loss import causal_lm_loss
from ..memory.process import return_freed
from ..memory.recompute import KEEPS
from ..model import attention, fusion
from ..model.class_swap import is_wrapped, swap_class
from ..model.recognize import is_function_of, spec_of
from ..ops import cpu, gpu
from ..progress import to_stderr
from ..quantization.experts import coverage, experts_in_16_bits, hold_experts
from ..quantization.tensor import NF4Tensor
from .checkpointing import checkpoint_with_tapes
from .layers import OptimizedExpertLora, OptimizedFourBit, OptimizedLora


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
        kinds = "DoRA, experts in 16 bits, ..."
        yield f"left as they are: {done.other} LoRA layers of other kinds ({kinds})"
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
    quantize_experts: bool = False,
    say: Callable[[str], None] = to_stderr,
) -> Any:
    """Make a transformers model with PEFT's adapters train faster and in less memory, in place.

    Call it after ``get_peft_model``, before a trainer is made. 4-bit layers of bitsandbytes (or of
    ours), LoRA layers, dropout, norms, MLPs and rotary embeddings compute with this package's
    operations; results and gradients are the same up to rounding in the compute dtype, dropout
    masks are others. Frozen parameters that ``prepare_model_for_kbit_training`` raised to fp32 go
    back to the compute dtype where that changes no value; hidden states and logits are then in that
    type, too, as in a model that was never prepared. Adapters stay in the type they have now. PEFT,
    TRL, merging and saving go on as before.

    Args:
        model: a transformers model or a PEFT model of one.
        kept_activations: what checkpointed layers keep beside their input: "none", "attention",
            "mlp_in", "all", or "auto": all, where it takes at most half of the memory that is free.
        quantize_experts: hold the experts of a mixture, which bitsandbytes leaves in 16 bits, in 4
            bits, too, as its other layers are. Their values are then others.
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
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if why := _unserved(next(inner.parameters()).device):
        say(f"the model is left as it is: {why}")
        return model
    experts = hold_experts(inner) if quantize_experts else 0
    done = _replace_layers(inner)
    narrowed = _undo_upcasts(inner)
    if inner.config._attn_implementation == "sdpa" and cpu.serves(next(inner.parameters())):
        if attention.is_replaced():
            say("attention is left as it is: another package has put its own in place of sdpa")
        else:
            attention.register()
            inner.set_attn_implementation(attention.CAUSAL)
    if _is_transformers_loss(getattr(inner, "loss_function", None)):
        inner.loss_function = causal_lm_loss
    modes = [(module, module.training) for module in inner.modules()]
    inner.eval()
    fused = fusion.fuse(inner)
    inner.train()
    checkpointing = (
        checkpoint_with_tapes(inner, kept_activations)
        if any(p.requires_grad for p in inner.parameters())
        else ""
    )
    for module, training in modes:
        module.training = training
    return_freed()  # reading a model leaves up to as much as it takes with the C library
    of_experts = coverage(inner) if experts else experts_in_16_bits(inner)
    for line in (*_what_was_done(done, fused.line(), narrowed), of_experts, checkpointing):
        if line:
            say(line)
    return model


def _is_transformers_loss(loss: Any) -> bool:
    """Whether it is the cross-entropy of transformers and PyTorch, of which no part was replaced
    (LOSS_MAPPING, ``fixed_cross_entropy``, PyTorch's own)."""
    where = "transformers.loss.loss_utils"
    return is_function_of(loss, where, "ForCausalLMLoss") and all(
        is_function_of(function, module, function_name)
        for function, module, function_name in (
            (loss.__globals__.get("fixed_cross_entropy"), where, "fixed_cross_entropy"),
            (nn.functional.cross_entropy, "torch.nn.functional", "cross_entropy"),
        )
    )


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
            swap_class(module, OptimizedLora)
            module.kept_dtypes = {name: module.lora_A[name].weight.dtype for name in plain}
            done.lora += bool(plain)
        elif kind == "experts":
            held = isinstance(module.get_param(), NF4Tensor)
            if held:
                swap_class(module, OptimizedExpertLora)
            done.lora += held
            done.other += not held
        elif kind == "bitsandbytes":
            done.packed += _unpack(module)
            swap_class(module, OptimizedFourBit)
            done.four_bit += id(module) not in under
    return done


def _kind(module: nn.Module) -> str:
    """ "peft": one of its LoRA layers on a linear one; "experts": its LoRA on a parameter;
    "bitsandbytes": its 4-bit layer; "" for others and ours."""
    if isinstance(module, OptimizedLora | OptimizedFourBit | OptimizedExpertLora):
        return ""
    bitsandbytes = sys.modules.get("bitsandbytes")
    if bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit):
        return "bitsandbytes"
    if type(module).__module__.startswith("peft.tuners.lora."):
        kinds = {"Linear": "peft", "Linear4bit": "peft", "ParamWrapper": "experts"}
        return kinds.get(type(module).__name__, "")
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
    modules: list[Any] = [m for m in inner.modules() if isinstance(m, OptimizedFourBit)]
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

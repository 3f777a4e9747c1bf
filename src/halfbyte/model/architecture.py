"""A model's configuration and its empty shape: transformers' own class, on the ``meta`` device.

What a directory's ``config.json`` says is checked before anything believes it, and code that comes with a model is
never run. Which of the weights are held in 4 bits, and what names they have on disk, is decided here, for loading,
planning and writing alike.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config.options import ModelOptions
from ..errors import HalfbyteError, ModelError, UsageError
from ..files import hub
from ..memory.process import is_exhaustion
from ..quantization.tensor import NF4Tensor, quantize

Progress = Callable[[Iterable[str], int, str], Iterable[str]]


def no_progress(items: Iterable[str], total: int, title: str) -> Iterable[str]:
    return items


def choose_device(name: str) -> torch.device:
    """The device an option names.

    Raises:
        UsageError: CUDA was asked for and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError("device cuda was asked for, but PyTorch sees no GPU", ways_out=["--device cpu"])
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype an option names; auto is bf16 where the hardware multiplies it, else fp32 (GPU: fp16)."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def read_config(path: Path) -> Any:
    """The model's configuration as transformers knows it.

    Raises:
        ModelError: damaged, not a causal language model, or code of its own would be needed.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    raw = hub.read_json(path / "config.json")
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        own = "auto_map" in raw
        raise ModelError(
            f"{path} is not a causal language model that transformers knows",
            found=f"model_type {model_type!r}" + (" with code of its own, which is never run" if own else ""),
            ways_out=["update transformers, if the model is new"],
        )
    _check_ranges(raw, path)
    with refused_by_transformers(f"{path}/config.json is refused by transformers"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


@contextlib.contextmanager
def refused_by_transformers(what: str) -> Iterator[None]:
    """Within this block whatever a foreign file makes transformers raise becomes a ModelError that says ``what``."""
    try:
        yield
    except HalfbyteError:
        raise
    except Exception as error:
        if is_exhaustion(error):  # a lack of memory says nothing about the file
            raise
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(what, found=message[:300]) from error


LARGEST = {
    "num_hidden_layers": 2000,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "vocab_size": 1 << 24,
    "num_experts": 1 << 14,
    "num_local_experts": 1 << 14,
    "max_position_embeddings": 1 << 28,
}
"""Largest value believed of a configuration's sizes: several times what any known model has."""


def _check_ranges(raw: dict[str, Any], path: Path) -> None:
    """Refuse sizes that no model has, before a loop or an allocation believes them.

    Raises:
        ModelError: naming key and value.
    """
    for values in (raw, raw.get("text_config")):
        for key, most in LARGEST.items():
            value = values.get(key) if isinstance(values, dict) else None
            if value is not None and (type(value) is not int or not 1 <= value <= most):
                raise ModelError(
                    f"{path}/config.json has a value no model has",
                    found=f"{key} = {value!r}"[:200],
                    expected=f"1..{most}",
                )


def build_empty(config: Any) -> Any:
    """transformers' model with parameters on the meta device and real buffers.

    Raises:
        ModelError: transformers cannot build it; its message is quoted.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    refused = refused_by_transformers("transformers cannot build the model of this config.json")
    with refused, init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def quantizable(model: Any) -> set[str]:
    """Names of the weights that are held in 4 bits: those of linear layers, but not the output head."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def quantize_as(weight: Tensor, options: ModelOptions) -> NF4Tensor:
    """A weight in the 4 bits that the options ask for."""
    return quantize(
        weight,
        block_size=options.bnb_4bit_blocksize,
        double_quant=options.bnb_4bit_use_double_quant,
        quant_type=options.bnb_4bit_quant_type,
    )


def empty_base(config: Any, options: ModelOptions, dtype: torch.dtype) -> Any:
    """What `load_base` makes, on the ``meta`` device: the same shapes, types and 4-bit parts, and no weights.

    Raises:
        ModelError: transformers cannot build it.
    """
    model = build_empty(config)
    in_4bit = quantizable(model) if options.load_in_4bit else set()
    for module_name, module in model.named_modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                value = p.data.to(dtype)
                if f"{module_name}.{attribute}" in in_4bit:
                    value = quantize_as(value, options).with_dtype(dtype)
                module._parameters[attribute] = nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    model.eval()
    model.config.dtype = dtype
    return model


def checkpoint_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Names on disk to the model's names, by transformers' own renamings.

    Raises:
        ModelError: the model's layout on disk needs tensors to be joined or split (mixture-of-experts models).
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    result = {}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if pattern is not None:
            raise ModelError(
                f"{type(model).__name__} stores {name!r} in another layout than it computes with: not read yet",
                ways_out=["use a dense model"],
            )
        result[name] = target
    return result

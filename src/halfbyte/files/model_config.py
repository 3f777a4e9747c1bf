"""A model's ``config.json``, checked before anything believes it; code that comes with a model is
never run."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import HalfbyteError, ModelError, first_line, is_exhaustion
from . import atomic


def read_config(path: Path) -> Any:
    """The model's configuration as transformers knows it.

    Raises:
        ModelError: damaged, not a causal language model, or code of its own would be needed.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )

    raw = atomic.read_json(path / "config.json")
    model_type = raw.get("model_type")
    known = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}
    if not isinstance(model_type, str) or model_type not in known:
        own = "auto_map" in raw
        raise ModelError(
            f"{path} is not a causal language model that transformers knows",
            found=f"model_type {model_type!r}"
            + (" with code of its own, which is never run" if own else ""),
            ways_out=["update transformers, if the model is new"],
        )
    _check_ranges(raw, path)
    with refused_by_transformers(f"{path}/config.json is refused by transformers"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        _choose_code(config)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and config.is_encoder_decoder:
        raise ModelError(
            f"{path} is no causal language model: it writes what an encoder has read",
            found=f"model_type {model_type!r}",
        )
    return config


CHOOSING = ("_attn_implementation", "_experts_implementation")
"""Of a configuration: what computes, which is not a checkpoint's to say (it may name code of the
Hub)."""


def _choose_code(config: Any) -> None:
    """Have transformers choose what computes, in a configuration and those inside it."""
    inside = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    for each in (config, *(part for part in inside if part is not None)):
        for name in CHOOSING:
            if getattr(each, name, None) is not None:
                setattr(each, name, None)


@contextlib.contextmanager
def refused_by_transformers(what: str) -> Iterator[None]:
    """Within this block whatever a foreign file makes transformers raise becomes a ModelError that
    says ``what``."""
    try:
        yield
    except HalfbyteError:
        raise
    except Exception as error:
        if is_exhaustion(error):  # a lack of memory says nothing about the file
            raise
        message = first_line(error)
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
OF_EXPERTS = ("num_experts", "num_local_experts", "moe_intermediate_size")
"""Of these, what a model without experts has none of."""
OF_EACH_LAYER = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
"""Of these, what may be a list with a size for each layer (Gemma 3n)."""


def _check_ranges(raw: dict[str, Any], path: Path) -> None:
    """Refuse sizes that no model has, before a loop or an allocation believes them.

    Raises:
        ModelError: naming key and value.
    """
    for values in (raw, raw.get("text_config")):
        for key, most in LARGEST.items():
            value = values.get(key) if isinstance(values, dict) else None
            each = value if isinstance(value, list) and key in OF_EACH_LAYER else [value]
            least = 0 if key in OF_EXPERTS else 1  # a dense model of a family of mixtures has none
            if value is not None and not all(type(n) is int and least <= n <= most for n in each):
                raise ModelError(
                    f"{path}/config.json has a value no model has",
                    found=f"{key} = {value!r}"[:200],
                    expected=f"{least}..{most}",
                )


BESIDE_THE_POINT = {
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "auto_map"),
    *("dtype", "torch_dtype", "use_cache", "quantization_config", *CHOOSING),
    *("attn_implementation", "experts_implementation"),
}
"""Keys of a configuration that name things, or that are ours to say."""


def computed_by(path: Path) -> dict[str, Any]:
    """What decides, beside the weights, what a model computes: its configuration as transformers
    completes it, and how it is asked to generate.

    Args:
        path: the model's directory.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items() if k not in BESIDE_THE_POINT}
        return [plain(v) for v in value] if isinstance(value, list | tuple) else value

    found = plain(read_config(path).to_dict())
    if (path / "generation_config.json").is_file():
        asked = plain(atomic.read_json(path / "generation_config.json"))
        found |= {f"generation.{key}": value for key, value in asked.items()}
    return json.loads(json.dumps(found, default=str))


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, those of inner mappings after a dot: (before, now)."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(before.keys() | now.keys()):
        a, b = before.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= {f"{key}.{inner}": pair for inner, pair in differences(a, b).items()}
        elif a != b:
            found[key] = (a, b)
    return found


EXTENDING = ("linear", "dynamic", "yarn", "longrope")
"""Kinds that stretch the original context by their factor."""


def context_of(model_config: Any) -> int | None:
    """Tokens a model can read, as its rotary embedding is extended; None where it does not say."""
    config = model_config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if not limit:
        return None
    extended = [
        int(float(p["factor"]) * (p.get("original_max_position_embeddings") or limit))
        for p in rope_parameters(config)
        if p.get("rope_type") in EXTENDING and p.get("factor")
    ]
    return max([limit, *extended])


def rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Of all layers, or of each kind of layers."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = [each for each in found.values() if isinstance(each, dict)]
    for each in nested or [found]:
        yield {**each, "rope_type": each.get("rope_type", each.get("type"))}


def declared_ends(directory: Path) -> list[int]:
    """The ids that a model's own files say end an answer; [] where they say nothing.

    Raises:
        ModelError: a file that is none.
    """
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if (directory / name).is_file():
            values = atomic.read_json(directory / name).get("eos_token_id")
            for value in values if isinstance(values, list) else [values]:
                if isinstance(value, int) and not isinstance(value, bool) and value not in found:
                    found.append(value)
    return found

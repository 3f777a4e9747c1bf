"""Rotary embeddings whose factors depend on how long a pass is.

transformers chooses them once for all rows of a pass, by its longest position: LongRoPE (Ding et
al. 2024, arXiv:2402.13753; Phi-3, Phi-4, MiniCPM3) has short factors up to the original context and
long ones beyond it, dynamic scaling has others for each length. What a row is must not depend on
what stands beside it, so rows that are rotated differently never share a pass.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..files.model_config import rope_parameters

PassKind = Callable[[int], int]
"""Of a row's length, in tokens: rows share a pass where it is the same."""


def pass_kind(model_config: Any) -> PassKind:
    """What rows of a model are told apart by.

    Args:
        model_config: a transformers configuration.
    """
    if (short := border(model_config)) is None:
        return lambda length: 0
    if _longrope(model_config) is not None:
        return lambda length: int(length > short)
    return lambda length: length if length > short else 0


def border(model_config: Any) -> int | None:
    """Tokens up to which all passes are rotated alike; the position behind them is the first of
    which a pass is rotated otherwise. None where all are."""
    if (short := _longrope(model_config)) is not None:
        return short
    config = model_config.get_text_config()
    dynamic = any("dynamic" in str(p.get("rope_type")) for p in rope_parameters(config))
    return config.max_position_embeddings if dynamic else None


def _longrope(model_config: Any) -> int | None:
    """The context of the short factors."""
    for parameters in rope_parameters(model_config.get_text_config()):
        if parameters.get("rope_type") == "longrope":
            return parameters.get("original_max_position_embeddings")
    return None


def forget_longer_passes(model: nn.Module) -> None:
    """Have dynamic scaling depend on the pass it is in, and not on longer ones before it."""
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")) and hasattr(
            module, "original_max_seq_len"
        ):
            module.register_forward_pre_hook(_as_at_first)


def _as_at_first(module: Any, given: Any) -> None:
    if module.max_seq_len_cached != module.original_max_seq_len:
        first = module.original_inv_freq.to(module.inv_freq.device)
        module.register_buffer("inv_freq", first, persistent=False)
        module.max_seq_len_cached = module.original_max_seq_len

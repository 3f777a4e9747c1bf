"""What an adapter_config.json of PEFT's says, checked before anything believes it."""

import math
import re
from pathlib import Path
from typing import Any

from ..config.options import LARGEST_RANK
from ..config.peft_settings import undone_in_file
from ..errors import ModelError
from ..files.atomic import read_json
from .lora import AdapterConfig

CONFIG = "adapter_config.json"


def read_adapter_config(directory: Path) -> tuple[dict[str, Any], AdapterConfig]:
    """adapter_config.json, as it is and as we hold it.

    Raises:
        ModelError: no LoRA adapter, or a feature we do not have.
    """
    config = read_json(directory / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(
            f"{directory} is not a LoRA adapter", found=f"peft_type {config.get('peft_type')!r}"
        )
    if undone := undone_in_file(config):
        raise ModelError(
            f"the adapter in {directory} is no plain LoRA, and would be another model here",
            found=", ".join(f"{name}={value!r}"[:100] for name, value in undone.items()),
            ways_out=[
                "convert it to plain LoRA with PEFT (save_pretrained with "
                "path_initial_model_for_weight_conversion), where it changed the base",
                "or merge it into its base with PEFT, and train on that",
            ],
        )
    adapter = read_settings(config, directory / CONFIG)
    whole = config.get("modules_to_save") or []
    if not isinstance(whole, list) or not all(isinstance(name, str) and name for name in whole):
        raise ModelError(
            f"{directory / CONFIG} has values that are not taken",
            found=f"modules_to_save = {whole!r}"[:200],
            expected="a list of names",
        )
    return config, adapter


def read_settings(config: dict[str, Any], file: Path) -> AdapterConfig:
    """What an adapter_config.json says of rank, alpha and kind.

    Raises:
        ModelError: a number that none can be.
    """
    adapter = AdapterConfig(
        _whole(config.get("r", 8)),
        _whole(config.get("lora_alpha", 8)),
        config.get("lora_dropout") or 0.0,
        bool(config.get("use_rslora")),
        _whole_each(config.get("rank_pattern") or {}),
        _whole_each(config.get("alpha_pattern") or {}),
        bool(config.get("use_dora")),
    )
    _check_numbers(adapter, file)
    return adapter


def _check_numbers(adapter: AdapterConfig, file: Path) -> None:
    """Raise ModelError, naming the key, if a number of an adapter is none that PEFT writes."""
    wrong = {}
    if not _is_number(adapter.r, int):
        wrong["r"] = adapter.r
    if not _is_number(adapter.alpha, int | float):
        wrong["lora_alpha"] = adapter.alpha
    if isinstance(adapter.r, int) and adapter.r > LARGEST_RANK:
        wrong["r"] = adapter.r
    if not isinstance(adapter.dropout, int | float) or not 0 <= adapter.dropout < 1:
        wrong["lora_dropout"] = adapter.dropout
    for name, patterns, kind in (
        ("rank_pattern", adapter.rank_pattern, int),
        ("alpha_pattern", adapter.alpha_pattern, int | float),
    ):
        for pattern, value in (
            patterns.items() if isinstance(patterns, dict) else [(str(patterns), 0)]
        ):
            try:
                re.compile(pattern)
            except (re.error, TypeError):
                value = 0
            if not _is_number(value, kind) or (name == "rank_pattern" and value > LARGEST_RANK):
                wrong[f"{name}[{pattern!r}]"] = value
    if wrong:
        found = ", ".join(f"{name} = {value!r}"[:100] for name, value in wrong.items())
        raise ModelError(
            f"{file} has values that are not taken",
            found=found,
            expected=f"ranks from 1 to {LARGEST_RANK}, alphas above 0, a dropout below 1",
        )


def _is_number(value: Any, kind: Any) -> bool:
    """Whether a rank or an alpha is of a kind, finite and above 0."""
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value < math.inf


def _whole(value: Any) -> Any:
    """A number as a whole one where it is one: some trainers write alphas as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _whole_each(values: Any) -> Any:
    return {key: _whole(v) for key, v in values.items()} if isinstance(values, dict) else values

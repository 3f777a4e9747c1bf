"""What a LoRA configuration of PEFT may say that is done here: read, without effect, or refused.

One list serves objects of a script (`config.hf_objects`) and adapters on disk
(`adapters.peft_files`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True,),
    "task_type": (None, "CAUSAL_LM"),
    **dict.fromkeys(("fan_in_fan_out", "inference_mode"), (False,)),
    **dict.fromkeys(
        (
            "exclude_modules",
            "layers_to_transform",
            "layers_pattern",
            "trainable_token_indices",
            "layer_replication",
        ),
        (None, [], ()),
    ),
    **dict.fromkeys(
        ("megatron_config", "alora_invocation_tokens", "target_parameters", "arrow_config"),
        (None, []),
    ),
    **dict.fromkeys(("use_qalora", "lora_bias"), (False,)),
}
"""Settings that would change what is trained and have no counterpart here: the values that change
nothing."""

READ = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "use_dora", "modules_to_save", "ensure_weight_tying", *NEUTRAL),
    # names and places
    *("peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    # of methods that are refused themselves, and where something is held
    *("megatron_core", "qalora_group_size", "runtime_config"),
}
"""Settings that are read, are checked, or change nothing by themselves."""

EMPTY: tuple[Any, ...] = (None, False, "", [], {}, ())


def changed(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their defaults; empty values are as good as one
    another."""
    found = {}
    for field in dataclasses.fields(settings):
        made = field.default_factory
        plain = field.default if made is dataclasses.MISSING else made()
        value = getattr(settings, field.name)
        if value != plain and not (value in EMPTY and plain in EMPTY):
            found[field.name] = value
    return found


_ANYTHING = {
    # which layers: their tensors say it
    *("exclude_modules", "layers_to_transform", "layers_pattern", "inference_mode", "task_type"),
}
_ON_DISK: dict[str, tuple[Any, ...]] = {
    # beginnings that leave the base as it was; what came of them is in the tensors
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    # what such a beginning was made with
    **dict.fromkeys(("eva_config", "loftq_config", "corda_config", "lora_ga_config"), ()),
}


def _of_a_layer(parameter: Any) -> bool:
    """Whether a parameter that PEFT adapts is a layer's weight, or that of a mixture's experts."""
    names = ("weight", "gate_up_proj", "up_proj", "down_proj")
    return isinstance(parameter, str) and parameter.rpartition(".")[2] in names


def undone_in_file(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an ``adapter_config.json`` that make another model of its tensors than LoRA does.

    A setting that is not known here is refused where it switches something on (true, a list or a
    mapping that is not empty); a bare number or name is taken for a part of what is off.
    """
    wrong = {}
    for name, value in settings.items():
        if name in _ANYTHING or value in EMPTY:
            continue
        if name == "target_parameters" and all(map(_of_a_layer, value)):
            continue
        if name in _ON_DISK:
            fine = value in _ON_DISK[name] if _ON_DISK[name] else True
        elif name in NEUTRAL:
            fine = value in NEUTRAL[name]
        else:
            fine = name in READ or not (value is True or isinstance(value, dict | list))
        if not fine:
            wrong[name] = value
    return wrong

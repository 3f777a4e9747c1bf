"""A training that begins with an adapter: what the adapter is decides what is trained."""

from pathlib import Path
from typing import Any, TypeVar

from ..config.options import TrainConfig
from ..errors import ModelError, UsageError
from ..files import hub
from ..files.model_config import read_config
from ..model.architecture import build_empty
from ..model.targets import targets
from .converted import plain_lora
from .experts import ending, fused_of
from .lora import target_names
from .peft_files import (
    adapted_layers,
    read_adapter_config,
    shortest_targets,
    trained_apart,
    whole_modules,
)

ConfigT = TypeVar("ConfigT", bound=TrainConfig)


def begin_with_adapter(config: ConfigT, base: Path) -> ConfigT:
    """The configuration of a training that begins with an adapter: what the adapter is decides what
    is trained.

    Raises:
        ModelError: no adapter, or one that is not for this base.
        UsageError: an option says otherwise than it.
    """
    if config.adapter_name_or_path is None:
        return config
    given = config.adapter_name_or_path
    path = plain_lora(hub.resolve_adapter(given), base)
    raw, adapter = read_adapter_config(path)
    wanted: dict[str, Any] = {
        "lora_r": adapter.r,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.use_rslora,
        "rank_pattern": dict(adapter.rank_pattern),
        "alpha_pattern": dict(adapter.alpha_pattern),
        "use_dora": adapter.use_dora,
    }
    model = build_empty(read_config(base))
    wanted["modules_to_save"] = ",".join(whole_modules(raw, model))
    adapted = adapted_layers(model, path)
    heads = [target.path for target in targets(model) if target.is_head and target.path in adapted]
    if heads:
        raise ModelError(
            f"the adapter in {path} adapts the output head ({heads[0]}), which is not trained so "
            "here",
            ways_out=[
                f"halfbyte merge {given} --onto original -o DIR, and train on DIR",
                "or train a new adapter, with the head whole: --modules_to_save "
                + heads[0].rpartition(".")[2],
            ],
        )
    wanted["tie_word_embeddings"] = not trained_apart(model, path)
    of_experts = [name for name in adapted if fused_of(model, [name])]
    wanted["target_experts"] = bool(of_experts)
    for fused in sorted(fused_of(model, of_experts)):
        # the adapter's own rank, and not what a new one would have
        wanted["rank_pattern"].setdefault(ending(fused), adapter.of(fused).r)
        wanted["alpha_pattern"].setdefault(ending(fused), adapter.of(fused).alpha)
    others = sorted(set(adapted) - set(of_experts))
    wanted["target_modules"] = ",".join(shortest_targets(model, others))
    for name, value in wanted.items():
        if name in config.model_fields_set and not _is_same(
            name, getattr(config, name), value, model
        ):
            raise UsageError(
                f"the adapter in {path} has {name} {value!r}, and {getattr(config, name)!r} was "
                "asked for",
                ways_out=[f"without --{name}: the adapter's own is taken"],
            )
    if "lora_dropout" not in config.model_fields_set:
        wanted["lora_dropout"] = adapter.dropout
    there = Path(given).expanduser()
    wanted["adapter_name_or_path"] = str(there.resolve()) if there.exists() else given
    if path != hub.resolve_adapter(given):
        wanted["adapter_name_or_path"] = str(path)
    return config.model_copy(update=wanted)


def _is_same(name: str, asked: Any, value: Any, model: Any) -> bool:
    """Whether an option asks for what an adapter has."""
    if name == "target_modules":
        return set(target_names(model, asked)) == set(target_names(model, value))
    if name == "modules_to_save":
        return {part.strip() for part in asked.split(",")} == set(value.split(","))
    return asked == value

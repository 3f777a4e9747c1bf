"""A model directory to a transformers model whose linear weights are 4-bit, one tensor in memory at a time.

The model is built empty (`architecture`), then filled (`filler`). Names on disk go through transformers' own renamings.
A model is loaded whole or not at all.
"""

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..adapters.lora import target_names
from ..adapters.peft_files import adapted_layers, load_adapter, read_adapter_config, shortest_targets
from ..config.hf_objects import options_of
from ..config.options import ModelOptions, TrainConfig
from ..errors import ModelError, UsageError
from ..files import hub
from ..memory.paged_arrays import Travel
from ..model.architecture import (
    Progress,
    build_empty,
    choose_device,
    choose_dtype,
    no_progress,
    read_config,
    refused_by_transformers,
)
from ..ops import cpu
from ..run.directory import ADAPTER_FACTS, Run, is_run
from .weights import Filler, QuantReport
from .writer import Kept, cached, check_quantization, remove

MIN_COVERAGE = 0.9
ConfigT = TypeVar("ConfigT", bound=TrainConfig)


def load_base(path: Path, options: ModelOptions, progress: Progress = no_progress) -> tuple[Any, QuantReport]:
    """The base model of a directory, frozen, in eval mode; with weight_streaming its 4-bit weights stay in a file.

    Raises:
        ModelError: missing, unexpected or misshapen tensors (all in one message), a NaN, or too little quantized.
    """
    if "kernels" in options.model_fields_set:
        cpu.use(options.kernels)
    device = choose_device(options.device)
    if options.weight_streaming == "always":
        return _load_streamed(path, options, device, progress)
    return _load(path, path, options, device, progress, None)


def _load_streamed(
    path: Path, options: ModelOptions, device: torch.device, progress: Progress
) -> tuple[Any, QuantReport]:
    if device.type != "cpu" or not options.load_in_4bit:
        raise UsageError(
            "weight_streaming is for 4-bit weights on a CPU",
            found=f"device {device.type}, load_in_4bit {str(options.load_in_4bit).lower()}",
        )
    kept = cached(path, options, progress)
    try:
        model, report = _load(path, kept.path, options, device, progress, Travel())
    except ModelError as error:
        if kept.path == path:  # somebody's own directory, and no entry of the cache
            raise
        raise _damaged(kept, path, error.what) from error
    if report.digest != kept.digest:
        raise _damaged(kept, path, f"digest {report.digest[:16]}, not {kept.digest[:16]}")
    report.tensors = kept.tensors
    return model, report


def _damaged(kept: Kept, path: Path, found: str) -> ModelError:
    """The error for quantized weights that are not what was written; an entry of the cache is removed."""
    if remove(kept):
        end, way = "; they are removed", "repeat the command: they are made anew"
    elif kept.path == path:
        end, way = "", "quantize the model again"
    else:
        end, way = "", "delete this directory, and repeat the command"
    return ModelError(f"the quantized weights in {kept.path} are damaged{end}", found=found, ways_out=[way])


def _load(
    path: Path, weights: Path, options: ModelOptions, device: torch.device, progress: Progress, travel: Travel | None
) -> tuple[Any, QuantReport]:
    """The model of a directory with weights that may lie in another."""
    dtype = choose_dtype(options.dtype, device)
    config = read_config(path)
    check_quantization(path, getattr(config, "quantization_config", None))
    checkpoint = hub.Checkpoint(weights)
    model = build_empty(config)
    filler = Filler(model, checkpoint, options, dtype, device, travel)
    filler.check_names()
    for target in progress(filler.sources, len(filler.sources), "loading"):
        filler.fill(target)
    model.tie_weights()
    _place_buffers(model, device)
    if left := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ModelError(f"{len(left)} parameters of the model are in no file", found=", ".join(left[:5]))
    model.requires_grad_(False)
    model.eval()
    model.config.dtype = dtype
    _load_generation_config(model, path)
    report = QuantReport(options.bnb_4bit_quant_type, filler.coverage(), filler.records, filler.digest())
    if options.load_in_4bit and report.coverage < MIN_COVERAGE and not options.allow_low_coverage:
        raise ModelError(
            f"only {report.coverage:.0%} of the weights in layers would be held in 4 bits",
            expected=f"at least {MIN_COVERAGE:.0%}",
            ways_out=["--allow_low_coverage true, if the memory is there", "--load_in_4bit false"],
        )
    return model, report


def _load_generation_config(model: Any, path: Path) -> None:
    from transformers import GenerationConfig

    if (path / "generation_config.json").is_file():
        with refused_by_transformers(f"{path}/generation_config.json is refused by transformers"):
            model.generation_config = GenerationConfig.from_pretrained(path)


def _place_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


# --- a model or a run -------------------------------------------------------------------------------------------------


def load(model_or_run: str | Path, *objects: Any, progress: Progress = no_progress, **changes: Any) -> tuple[Any, Any]:
    """A transformers model, quantized, and its tokenizer; with the adapter, if it is a run directory.

    Args:
        model_or_run: Hub id, model directory or run directory. objects: a ``BitsAndBytesConfig``. changes: fields of
            `config.ModelOptions`, above it; a run's base is held as it was in training unless changed here.

    Raises:
        ModelError, UsageError: as `load_base` and `lora.load_adapter`.
    """
    given = options_of(objects, ())
    if unfit := sorted(given.keys() - ModelOptions.model_fields.keys()):
        raise UsageError("only a BitsAndBytesConfig says how a model is held", found=f"{', '.join(unfit[:5])}, ...")
    changes = {**given, **changes}
    if not is_run(model_or_run):
        path = hub.resolve(str(model_or_run), changes.get("revision"))
        model, _ = load_base(path, ModelOptions(**changes), progress)
        return model, hub.load_tokenizer(path)
    run = Run.open(model_or_run)
    info, trained = run.info(), run.config()
    options = ModelOptions(**{**trained.holding(), **changes})
    if "weight_streaming" not in changes and (not options.load_in_4bit or choose_device(options.device).type != "cpu"):
        options.weight_streaming = "never"  # what was streamed there cannot be here
    if trained.full:
        model, _ = load_base(run.adapter, options, progress)
    else:
        model, report = load_base(hub.resolve(info["base"]["path"], options.revision), options, progress)
        if options.held_as(trained) and not changes.get("allow_other_base"):
            way = "allow_other_base, where this is an option"
            refuse_other_base(report.digest, info["base"]["digest"], info["base"]["path"], way)
        load_adapter(model, run.adapter)
        model.eval()
    return model, run_tokenizer(run)


def begin_with_adapter(config: ConfigT, base: Path) -> ConfigT:
    """The configuration of a training that begins with an adapter: what the adapter is decides what is trained.

    Raises:
        ModelError: no adapter, or one that is not for this base. UsageError: an option says otherwise than it.
    """
    if config.adapter_name_or_path is None:
        return config
    given = config.adapter_name_or_path
    path = hub.resolve_adapter(given)
    raw, adapter = read_adapter_config(path)
    wanted = {
        "lora_r": adapter.r,
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.use_rslora,
        "rank_pattern": dict(adapter.rank_pattern),
        "alpha_pattern": dict(adapter.alpha_pattern),
        "use_dora": adapter.use_dora,
        "modules_to_save": ",".join(raw.get("modules_to_save") or ()),
    }
    model = build_empty(read_config(base))
    wanted["target_modules"] = ",".join(shortest_targets(model, adapted_layers(model, path)))
    for name, value in wanted.items():
        if name in config.model_fields_set and not _is_same(name, getattr(config, name), value, model):
            raise UsageError(
                f"the adapter in {path} has {name} {value!r}, and {getattr(config, name)!r} was asked for",
                ways_out=[f"without --{name}: the adapter's own is taken"],
            )
    if "lora_dropout" not in config.model_fields_set:
        wanted["lora_dropout"] = adapter.dropout
    there = Path(given).expanduser()
    wanted["adapter_name_or_path"] = str(there.resolve()) if there.exists() else given
    return config.model_copy(update=wanted)


def _is_same(name: str, asked: Any, value: Any, model: Any) -> bool:
    """Whether an option asks for what an adapter has."""
    if name == "target_modules":
        return set(target_names(model, asked)) == set(target_names(model, value))
    if name == "modules_to_save":
        return {part.strip() for part in asked.split(",")} == set(value.split(","))
    return asked == value


def refuse_foreign_adapter(path: Path, digest: str, base: str) -> None:
    """Raise ModelError if an adapter says that it was trained on another base than the one of this digest."""
    facts = path / ADAPTER_FACTS
    if facts.is_file():
        before = hub.read_json(facts).get("base_digest", digest)
        refuse_other_base(digest, before, base, "--allow_other_base true")


def run_tokenizer(run: Run) -> Any:
    """The tokenizer of a run, with the chat template it was trained with.

    Raises:
        ModelError: the template beside the adapter is another one.
    """
    tokenizer = hub.load_tokenizer(run.adapter)
    expected = hub.read_json(run.adapter / ADAPTER_FACTS).get("template_sha256")
    if hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest() != expected:
        raise ModelError(
            f"the chat template in {run.adapter} is not the one this adapter was trained with",
            ways_out=["bring back chat_template.jinja of the training", "or train again with the new template"],
        )
    return tokenizer


def refuse_other_base(found: str, expected: str, path: str, allow: str = "") -> None:
    """Raise ModelError if the base is not the one an adapter was trained on. allow: how the caller is told that it is
    as good, if it can be."""
    if found != expected:
        raise ModelError(
            f"the base in {path} is not the one this adapter was trained on: its weights have changed since",
            found=f"digest {found[:16]}",
            expected=f"digest {expected[:16]}",
            ways_out=[
                "bring back the base of the training",
                "or train again on this one",
                *([f"or {allow}, if you know that it is as good"] if allow else []),
            ],
        )

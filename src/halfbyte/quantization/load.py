"""A model directory to a transformers model whose linear weights are 4-bit, one tensor in memory at
a time.

The model is built empty (`model.architecture`), then filled (`quantization.weights`). Names on disk
go through transformers' own renamings. A model is loaded whole or not at all.
"""

from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from ..config.options import ModelOptions
from ..errors import ModelError, UsageError
from ..files.model_config import read_config, refused_by_transformers
from ..files.safetensors import Checkpoint
from ..memory.streaming import LayerStreamer
from ..model.architecture import build_empty, choose_device, choose_dtype
from ..model.targets import checkpoint_names, name_entries, quantizable, targets
from ..ops import cpu
from ..progress import Progress, no_progress
from .bnb_format import check_quantization, is_in_mxfp4, quantized_names, stored_form
from .cache import CacheEntry, cached, remove
from .mxfp4 import empty_held, is_held
from .weights import QuantReport, WeightLoader, quantize_as

MIN_COVERAGE = 0.9


OptionsT = TypeVar("OptionsT", bound=ModelOptions)


def with_stored_form(options: OptionsT, path: Path) -> OptionsT:
    """Options as a base that is stored in 4 bits is: what was asked for of its quantization is what
    it has, or an error; what was not is taken from it.

    Raises:
        UsageError: an option says otherwise.
    """
    try:
        checkpoint = Checkpoint(path)
    except ModelError:  # no weights, which a plan does without
        return options
    stored = quantized_names(set(checkpoint.entries))
    if not stored or not options.load_in_4bit:
        return options
    forms = Counter(tuple(stored_form(checkpoint, name).items()) for name in stored)
    found = {_OPTION_OF[name]: value for name, value in forms.most_common(1)[0][0]}
    wrong = [
        f"--{name} {getattr(options, name)}, stored {value}"
        for name, value in found.items()
        if name in options.model_fields_set and getattr(options, name) != value
    ]
    if wrong:
        raise UsageError(
            f"{path} is stored in 4 bits already, otherwise than was asked for",
            found=str("; ".join(wrong)).lower(),
            ways_out=["leave these options out", "or begin with the model in 16 bits"],
        )
    return options.model_copy(update=found)


_OPTION_OF = {
    "quant_type": "bnb_4bit_quant_type",
    "double_quant": "bnb_4bit_use_double_quant",
    "block_size": "bnb_4bit_blocksize",
}


def load_base(
    path: Path, options: ModelOptions, progress: Progress = no_progress
) -> tuple[Any, QuantReport]:
    """The base model of a directory, frozen, in eval mode; with weight_streaming its 4-bit weights
    stay in a file.

    Raises:
        ModelError: missing, unexpected or misshapen tensors (all in one message), a NaN, or too
            little quantized.
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
        model, report = _load(path, kept.path, options, device, progress, LayerStreamer())
    except ModelError as error:
        if kept.path == path:  # somebody's own directory, and no entry of the cache
            raise
        raise _damaged(kept, path, error.what) from error
    if report.digest != kept.digest:
        raise _damaged(kept, path, f"digest {report.digest[:16]}, not {kept.digest[:16]}")
    report.tensors = kept.tensors
    return model, report


def _damaged(kept: CacheEntry, path: Path, found: str) -> ModelError:
    """The error for quantized weights that are not what was written; an entry of the cache is
    removed."""
    if remove(kept):
        end, way = "; they are removed", "repeat the command: they are made anew"
    elif kept.path == path:
        end, way = "", "quantize the model again"
    else:
        end, way = "", "delete this directory, and repeat the command"
    return ModelError(
        f"the quantized weights in {kept.path} are damaged{end}", found=found, ways_out=[way]
    )


def _load(
    path: Path,
    weights: Path,
    options: ModelOptions,
    device: torch.device,
    progress: Progress,
    streamer: LayerStreamer | None,
) -> tuple[Any, QuantReport]:
    """The model of a directory with weights that may lie in another."""
    dtype = choose_dtype(options.dtype, device)
    config = read_config(path)
    check_quantization(path, getattr(config, "quantization_config", None))
    checkpoint = Checkpoint(weights)
    model = build_empty(config, tied=options.tie_word_embeddings)
    loader = WeightLoader(model, checkpoint, options, dtype, device, streamer)
    loader.check_names()
    for source in progress(loader.sources, len(loader.sources), "loading"):
        loader.load(source)
    model.tie_weights()
    _place_buffers(model, device, dtype)
    if left := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ModelError(
            f"{len(left)} parameters of the model are in no file", found=", ".join(left[:5])
        )
    model.requires_grad_(False)
    model.eval()
    model.config.dtype = dtype
    _load_generation_config(model, path)
    report = QuantReport(
        options.bnb_4bit_quant_type, loader.coverage(), loader.records, loader.digest()
    )
    low = report.coverage < MIN_COVERAGE and not loader.stored_4bit
    if options.load_in_4bit and low and not options.allow_low_coverage:
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


def _place_buffers(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Put them where the weights are; tables of positions that are added to embeddings in their
    dtype, as transformers does where it makes the model in it. (Others, such as rotary
    frequencies, are fp32 in every dtype.)"""
    for module in model.modules():
        added = "SinusoidalPositionalEmbedding" in type(module).__name__
        for name, buffer in module._buffers.items():
            if buffer is not None:
                own = dtype if added and buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = buffer.to(device, own)


def empty_base(
    config: Any, options: ModelOptions, dtype: torch.dtype, checkpoint: Checkpoint | None = None
) -> Any:
    """What `load_base` makes, on the ``meta`` device: the same shapes, types and 4-bit parts, and
    no weights.

    Args:
        checkpoint: the weights' headers, which are given the model's names (`name_entries`); what
            they hold in 4 bits is held as it is stored.

    Raises:
        ModelError: transformers cannot build it.
    """
    model = build_empty(config, tied=options.tie_word_embeddings)
    if checkpoint is not None:
        name_entries(model, checkpoint.entries)
    forms: dict[str, dict[str, Any]] = {}
    held: set[str] = set()
    if options.load_in_4bit:
        forms = {name: {} for name in quantizable(model)}
        if checkpoint is not None:
            entries = checkpoint.entries
            if stored := quantized_names(set(entries)):
                names = checkpoint_names(model, stored)
                forms = {names[name]: stored_form(checkpoint, name) for name in stored}
            blocks = [name for name, entry in entries.items() if is_held(entry)]
            held = set(checkpoint_names(model, blocks).values())
        elif is_in_mxfp4(config):
            held = {target.name for target in targets(model) if target.is_expert}
    for module_name, module in model.named_modules():
        for attribute, p in module._parameters.items():
            if p is not None:
                value = p.data.to(dtype)
                name = f"{module_name}.{attribute}"
                if name in held:
                    value = empty_held(value.shape, dtype)
                elif (form := forms.get(name)) is not None:
                    value = quantize_as(value, options, **form).with_dtype(dtype)
                module._parameters[attribute] = nn.Parameter(value, requires_grad=False)
    model.tie_weights()
    model.eval()
    model.config.dtype = dtype
    return model

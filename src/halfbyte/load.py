"""A model directory to a transformers model whose linear weights are 4-bit, one tensor in memory at a time.

The model is built empty (`architecture`), then filled (`filler`). Names on disk go through transformers' own renamings.
A model is loaded whole or not at all.
"""

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import hub
from .architecture import Progress, build_empty, choose_device, choose_dtype, no_progress, read_config
from .config import ModelOptions
from .errors import HalfbyteError, ModelError, UsageError
from .filler import Filler, QuantReport
from .lora import load_adapter
from .ops import cpu
from .paged import Travel
from .quantized import cached, check_quantization, remove
from .run import ADAPTER_FACTS, Run, is_run

MIN_COVERAGE = 0.9


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
    return _load(path, options, device, progress, None)


def _load_streamed(
    path: Path, options: ModelOptions, device: torch.device, progress: Progress
) -> tuple[Any, QuantReport]:
    if device.type != "cpu" or not options.load_in_4bit:
        raise UsageError(
            "weight_streaming is for 4-bit weights on a CPU",
            found=f"device {device.type}, load_in_4bit {str(options.load_in_4bit).lower()}",
        )
    kept = cached(path, options, progress)
    model, report = _load(kept.path, options, device, progress, Travel())
    if report.digest != kept.digest:
        removed = remove(kept)
        raise ModelError(
            f"the quantized weights in {kept.path} are damaged{'; they are removed' if removed else ''}",
            found=f"digest {report.digest[:16]}",
            expected=f"digest {kept.digest[:16]}",
            ways_out=["repeat the command: they are made anew" if removed else "quantize the model again"],
        )
    report.tensors = kept.tensors
    return model, report


def _load(
    path: Path, options: ModelOptions, device: torch.device, progress: Progress, travel: Travel | None
) -> tuple[Any, QuantReport]:
    dtype = choose_dtype(options.dtype, device)
    config = read_config(path)
    check_quantization(path, getattr(config, "quantization_config", None))
    checkpoint = hub.Checkpoint(path)
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
        try:
            model.generation_config = GenerationConfig.from_pretrained(path)
        except HalfbyteError:
            raise
        except Exception as error:
            message = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(f"{path}/generation_config.json is refused by transformers", found=message) from error


def _place_buffers(model: nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


# --- a model or a run -------------------------------------------------------------------------------------------------


def load(model_or_run: str | Path, *, progress: Progress = no_progress, **changes: Any) -> tuple[Any, Any]:
    """A transformers model, quantized, and its tokenizer; with the adapter, if it is a run directory.

    Args:
        model_or_run: Hub id, model directory or run directory. changes: fields of `config.ModelOptions`; a run's
            base is held as it was in training unless changed here.

    Raises:
        ModelError, UsageError: as `load_base` and `lora.load_adapter`.
    """
    if not is_run(model_or_run):
        path = hub.resolve(str(model_or_run), changes.get("revision"))
        model, _ = load_base(path, ModelOptions(**changes), progress)
        return model, hub.load_tokenizer(path)
    run = Run.open(model_or_run)
    info, trained = run.info(), run.config()
    options = ModelOptions(**{**trained.holding(), **changes})
    if "weight_streaming" not in changes and choose_device(options.device).type != "cpu":
        options.weight_streaming = "never"  # what was too large there is not here
    if trained.full:
        model, _ = load_base(run.adapter, options, progress)
    else:
        model, report = load_base(hub.resolve(info["base"]["path"], options.revision), options, progress)
        if options.held_as(trained):
            refuse_other_base(report.digest, info["base"]["digest"], info["base"]["path"])
        load_adapter(model, run.adapter)
        model.eval()
    return model, run_tokenizer(run)


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


def refuse_other_base(found: str, expected: str, path: str) -> None:
    """Raise ModelError if the base is not the one an adapter was trained on."""
    if found != expected:
        raise ModelError(
            f"the base in {path} is not the one this adapter was trained on: its weights have changed since",
            found=f"digest {found[:16]}",
            expected=f"digest {expected[:16]}",
            ways_out=["bring back the base of the training", "or train again on this one"],
        )

"""A model directory to a transformers model whose linear weights are 4-bit, one tensor in memory at a time.

The model is built empty, from transformers' own class. Then each tensor is read alone, quantized or cast, put in its
place and freed: peak memory is the finished model plus the largest tensor. Names on disk go through transformers' own
renamings. What does not fit is collected and reported in one error: a model is loaded whole or not at all.
"""

import copy
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable
from concurrent import futures
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import hub, nf4, ops
from .config import ModelOptions
from .errors import HalfbyteError, ModelError, UsageError
from .lora import load_adapter
from .nf4 import NF4Tensor
from .ops import cpu
from .run import ADAPTER_FACTS, Run, is_run

MIN_COVERAGE = 0.9
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
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except HalfbyteError:
        raise
    except Exception as error:  # whatever a foreign config makes transformers raise
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path}/config.json is refused by transformers", found=message) from error


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
    try:
        with init_empty_weights(include_buffers=False):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except HalfbyteError:
        raise
    except Exception as error:  # whatever a foreign config makes transformers raise
        message = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError("transformers cannot build the model of this config.json", found=message[:300]) from error


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
    return nf4.quantize(
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


@dataclass
class QuantReport:
    """quant.json: what was quantized and how well."""

    quant_type: str
    coverage: float
    tensors: list[dict[str, Any]]
    digest: str
    """sha256 over all weights as they are held: 4-bit codes and scales, other tensors as they are stored."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "quant_type": self.quant_type,
            "coverage": self.coverage,
            "digest": self.digest,
            "tensors": self.tensors,
        }


def load_base(path: Path, options: ModelOptions, progress: Progress = no_progress) -> tuple[Any, QuantReport]:
    """The base model of a directory, frozen, in eval mode.

    Raises:
        ModelError: missing, unexpected or misshapen tensors (all in one message), a NaN, or too little quantized.
    """
    if "kernels" in options.model_fields_set:
        cpu.use(options.kernels)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    config = read_config(path)
    _check_quantization(path, getattr(config, "quantization_config", None))
    checkpoint = hub.Checkpoint(path)
    model = build_empty(config)
    filler = _Filler(model, checkpoint, options, dtype, device)
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


def _check_quantization(path: Path, config: Any) -> None:
    if config is None:
        return
    values = config if isinstance(config, dict) else config.to_dict()
    if values.get("quant_method") != "bitsandbytes" or values.get("load_in_8bit"):
        raise ModelError(
            f"{path} is quantized in a format that is not read here",
            found=f"quant_method {values.get('quant_method')!r}",
            expected="an unquantized checkpoint, or bitsandbytes 4-bit",
        )


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


class _Filler:
    """Fills an empty model from a checkpoint, tensor by tensor."""

    def __init__(
        self, model: Any, checkpoint: hub.Checkpoint, options: ModelOptions, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.model, self.checkpoint, self.options = model, checkpoint, options
        self.dtype, self.device = dtype, device
        self.stored_4bit = nf4.quantized_names(set(checkpoint.entries))
        plain = [n for n in checkpoint if not any(n.startswith(f"{q}.") for q in _parents(n) & self.stored_4bit)]
        self.sources = plain
        self.targets = checkpoint_names(model, plain)
        head = model.get_output_embeddings()
        self.linear = quantizable(model)
        embeddings = {id(m.weight) for m in (model.get_input_embeddings(), head) if m is not None}
        self.in_layers = {
            name: p.numel() for name, p in model.named_parameters() if p.dim() >= 2 and id(p) not in embeddings
        }
        self.records: list[dict[str, Any]] = []
        self.hashes: dict[str, futures.Future[str]] = {}
        # where weights are read to be quantized: the same memory for all, so that freed pieces of their size do not
        # pile up between the pieces that stay
        read = [
            n for n in plain if options.load_in_4bit and self.targets[n] in self.linear and n not in self.stored_4bit
        ]
        most = max((checkpoint.entries[n].nbytes for n in read), default=0)
        self.buffer = torch.empty(most, dtype=torch.uint8)
        self.room = torch.empty(2, _SAMPLE if read else 0, device=device)
        self.hasher = futures.ThreadPoolExecutor(max_workers=1)

    def check_names(self) -> None:
        """Everything that does not fit, in one error, from the headers alone."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        buffers = dict(self.model.named_buffers())
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        ignored = list(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or [])
        found = set(self.targets.values())
        problems = [f"missing: {name}" for name in parameters.keys() - found - tied]
        for source, target in self.targets.items():
            expected = parameters.get(target, buffers.get(target))
            if expected is None:
                if not _matches(target, ignored) and "rotary_emb.inv_freq" not in target:
                    problems.append(f"unexpected: {source}")
            elif source not in self.stored_4bit and self.checkpoint.entries[source].shape != tuple(expected.shape):
                shape = list(self.checkpoint.entries[source].shape)
                problems.append(f"{source}: {shape} in the file, {list(expected.shape)} in the model")
        if problems:
            more = f"; and {len(problems) - 12} more" if len(problems) > 12 else ""
            raise ModelError(
                f"the weights in {self.checkpoint.directory} do not fit {type(self.model).__name__}",
                found="; ".join(sorted(problems)[:12]) + more,
                ways_out=["check that config.json belongs to these weights"],
            )

    def fill(self, source: str) -> None:
        """Read one tensor, quantize or cast it, and put it in its place."""
        target = self.targets[source]
        module_name, _, attribute = target.rpartition(".")
        try:
            module = self.model.get_submodule(module_name)
        except AttributeError:
            return
        if source in self.stored_4bit:
            value: Tensor = self._stored(source, target)
        else:
            in_4bit = target in self.linear and self.options.load_in_4bit
            tensor = self.checkpoint.read(source, self.buffer if in_4bit else None)
            if not in_4bit:
                self._hash(source, [tensor])
            if attribute in module._buffers:
                buffer = module._buffers[attribute]
                module._buffers[attribute] = tensor.to(self.device, buffer.dtype if buffer is not None else None)
                return
            if attribute not in module._parameters:
                return
            if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
                raise ModelError(
                    f"{source} is stored as {tensor.dtype}, which is not read here",
                    ways_out=["use a 16- or 32-bit version of the model"],
                )
            if in_4bit:
                value = self._quantize(source, tensor)
            else:
                value = tensor.to(self.device, self.dtype)
                self._refuse_non_finite(source, value)
        module._parameters[attribute] = nn.Parameter(value, requires_grad=False)

    def _stored(self, source: str, target: str) -> Tensor:
        tensor = nf4.read_stored(self.checkpoint, source)
        expected = self.model.get_parameter(target).shape
        if tensor.shape != expected:
            raise ModelError(f"{source}: {list(tensor.shape)} in the file, {list(expected)} in the model")
        if not self.options.load_in_4bit:
            return tensor.dequantize(self.dtype).to(self.device)
        self.records.append(self._record(source, tensor, None))
        self._hash(source, tensor.stored_tensors())
        return tensor.with_dtype(self.dtype)._map(lambda part: part.to(self.device))

    def _hash(self, source: str, tensors: Iterable[Tensor]) -> None:
        """Hash beside the next tensor's reading; one at a time, so that no more than one is kept alive for it."""
        futures.wait(self.hashes.values())
        self.hashes[source] = self.hasher.submit(_digest, list(tensors))

    def digest(self) -> str:
        digests = sorted((source, future.result()) for source, future in self.hashes.items())
        self.hasher.shutdown()
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def _quantize(self, source: str, tensor: Tensor) -> Tensor:
        tensor = tensor if tensor.dtype in (torch.float32, torch.bfloat16, torch.float16) else tensor.float()
        try:
            quantized = quantize_as(tensor.to(self.device), self.options)
        except ValueError as error:
            raise self._non_finite(source, str(error)) from error
        self.records.append(self._record(source, quantized, tensor))
        self._hash(source, quantized.stored_tensors())
        return quantized.with_dtype(self.dtype)

    def _refuse_non_finite(self, source: str, tensor: Tensor) -> None:
        # the extremes carry a NaN or an infinity, and need no copy of the tensor to be found
        if tensor.numel() and not all(math.isfinite(end) for end in torch.stack(torch.aminmax(tensor)).tolist()):
            raise self._non_finite(source, f"{int((~torch.isfinite(tensor)).sum())} values are NaN or infinite")

    def _non_finite(self, source: str, found: str) -> ModelError:
        return ModelError(
            f"the weight {source} is not finite",
            where=str(self.checkpoint.entries[source].file),
            found=found,
            ways_out=["download the file again", "or use another checkpoint of the model"],
        )

    def _record(self, source: str, quantized: NF4Tensor, original: Tensor | None) -> dict[str, Any]:
        record: dict[str, Any] = {
            "name": source,
            "shape": list(quantized.shape),
            "bytes": quantized.stored_bytes,
            "weights": quantized.numel(),
        }
        if original is not None:
            record["relative_mse"] = relative_error(quantized, original, self.room)
        return record

    def coverage(self) -> float:
        """Share of the weights in layers (all but embeddings, head and vectors) that is held in 4 bits."""
        total = sum(self.in_layers.values())
        return sum(record["weights"] for record in self.records) / total if total else 0.0


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType]
    return digest.hexdigest()


_SAMPLE = 1 << 20


def relative_error(quantized: NF4Tensor, original: Tensor, room: Tensor) -> float:
    """Squared quantization error over squared weight, of the first million weights (whole blocks).

    Args:
        room: fp32 [2, a million], overwritten: temporary tensors between the weights that stay would split the heap.
    """
    n = min(_SAMPLE, original.numel())
    n = n if n == original.numel() else n - n % quantized.block_size
    parts = quantized.parts
    blocks = -(-n // parts.block_size)
    if n < original.numel():
        groups = -(-blocks // parts.nested_block_size)
        parts = parts._replace(
            packed=parts.packed[: n // 2],
            absmax=parts.absmax[:blocks],
            nested_absmax=None if parts.nested_absmax is None else parts.nested_absmax[:groups],
        )
    values, reference = room[0, :n], room[1, :n]
    ops.dequantize_4bit(parts, n, torch.float32, values)
    reference.copy_(original.reshape(-1)[:n])
    power = float(torch.linalg.vector_norm(reference))
    return (float(torch.linalg.vector_norm(values.sub_(reference))) / power) ** 2 if power else 0.0


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


def _matches(name: str, patterns: list[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


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

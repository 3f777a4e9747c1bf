"""A base in 4 bits on disk, as bitsandbytes stores it, written a tensor at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..codebooks import MXFP4, MXFP4_BLOCK
from ..config.options import ModelOptions
from ..errors import ModelError, UsageError
from ..files import atomic, hub
from ..files.model_config import read_config
from ..files.safetensors import INDEX, SINGLE, Checkpoint, TensorFile
from ..model.architecture import build_empty
from ..model.experts import fused_experts
from ..model.linear import STOOD_AS
from ..model.targets import quantizable
from ..model.wrappers import left_out_paths
from ..progress import Progress
from .bnb_format import STATE_KEY, check_quantization, components, quantized_names, stored_keys
from .mxfp4 import is_held
from .tensor import NESTED_BLOCK_SIZE, NF4Tensor
from .weights import QuantReport, WeightLoader

SHARD = 4 << 30
"""Bytes of one file, about."""
FACTS = "halfbyte_quantized.json"
_STATE_ROOM = 512
"""Longest quant_state, bytes: six short entries, a shape, a number."""


def write_quantized(
    path: Path,
    options: ModelOptions,
    directory: Path,
    progress: Progress,
    *,
    whole: bool = False,
) -> QuantReport:
    """The weights of a model directory in 4 bits, with its configuration, into a directory; and
    their digest.

    Args:
        options: quant_type, block size, double quantization. What is not held in 4 bits is written
            as it is.
        whole: with what is not read of a wrapper, its towers, for others to read.

    Raises:
        ModelError: as `quantization.load.load_base`.
        StorageError: the disk said no.
    """
    config = read_config(path)
    check_quantization(path, getattr(config, "quantization_config", None))
    checkpoint = Checkpoint(path)
    loader = WeightLoader(
        build_empty(config), checkpoint, options, torch.bfloat16, torch.device("cpu")
    )
    loader.check_names()
    written_out = [*loader.sources, *(loader.unread if whole else ())]
    shards, weight_map, size = list(_shards(loader, written_out)), {}, 0
    waiting = iter(progress(written_out, len(written_out), "quantizing"))
    for number, sources in enumerate(shards):
        name = (
            SINGLE
            if len(shards) == 1
            else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        )
        known: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        late: dict[str, int] = {}
        for source in sources:
            layout = _layout(loader, source)
            late |= {key: shape[0] for key, (_, shape) in layout.items() if STATE_KEY in key}
            known |= {key: value for key, value in layout.items() if key not in late}
        with TensorFile(directory / name, known, late) as file:
            for _ in sources:
                source = next(waiting)
                read = checkpoint.read if source in loader.unread else loader.read
                value = read(source)
                written = (
                    components(source, value) if isinstance(value, NF4Tensor) else {source: value}
                )
                for key, tensor in written.items():
                    file.write(key, tensor)
            size += file.written
        weight_map |= dict.fromkeys((*known, *late), name)
    for _ in waiting:  # the progress bar ends
        pass
    if len(shards) > 1:
        atomic.write_json(
            directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map}
        )
    said = atomic.read_json(path / "config.json")  # of stored 4-bit weights it says what they are
    atomic.write_json(
        directory / "config.json",
        said if loader.stored_4bit else {**said, **_quantization(options, _kept(loader.model))},
    )
    report = QuantReport(
        options.bnb_4bit_quant_type, loader.coverage(), loader.records, loader.digest()
    )
    atomic.write_json(directory / FACTS, {"digest": report.digest, "tensors": report.tensors})
    return report


def _kept(model: Any) -> list[str] | None:
    """The linear layers that others are to leave in 16 bits, and what is not read here; None where
    it is the output head alone, as they do by themselves."""
    held = quantizable(model)
    layers = [path for path, part in model.named_modules() if isinstance(part, nn.Linear)]
    kept = [path for path in layers if f"{path}.weight" not in held]
    head = [path for path in kept if model.get_submodule(path) is model.get_output_embeddings()]
    kept += left_out_paths(model)
    return None if kept == head else sorted(kept)


def _quantization(options: ModelOptions, kept: list[str] | None) -> dict[str, Any]:
    """What config.json says of the weights, by the names that other tools read."""
    settings = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_quant_type": options.bnb_4bit_quant_type,
        "bnb_4bit_use_double_quant": options.bnb_4bit_use_double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": kept,
        "llm_int8_threshold": 6.0,
    }
    return {"quantization_config": settings}


def _shards(loader: WeightLoader, sources: list[str]) -> Iterator[list[str]]:
    """Sources in the order they lie on disk, in files of about `SHARD` bytes."""
    part: list[str] = []
    size = 0
    for source in sources:
        part.append(source)
        size += sum(
            torch.Size(shape).numel() * dtype.itemsize
            for dtype, shape in _layout(loader, source).values()
        )
        if size >= SHARD:
            yield part
            part, size = [], 0
    if part:
        yield part


def _layout(loader: WeightLoader, source: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of each tensor that is stored for a source; of its quant_state, a length it
    does not exceed."""
    entry, options = loader.checkpoint.entries[source], loader.options
    if (
        source in loader.stored_4bit
    ):  # as `bnb_format.components` writes it, whatever it is stored as
        entries = loader.checkpoint.entries
        kept: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            source: (torch.uint8, (entry.nbytes, 1))
        }
        for key in stored_keys(entries, source)[1:]:
            late = STATE_KEY in key
            count = (
                max(_STATE_ROOM, entries[key].nbytes)
                if late
                else torch.Size(entries[key].shape).numel()
            )
            kept[key] = (entries[key].dtype, (count,))
        return kept
    if not loader.is_quantized(source):
        return {source: (entry.dtype, entry.shape)}
    weights = torch.Size(entry.shape).numel()
    block_size, double_quant = options.bnb_4bit_blocksize, options.bnb_4bit_use_double_quant
    quant_type = options.bnb_4bit_quant_type
    if is_held(entry):
        block_size, double_quant, quant_type = MXFP4_BLOCK, True, MXFP4
    blocks = -(-weights // block_size)
    layout: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        source: (torch.uint8, (-(-weights // 2), 1)),
        f"{source}.absmax": (torch.uint8 if double_quant else torch.float32, (blocks,)),
        f"{source}.quant_map": (torch.float32, (16,)),
    }
    if double_quant:
        layout[f"{source}.nested_absmax"] = (torch.float32, (-(-blocks // NESTED_BLOCK_SIZE),))
        layout[f"{source}.nested_quant_map"] = (torch.float32, (256,))
    layout[f"{source}.{STATE_KEY}{quant_type}"] = (torch.uint8, (_STATE_ROOM,))
    return layout


def _refuse_foreign_layers(path: Path) -> None:
    """Raise ModelError for a model whose layers transformers does not hold in 4 bits with
    bitsandbytes: subclasses of ``torch.nn.Linear`` and experts, which it leaves as they are."""
    model = build_empty(read_config(path))
    if fused_experts(model):
        raise ModelError(
            f"{path} is a mixture of experts, and no other tool would hold them in 4 bits",
            found=f"{type(model).__name__}: transformers with bitsandbytes keeps experts in 16 "
            "bits",
            ways_out=[
                "use the model in 16 bits",
                "here experts are quantized whenever it is loaded: halfbyte train, chat, eval",
            ],
        )
    held = (model.get_submodule(name.rpartition(".")[0]) for name in quantizable(model))
    named = {getattr(layer, STOOD_AS, type(layer).__name__) for layer in held}
    if foreign := sorted(named - {nn.Linear.__name__}):
        raise ModelError(
            f"{path} has layers that no other tool would hold in 4 bits: {', '.join(foreign)}",
            found=f"{type(model).__name__}, whose layers are no plain torch.nn.Linear",
            ways_out=["use the model in 16 bits"],
        )


def quantize(
    path: Path, options: ModelOptions, output_dir: str | Path, progress: Progress
) -> QuantReport:
    """A model directory with its weights in 4 bits: `write_quantized` and the tokenizer's files;
    whole, or not there.

    Raises:
        UsageError: output_dir is not empty.
        ModelError, StorageError: as `write_quantized`.
    """
    target = Path(output_dir).expanduser().absolute()
    _refuse_foreign_layers(path)
    if stored := quantized_names(set(Checkpoint(path).entries)):
        raise UsageError(
            f"{path} is in 4 bits already",
            found=f"{len(stored)} weights",
            ways_out=["use it as it is"],
        )
    with atomic.new_directory(target) as building:
        report = write_quantized(path, options, building, progress, whole=True)
        for pattern in hub.HUB_PATTERNS:
            for file in path.glob(pattern):
                there = (
                    file.suffix == ".safetensors"
                    or file.name == INDEX
                    or (building / file.name).exists()
                )
                if not there:
                    atomic.write_bytes(building / file.name, file.read_bytes())
    return report

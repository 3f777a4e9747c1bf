"""bitsandbytes' 4-bit checkpoints, read and written bit for bit (``docs/format.md``).

The bytes are bitsandbytes' bytes, so reading and writing that format is a rename (`components`,
`from_components`).
"""

import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import codebooks, ops
from ..errors import ModelError
from ..files.safetensors import DEQUANTIZED, HELD, Checkpoint, write_safetensors
from ..memory.streaming import LayerStreamer
from .tensor import NESTED_BLOCK_SIZE, NF4Tensor

STATE_KEY = "quant_state.bitsandbytes__"
_STORED = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_DTYPE_NAMES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def components(name: str, tensor: NF4Tensor) -> dict[str, Tensor]:
    """The tensors a bitsandbytes checkpoint stores for the weight ``name`` (docs/format.md).

    Raises:
        ValueError: the format has no name in bitsandbytes.
    """
    if tensor.quant_type not in codebooks.STORED_QUANT_TYPES:
        raise ValueError(f"{name}: a bitsandbytes checkpoint cannot hold {tensor.quant_type!r}")
    state: dict[str, object] = {
        "quant_type": tensor.quant_type,
        "blocksize": tensor.block_size,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
    }
    stored = {
        name: tensor.packed.view(-1, 1),
        f"{name}.absmax": tensor.absmax,
        f"{name}.quant_map": tensor.quant_map.clone(),
    }
    if tensor.nested_absmax is not None:
        assert tensor.nested_quant_map is not None and tensor.nested_offset is not None
        stored[f"{name}.nested_absmax"] = tensor.nested_absmax
        stored[f"{name}.nested_quant_map"] = tensor.nested_quant_map.clone()
        state["nested_blocksize"] = tensor.nested_block_size
        state["nested_dtype"] = "float32"
        state["nested_offset"] = tensor.nested_offset.item()
    text = json.dumps(state).encode()
    stored[f"{name}.{STATE_KEY}{tensor.quant_type}"] = torch.tensor(list(text), dtype=torch.uint8)
    return stored


def from_components(name: str, stored: dict[str, Tensor]) -> NF4Tensor:
    """The tensor ``name`` from its stored parts, bit for bit.

    Args:
        stored: every tensor whose name is ``name`` or starts with ``name.``; others are ignored.

    Raises:
        ModelError: a part is missing or of the wrong size, or the state names something we do not
            hold.
    """

    def refuse(why: str) -> ModelError:
        return ModelError(f"the stored 4-bit tensor {name} is damaged or unknown: {why}")

    keys = [key for key in stored if key.startswith(f"{name}.{STATE_KEY}")]
    if len(keys) != 1:
        raise refuse(f"expected one {name}.{STATE_KEY}<type>, found {len(keys)}")
    try:
        state = json.loads(bytes(stored[keys[0]].tolist()))
        quant_type, block_size = state["quant_type"], state["blocksize"]
        dtype, shape = _DTYPE_NAMES[state["dtype"]], torch.Size(state["shape"])
        nested = "nested_offset" in state
        offset = torch.tensor(state["nested_offset"], dtype=torch.float32) if nested else None
        if nested and state["nested_dtype"] != "float32":
            raise refuse(f"nested_dtype {state['nested_dtype']!r} (only float32 is read)")
        nested_block_size = state["nested_blocksize"] if nested else NESTED_BLOCK_SIZE
    except (KeyError, TypeError, ValueError) as error:
        raise refuse(f"its quant_state cannot be read ({error!r})") from error
    known = codebooks.STORED_QUANT_TYPES
    if quant_type not in known or not keys[0].endswith(STATE_KEY + quant_type):
        raise refuse(f"quant_type {quant_type!r} (known: {', '.join(known)})")
    wanted = ["absmax", "quant_map", *(["nested_absmax", "nested_quant_map"] if nested else [])]
    if missing := [part for part in wanted if f"{name}.{part}" not in stored]:
        raise refuse(f"{', '.join(missing)} missing")
    part = {key: stored[f"{name}.{key}"].view(-1) for key in wanted}
    parts = ops.FourBit(
        stored[name].view(torch.uint8).view(-1),
        part["absmax"],
        part["quant_map"],
        part.get("nested_absmax"),
        part.get("nested_quant_map"),
        offset,
        block_size,
        nested_block_size,
    )
    try:
        ops.check_storage(parts, shape.numel())
    except (TypeError, ValueError) as error:
        raise refuse(str(error)) from error
    return NF4Tensor(parts, shape, dtype, quant_type)


def quantized_names(names: set[str]) -> set[str]:
    """The weights among checkpoint names that are stored in 4 bits."""
    return {name.partition(f".{STATE_KEY}")[0] for name in names if f".{STATE_KEY}" in name}


def stored_form(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """How a 4-bit weight is stored, by its header alone: settings of `tensor.quantize`."""
    entries = checkpoint.entries
    (key,) = (key for key in stored_keys(entries, name) if STATE_KEY in key)
    blocks = torch.Size(entries[f"{name}.absmax"].shape).numel()
    return {
        "quant_type": key.partition(STATE_KEY)[2],
        "double_quant": f"{name}.nested_absmax" in entries,
        # a power of two; the last block may be short
        "block_size": 1 << (2 * entries[name].nbytes // max(1, blocks) - 1).bit_length(),
    }


def read_checkpoint(directory: str | Path) -> dict[str, Tensor]:
    """All tensors of a model directory, 4-bit ones as `NF4Tensor`, bit for bit (docs/format.md)."""
    checkpoint = Checkpoint(Path(directory))
    quantized = quantized_names(set(checkpoint.entries))
    return {
        name: read_stored(checkpoint, name) if name in quantized else checkpoint.read(name)
        for name in weight_names(checkpoint, quantized)
    }


def weight_names(names: Iterable[str], quantized: set[str]) -> list[str]:
    """Return the weights among a checkpoint's tensors: what a quantized one is stored as counts as
    one, by the weight's name.

    Args:
        quantized: the weights that are stored in 4 bits (`quantized_names`).
    """

    def belongs_to_another(name: str) -> bool:
        parts = name.split(".")
        return any(".".join(parts[:end]) in quantized for end in range(1, len(parts)))

    return [name for name in names if name in quantized or not belongs_to_another(name)]


def stored_keys(names: Collection[str], name: str) -> list[str]:
    """The checkpoint's tensors that make up a 4-bit weight."""
    known = (*codebooks.QUANT_TYPES, codebooks.MXFP4)
    states = [f"{name}.{STATE_KEY}{quant_type}" for quant_type in known]
    return [key for key in (name, *(f"{name}.{part}" for part in _STORED), *states) if key in names]


def read_stored(
    checkpoint: Checkpoint, name: str, streamer: LayerStreamer | None = None, group: int = 0
) -> NF4Tensor:
    """One 4-bit tensor of a bitsandbytes checkpoint.

    Args:
        streamer: codes and scales stay in the file (one that `files.safetensors.TensorFile` wrote),
            as members of this group of it.
    """
    entries = {key: checkpoint.entries[key] for key in stored_keys(checkpoint.entries, name)}
    stays = (name, f"{name}.absmax") if streamer is not None else ()
    stored = {
        key: streamer.tensor(group, entry.file, entry.start, entry.nbytes).view(entry.dtype)
        if streamer is not None and key in stays
        else checkpoint.read(key)
        for key, entry in entries.items()
    }
    tensor = from_components(name, stored)
    if streamer is not None:
        tensor.streamed = streamer.handle(group)
    return tensor


def write_checkpoint(path: str | Path, tensors: dict[str, Tensor]) -> None:
    """Tensors to one safetensors file, 4-bit ones in bitsandbytes' layout (docs/format.md)."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stored.update(components(name, tensor) if isinstance(tensor, NF4Tensor) else {name: tensor})
    write_safetensors(Path(path), stored)


def check_quantization(path: Path, config: Any) -> None:
    """Raise ModelError for weights quantized in a format that is not read here."""
    if config is None:
        return
    values = config if isinstance(config, dict) else config.to_dict()
    method = values.get("quant_method")
    if method is None and (values.get("load_in_4bit") or values.get("load_in_8bit")):
        method = "bitsandbytes"  # as transformers takes a configuration of older releases
    eight = method == "bitsandbytes" and values.get("load_in_8bit")
    if method == HELD:
        return
    if method in DEQUANTIZED:
        if unread := _not_fp8(values):
            raise ModelError(
                f"{path} is quantized in a format that is not read here",
                found=f"quant_method {method!r}, {unread}",
                expected=_READ,
                ways_out=["use a 16-bit version of the model"],
            )
        return
    if method != "bitsandbytes" or eight:
        raise ModelError(
            f"{path} is quantized in a format that is not read here",
            found="bitsandbytes in 8 bits" if eight else f"quant_method {method!r}",
            expected=_READ,
        )


_READ = "an unquantized checkpoint, bitsandbytes 4-bit, FP8, or MXFP4"


def _not_fp8(values: dict[str, Any]) -> str:
    """What a configuration of FP8 says that is not read here, else ""."""
    if (experts := values.get("expert_dtype", "fp8")) != "fp8":
        return f"expert_dtype {experts!r}"
    fp8 = values.get("quant_method") == "fp8"
    form = values.get("format", "float-quantized" if fp8 else None)
    groups = values.get("config_groups")
    forms = {each.get("format") or form for each in groups.values()} if groups else {form}
    other = sorted(str(form) for form in forms - {"float-quantized", "naive-quantized"})
    return f"format {other[0]!r}" if other else ""


def is_in_mxfp4(config: Any) -> bool:
    """Whether a model's configuration says that its files hold experts in MXFP4."""
    return _values(getattr(config, "quantization_config", None)).get("quant_method") == HELD


def _values(config: Any) -> dict[str, Any]:
    """Of a quantization's configuration."""
    return config if isinstance(config, dict) else config.to_dict() if config else {}


def quantized_line(model_config: Any) -> str:
    """A line where a base is stored in FP8 or MXFP4, else ""."""
    if is_in_mxfp4(model_config):
        return (
            "the base's experts are stored in MXFP4, and held so: nothing of them is quantized "
            "again; what is merged is stored in 16 bits"
        )
    values = _values(getattr(model_config, "quantization_config", None))
    if values.get("quant_method") not in DEQUANTIZED:
        return ""
    groups = (values.get("config_groups") or {}).values()
    scheme = values.get("activation_scheme") or any(g.get("input_activations") for g in groups)
    static = ", and activations are not quantized as it does" if scheme else ""
    return (
        "the base is stored in FP8: each weight is multiplied out to 16 bits as it is read, and "
        f"held as those of a 16-bit base{static}; what is merged is stored in 16 bits"
    )

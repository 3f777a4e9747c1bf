"""Tests of `quantization.bnb_format`."""

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes import functional as bnb

from halfbyte.errors import ModelError
from halfbyte.files.safetensors import read_header, read_tensor
from halfbyte.quantization.bnb_format import (
    components,
    from_components,
    read_checkpoint,
    write_checkpoint,
)
from halfbyte.quantization.tensor import NF4Tensor, quantize

from ..helpers import FLOAT_TYPES, random_weight


def test_nested_codes_differ_at_near_ties_only():
    """bitsandbytes looks codes up in 65,536 steps and sums the mean in another order: under 1 % of
    codes, by one."""
    w = random_weight((512, 4096), torch.float32)
    _, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = quantize(w)
    assert ours.nested_absmax is not None and ours.nested_offset is not None
    steps = (ours.absmax.int() - state.absmax.int()).abs()
    assert int(steps.max()) <= 1 and float((steps > 0).float().mean()) < 0.01
    torch.testing.assert_close(ours.nested_absmax, state.state2.absmax, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.nested_offset, state.offset.view(()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_their_nested_bytes_dequantize_bit_equal(dtype: torch.dtype):
    for shape in [(64, 172), (65,), (128, 512)]:
        packed, state = bnb.quantize_4bit(
            random_weight(shape, dtype), blocksize=64, quant_type="nf4", compress_statistics=True
        )
        stored = {
            "w": packed,
            **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()},
        }
        ours = from_components("w", stored)
        assert torch.equal(ours.dequantize(), bnb.dequantize_4bit(packed, state)), shape


def test_bitsandbytes_opens_ours():
    w = random_weight((64, 172), torch.bfloat16)
    ours = quantize(w)
    parts = components("w", ours)
    state = bnb.QuantState.from_dict(
        {key.removeprefix("w."): value for key, value in parts.items() if key != "w"},
        device=torch.device("cpu"),
    )
    assert torch.equal(bnb.dequantize_4bit(parts["w"], state), ours.dequantize())


def test_layout_of_a_checkpoint(tmp_path: Path):
    """Names, shapes and JSON keys in the order bitsandbytes writes them; reading back is
    bit-exact."""
    ours = quantize(random_weight((64, 172), torch.bfloat16))
    write_checkpoint(tmp_path / "model.safetensors", {"a.weight": ours, "b": torch.ones(3)})
    entries = read_header(tmp_path / "model.safetensors")
    assert entries["a.weight"].shape == (64 * 172 // 2, 1)
    key = "a.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(read_tensor(entries[key], key).tolist()))
    assert list(state) == [
        "quant_type",
        "blocksize",
        "dtype",
        "shape",
        "nested_blocksize",
        "nested_dtype",
        "nested_offset",
    ]
    back = read_checkpoint(tmp_path)
    assert set(back) == {"a.weight", "b"}
    restored = back["a.weight"]
    assert isinstance(restored, NF4Tensor)
    for name in (
        "packed",
        "absmax",
        "quant_map",
        "nested_absmax",
        "nested_quant_map",
        "nested_offset",
    ):
        assert torch.equal(getattr(restored, name), getattr(ours, name)), name


def test_damaged_components_are_named():
    parts = components("w", quantize(random_weight((64, 64), torch.float32)))
    for missing in ("w.absmax", "w.nested_absmax", "w.quant_state.bitsandbytes__nf4"):
        with pytest.raises(ModelError, match="w is damaged"):
            from_components("w", {k: v for k, v in parts.items() if k != missing})
    with pytest.raises(ModelError, match="absmax must be"):
        from_components("w", {**parts, "w.absmax": parts["w.absmax"][:-1]})

"""FP8 weights with scales, read as what they stand for: beside transformers' own."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, LlamaConfig

import halfbyte
from halfbyte.config.options import ModelOptions
from halfbyte.errors import ModelError
from halfbyte.files.entries import ScaledEntry
from halfbyte.files.safetensors import Checkpoint
from halfbyte.quantization.load import load_base

from ..helpers import SIZES, give_tokenizer, train_adapter

FP8 = torch.float8_e4m3fn


def _in_fp8(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Values and scales of blocks, of which the last may be cut."""
    rows, columns = block
    out, width = weight.shape
    grid = torch.empty(-(-out // rows), -(-width // columns))
    values = torch.empty_like(weight)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            grid[i, j] = part.abs().max() / 448
            values[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = part / grid[i, j]
    return values.to(FP8), grid


def _checkpoint(path: Path, block: tuple[int, int] = (32, 32), **sizes: Any) -> Path:
    """A small Llama in bf16 whose linear layers are stored as on the Hub: FP8, scales a block."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, **sizes}))
    model.to(torch.bfloat16).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name in sorted(linear - {"lm_head.weight"}):
        tensors[name], scales = _in_fp8(tensors[name].float(), block)
        tensors[f"{name}_scale_inv"] = scales
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    _say(path, {"quant_method": "fp8", "weight_block_size": list(block)})
    give_tokenizer(path)
    return path


def _say(path: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"activation_scheme": "dynamic", **quantization}
    (path / "config.json").write_text(json.dumps(config))


def test_every_weight_is_what_transformers_makes_of_it(tmp_path: Path):
    path = _checkpoint(tmp_path / "fp8")
    model, _ = load_base(path, ModelOptions(dtype="bfloat16", load_in_4bit=False))
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    expected = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, expected[name].to(p.dtype)), name


@pytest.mark.parametrize("shape", [(), (1,), (64,), (64, 1), (2, 3)])
def test_scales_of_a_tensor_of_rows_and_of_blocks_that_are_cut(
    shape: tuple[int, ...], tmp_path: Path
):
    """fp32, so that products are exact to a rounding."""
    torch.manual_seed(1)
    values = torch.randn(64, 80).to(FP8)
    scales = torch.rand(shape) + 0.5
    save_file({"a.weight": values, "a.weight_scale": scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"dtype": "float32", "quantization_config": {"quant_method": "compressed-tensors",
             "weight_block_size": [32, 32]}}
        )
    )  # fmt: skip
    checkpoint = Checkpoint(tmp_path)
    assert isinstance(checkpoint.entries["a.weight"], ScaledEntry)
    assert set(checkpoint.entries) == {"a.weight"}
    grid = scales.view(1, 1) if scales.numel() == 1 else scales.view(len(scales), -1)
    if grid.shape == (2, 3):
        whole = grid.repeat_interleave(32, 0).repeat_interleave(32, 1)[:64, :80]
    else:
        whole = grid.expand(64, 80)
    found = checkpoint.read("a.weight")
    assert torch.equal(found, values.float() * whole)
    buffer = torch.empty(found.nbytes + 64, dtype=torch.uint8)
    assert torch.equal(checkpoint.read("a.weight", buffer), found)


def test_a_base_in_fp8_is_trained_merged_and_said(tmp_path: Path):
    path = _checkpoint(tmp_path / "fp8", hidden_size=48, block=(32, 32))
    run = train_adapter(path, tmp_path, "run", max_steps=2, judge=False, rehearse=False)
    found = json.loads((run.path / "run.json").read_text())["found"]
    assert "stored in FP8" in found["stored form"]
    receipt = halfbyte.merge(run.path, tmp_path / "merged", onto="original")
    assert receipt.recomputed
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.dtype == torch.bfloat16
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert not any("scale" in name for name in names)


def test_scales_that_do_not_belong_are_refused_at_once(tmp_path: Path):
    path = _checkpoint(tmp_path / "fp8")
    tensors = load_file(path / "model.safetensors")
    layer = "model.layers.0.self_attn"
    del tensors[f"{layer}.q_proj.weight_scale_inv"]
    tensors[f"{layer}.k_proj.weight_scale_inv"] = torch.ones(3, 3)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="do not belong together") as refused:
        Checkpoint(path)
    assert "q_proj.weight" in str(refused.value) and "k_proj.weight_scale_inv" in str(refused.value)


def test_scales_that_are_exponents_are_powers_of_two(tmp_path: Path):
    """E8M0, as such and as the bytes that other tools write it as."""
    path = _checkpoint(tmp_path / "fp8")
    stored = load_file(path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    exponents = torch.tensor([[120, 121], [122, 123]], dtype=torch.uint8)
    powers = torch.tensor([[2.0**-7, 2.0**-6], [2.0**-5, 2.0**-4]])
    whole = powers.repeat_interleave(32, 0).repeat_interleave(32, 1)
    expected = (stored[name].float() * whole).bfloat16()
    for scales in (exponents, exponents.view(torch.float8_e8m0fnu)):
        tensors = {**stored, f"{name}_scale_inv": scales}
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        assert torch.equal(Checkpoint(path).read(name), expected)


@pytest.mark.parametrize("size", [[0, 128], [128], "128", [128, -1], {"a": 1}])
def test_a_block_that_has_no_size_is_refused_by_name(size: Any, tmp_path: Path):
    path = _checkpoint(tmp_path / "fp8")
    _say(path, {"quant_method": "fp8", "weight_block_size": size})
    with pytest.raises(ModelError, match="a value no model has"):
        Checkpoint(path)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "fp8", "expert_dtype": "fp4"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        {"quant_method": "gptq"},
    ],
)
def test_other_formats_are_refused_by_name(quantization: dict[str, Any], tmp_path: Path):
    path = _checkpoint(tmp_path / "fp8")
    _say(path, quantization)
    with pytest.raises(ModelError, match="not read here") as refused:
        load_base(path, ModelOptions())
    assert any(str(value) in str(refused.value) for value in quantization.values())

"""gpt-oss in MXFP4 as the Hub has it: held as it is stored, beside what transformers reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Mxfp4Config

import halfbyte
from halfbyte.config.options import ModelOptions
from halfbyte.errors import ModelError
from halfbyte.files.model_config import read_config
from halfbyte.files.safetensors import Checkpoint
from halfbyte.model.experts import DividedExperts
from halfbyte.quantization.load import empty_base, load_base
from halfbyte.quantization.mxfp4 import read_held
from halfbyte.quantization.tensor import NF4Tensor
from halfbyte.run.source import held_in

from ..helpers import train_adapter
from ..model.test_experts import IDS, mixture

EXPERTS = ("gate_up_proj", "down_proj")


def _checkpoint(path: Path) -> Path:
    """A small gpt-oss whose experts are blocks and scales, all of both by chance."""
    mixture("gpt_oss", path)
    tensors = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(EXPERTS)]:
        experts, width, out = tensors.pop(name).shape
        size = (experts, out, width // 32)
        tensors[f"{name}_blocks"] = _bytes(0, 256, (*size, 16), generator)
        tensors[f"{name}_scales"] = _bytes(119, 125, size, generator)
    tensors = {name: t if t.dtype == torch.uint8 else t.bfloat16() for name, t in tensors.items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    return path


def _bytes(low: int, high: int, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, size, generator=generator).to(torch.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _checkpoint(tmp_path_factory.mktemp("mxfp4") / "model")


def _theirs(path: Path, dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, quantization_config=Mxfp4Config(dequantize=True)
    ).eval()


def _experts(model: Any) -> dict[str, Tensor]:
    """Of each layer with experts, its matrices as transformers joins them."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, DividedExperts):
            for part in EXPERTS:
                weights = [
                    getattr(getattr(module, str(n)), part).weight.data
                    for n in range(module.num_experts)
                ]
                whole = [w.dequantize() if isinstance(w, NF4Tensor) else w for w in weights]
                found[f"{name}.{part}"] = torch.stack([w.t() for w in whole])
    return found


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_experts_are_bit_for_bit_what_transformers_makes_of_them(
    load_in_4bit: bool, checkpoint: Path
):
    model, report = load_base(checkpoint, ModelOptions(dtype="bfloat16", load_in_4bit=load_in_4bit))
    expected = dict(_theirs(checkpoint).named_parameters())
    found = _experts(model)
    assert len(found) == 2 * model.config.num_hidden_layers
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    for name, p in model.named_parameters():
        if "experts" in name and name.endswith("weight"):
            assert isinstance(p.data, NF4Tensor) == load_in_4bit
            bits = 8 * p.data.stored_bytes / p.numel() if load_in_4bit else 16
            assert bits == 16 or 4.25 <= bits <= 4.3
    if load_in_4bit:
        assert report.coverage >= 0.97
        errors = [each for each in report.tensors if "relative_mse" in each]
        assert not any("experts" in each["name"] for each in errors)


def test_every_operation_computes_with_them_as_with_what_they_stand_for(checkpoint: Path):
    model, _ = load_base(checkpoint, ModelOptions(dtype="float32"))
    weight: Any = model.get_parameter("model.layers.0.mlp.experts.1.gate_up_proj.weight").data
    x = torch.randn(7, weight.shape[1], requires_grad=True)
    y = torch.nn.functional.linear(x, weight)
    exact = weight.dequantize(torch.float32).double()
    assert (y - x.double() @ exact.t()).norm() <= 1e-6 * y.norm()
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert (dx - dy.double() @ exact).norm() <= 1e-6 * dx.norm()


def test_every_code_and_every_exponent_stands_for_its_number(tmp_path: Path):
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(255, 16, 16).contiguous()
    exponents = torch.arange(255, dtype=torch.uint8).view(255, 1).expand(255, 16).contiguous()
    tensors = {"a.weight_blocks": codes, "a.weight_scales": exponents}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"dtype": "float32", "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = Checkpoint(tmp_path)
    assert set(stored.entries) == {"a.weight"}
    levels = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    levels = torch.tensor([*levels, *(-value for value in levels)], dtype=torch.float64)
    byte = torch.arange(256)
    row = torch.stack((levels[byte % 16], levels[byte // 16]), 1).view(-1)
    expected = (row * 2.0 ** (torch.arange(255, dtype=torch.float64) - 127).view(-1, 1)).float()
    assert torch.equal(stored.read("a.weight"), expected)
    assert torch.equal(read_held(stored.entries["a.weight"], "a.weight").dequantize(), expected)
    buffer = torch.empty(expected.nbytes + 64, dtype=torch.uint8)
    assert torch.equal(stored.read("a.weight", buffer), expected)


def test_the_plan_knows_what_is_held(checkpoint: Path):
    options = ModelOptions(dtype="bfloat16")
    model, _ = load_base(checkpoint, options)
    for stored in (Checkpoint(checkpoint), None):  # None: by its configuration alone
        empty = empty_base(read_config(checkpoint), options, torch.bfloat16, stored)
        planned = {name: p.data for name, p in empty.named_parameters()}
        for name, p in model.named_parameters():
            value: Any = planned[name]
            assert value.shape == p.shape
            if isinstance(p.data, NF4Tensor):
                assert value.stored_bytes == p.data.stored_bytes
                assert value.quant_type == p.data.quant_type


@pytest.mark.parametrize("onto", ["trained", "original"])
def test_a_run_is_merged_into_the_16_bits_transformers_knows(
    onto: str, checkpoint: Path, tmp_path: Path
):
    options = {"target_experts": True, "max_steps": 2, "judge": False, "rehearse": False}
    run = train_adapter(checkpoint, tmp_path, "run", **options)
    found = json.loads((run.path / "run.json").read_text())["found"]
    assert "MXFP4" in found["stored form"]
    receipt = halfbyte.merge(run.path, tmp_path / "merged", onto=onto, max_noise=1e9)
    assert receipt.recomputed
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert not any(name.endswith(("_blocks", "_scales")) for name in names)
    start, moved = dict(_theirs(checkpoint).named_parameters()), 0
    for name, p in merged.named_parameters():
        if name.endswith(EXPERTS):
            moved += int(not torch.equal(p, start[name]))
            assert p.shape == start[name].shape
            assert (p - start[name]).norm() <= 0.1 * start[name].norm()
    assert moved
    model, _ = halfbyte.load(run.path)
    expected = model(input_ids=IDS).logits.float()
    if onto == "trained":
        gap = (merged(input_ids=IDS).logits.float() - expected).norm()
        assert gap <= 0.05 * expected.norm()


def test_what_is_streamed_is_what_is_held(checkpoint: Path, monkeypatch: Any, tmp_path: Path):
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    options = {"dtype": "bfloat16", "device": "cpu"}
    held, report = load_base(checkpoint, ModelOptions(**options))
    streamed, again = load_base(checkpoint, ModelOptions(**options, weight_streaming="always"))
    assert again.digest == report.digest
    weight: Any = streamed.get_parameter("model.layers.1.mlp.experts.3.down_proj.weight").data
    assert (weight.quant_type, weight.streamed is not None) == ("mxfp4", True)
    assert torch.equal(streamed(input_ids=IDS).logits, held(input_ids=IDS).logits)
    assert held_in(held) == "4 bits (mxfp4, nf4)"


def test_what_does_not_belong_together_is_refused_at_once(checkpoint: Path, tmp_path: Path):
    tensors = load_file(checkpoint / "model.safetensors")
    path = tmp_path / "model"
    path.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    layer = "model.layers.{}.mlp.experts"
    del tensors[f"{layer.format(0)}.gate_up_proj_scales"]
    short = tensors[f"{layer.format(1)}.down_proj_scales"][..., :1].contiguous()
    tensors[f"{layer.format(1)}.down_proj_scales"] = short
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as refused:
        load_base(path, ModelOptions())
    assert "gate_up_proj_scales is missing" in str(refused.value)
    assert "down_proj_blocks" in str(refused.value)


def test_a_scale_that_is_no_number_is_refused_by_name(checkpoint: Path, tmp_path: Path):
    tensors = load_file(checkpoint / "model.safetensors")
    path = tmp_path / "model"
    path.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 5, 0] = 255
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    for load_in_4bit in (True, False):
        with pytest.raises(ModelError, match="not finite") as refused:
            load_base(path, ModelOptions(load_in_4bit=load_in_4bit))
        assert "model.layers.1.mlp.experts.down_proj" in str(refused.value)

"""Tests of `quantization.load`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import FalconConfig, FalconForCausalLM

from halfbyte import nf4
from halfbyte.config.options import ModelOptions
from halfbyte.errors import ModelError, UsageError
from halfbyte.files.model_config import read_config
from halfbyte.files.safetensors import Checkpoint
from halfbyte.progress import no_progress
from halfbyte.quantization.bnb_format import write_checkpoint
from halfbyte.quantization.load import empty_base, load_base, with_stored_form
from halfbyte.quantization.tensor import NF4Tensor
from halfbyte.quantization.writer import quantize


@pytest.fixture
def copy_of_stories(stories: Path, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(stories, target)
    for path in (target, *target.iterdir()):
        path.chmod(0o755)
    return target


def edit(model: Path, change: Any) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


FIRST = "model.layers.0.self_attn.q_proj.weight"


def test_every_misfit_in_one_error(copy_of_stories: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["surplus.weight"] = torch.ones(2)
        tensors[FIRST] = torch.ones(3, 3)

    edit(copy_of_stories, spoil)
    with pytest.raises(ModelError, match="do not fit LlamaForCausalLM") as caught:
        load_base(copy_of_stories, ModelOptions())
    for part in ("missing: model.norm.weight", "unexpected: surplus.weight", f"{FIRST}: [3, 3]"):
        assert part in caught.value.found


@pytest.mark.parametrize("name", [FIRST, "model.norm.weight"])
def test_nan_names_tensor_and_file(copy_of_stories: Path, name: str):
    edit(copy_of_stories, lambda tensors: tensors[name].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(ModelError, match=f"{name} is not finite") as caught:
        load_base(copy_of_stories, ModelOptions())
    assert caught.value.where.endswith("model.safetensors") and caught.value.exit_code == 6


def test_truncated_and_damaged_files(copy_of_stories: Path):
    file = copy_of_stories / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    with pytest.raises(ModelError, match="truncated"):
        load_base(copy_of_stories, ModelOptions())
    for damaged in (
        b"",
        whole[:5],
        b"\xff" * 64,
        whole + b"x",
        whole.replace(b'"F32"', b'"F99"', 1),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match="not an intact safetensors file"):
            load_base(copy_of_stories, ModelOptions())


def test_foreign_code_pickles_and_formats_are_refused(copy_of_stories: Path):
    config = copy_of_stories / "config.json"
    original = json.loads(config.read_text())
    config.write_text(
        json.dumps({**original, "model_type": "mystery", "auto_map": {"AutoConfig": "x.Y"}})
    )
    with pytest.raises(ModelError, match="not a causal language model") as caught:
        load_base(copy_of_stories, ModelOptions())
    assert "never run" in caught.value.found
    config.write_text(
        json.dumps({**original, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ModelError, match="format that is not read"):
        load_base(copy_of_stories, ModelOptions())
    eight = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config.write_text(json.dumps({**original, "quantization_config": eight}))
    with pytest.raises(ModelError, match="format that is not read") as caught:
        load_base(copy_of_stories, ModelOptions())
    assert caught.value.found == "bitsandbytes in 8 bits"
    config.write_text(json.dumps(original))
    (copy_of_stories / "model.safetensors").rename(copy_of_stories / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights only"):
        load_base(copy_of_stories, ModelOptions())


def test_a_tied_tensor_is_found_under_any_of_its_names(tiny_llama: Any, tmp_path: Path):
    """A file may hold the head, the embedding or both; both must be the same."""
    config = tiny_llama.config
    config.tie_word_embeddings = True
    model = type(tiny_llama)(config)
    model.save_pretrained(tmp_path / "embedding")
    tensors = load_file(tmp_path / "embedding" / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    rest = {name: t for name, t in tensors.items() if t is not table}
    forms = {
        "head": {**rest, "lm_head.weight": table},
        "both": {**tensors, "lm_head.weight": table.clone()},
        "torn": {**tensors, "lm_head.weight": table + 1},
    }
    for name, form in forms.items():
        shutil.copytree(tmp_path / "embedding", tmp_path / name)
        save_file(form, tmp_path / name / "model.safetensors", {"format": "pt"})
    options = ModelOptions(dtype="float32", allow_low_coverage=True)
    expected, report = load_base(tmp_path / "embedding", options)
    ids = torch.arange(8)[None]
    for name in ("head", "both"):
        found, _ = load_base(tmp_path / name, options)
        assert found.lm_head.weight is found.model.embed_tokens.weight
        assert torch.equal(found(ids).logits, expected(ids).logits)
    assert load_base(tmp_path / "head", options)[1].digest == report.digest
    with pytest.raises(ModelError, match=r"one tensor in this model.*differ in the file"):
        load_base(tmp_path / "torn", options)


def test_a_stored_base_is_what_it_is(copy_of_stories: Path, tmp_path: Path):
    """Options that were not given are taken from it, others must agree; layers that are kept in 16
    bits stay so."""
    stored = tmp_path / "stored"
    options = ModelOptions(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    options.allow_low_coverage = True
    quantize(copy_of_stories, options, stored, no_progress)
    found = with_stored_form(ModelOptions(), stored)
    assert found.bnb_4bit_quant_type == "fp4" and not found.bnb_4bit_use_double_quant
    assert with_stored_form(ModelOptions(bnb_4bit_quant_type="fp4"), stored) == found
    with pytest.raises(UsageError, match="stored in 4 bits already") as caught:
        with_stored_form(ModelOptions(bnb_4bit_quant_type="nf4"), stored)
    assert "bnb_4bit_quant_type nf4, stored fp4" in caught.value.found
    assert with_stored_form(ModelOptions(), copy_of_stories) == ModelOptions()
    config = json.loads((stored / "config.json").read_text())
    del config["quantization_config"]["quant_method"]  # as older releases wrote it
    (stored / "config.json").write_text(json.dumps(config))
    model, _ = load_base(stored, found)
    held = [p.data for p in model.parameters() if isinstance(p.data, NF4Tensor)]
    assert {t.quant_type for t in held} == {"fp4"} and all(t.nested_absmax is None for t in held)
    empty = empty_base(read_config(stored), ModelOptions(), torch.bfloat16, Checkpoint(stored))
    planned = [p.data for p in empty.parameters() if isinstance(p.data, NF4Tensor)]
    assert sum(t.stored_bytes for t in planned) == sum(t.stored_bytes for t in held)


def test_what_a_checkpoint_keeps_in_16_bits_stays_so(copy_of_stories: Path):
    checkpoint = Checkpoint(copy_of_stories)
    chosen = "model.layers.0.mlp.up_proj.weight"
    tensors = {name: checkpoint.read(name) for name in checkpoint.entries}
    tensors[chosen] = nf4.quantize(tensors[chosen])
    write_checkpoint(copy_of_stories / "model.safetensors", tensors)
    config = json.loads((copy_of_stories / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy_of_stories / "config.json").write_text(json.dumps(config))
    model, report = load_base(copy_of_stories, ModelOptions())
    held = [name for name, p in model.named_parameters() if isinstance(p.data, NF4Tensor)]
    assert held == [chosen] and [record["name"] for record in report.tensors] == [chosen]


def test_layers_that_other_tools_leave_in_16_bits_are_not_written_in_4(tmp_path: Path):
    """Falcon's are a subclass of torch's, which transformers does not exchange."""
    config = FalconConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_hidden_size=128,
    )
    FalconForCausalLM(config).bfloat16().save_pretrained(tmp_path / "falcon")
    with pytest.raises(ModelError, match="FalconLinear"):
        quantize(tmp_path / "falcon", ModelOptions(), tmp_path / "made", no_progress)
    assert not (tmp_path / "made").exists()

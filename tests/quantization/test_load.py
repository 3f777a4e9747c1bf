"""Tests of `quantization.load`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte.config.options import ModelOptions
from halfbyte.errors import (
    ModelError,
)
from halfbyte.quantization.load import load_base


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

"""Adapters of experts in PEFT's files and in ours (whole trainings: `tests/model/test_experts`)."""

from pathlib import Path

import pytest
import torch

from halfbyte.adapters.experts import adapted_experts
from halfbyte.adapters.lora import LoraLinear, lora_layers
from halfbyte.adapters.peft_files import load_adapter, save_adapter
from halfbyte.engine.learner import Learner
from halfbyte.errors import UsageError
from halfbyte.files.atomic import read_json

from ..helpers import perturb_zeros, tiny_learner
from ..model.test_experts import loaded, mixture


def learner(path: Path, **options: object) -> Learner:
    given = {"target_experts": True, "lora_r": 4, "lora_alpha": 8, "target_modules": "q_proj"}
    return tiny_learner(None, path, **{**given, **options})  # pyright: ignore[reportArgumentType]


def test_experts_share_a_dense_layers_rank_and_its_scale(tmp_path: Path):
    model = learner(mixture("qwen3_moe", tmp_path)).model
    layers = dict(lora_layers(model))
    gate = layers["model.layers.0.mlp.experts.5.gate_proj"]
    up = layers["model.layers.0.mlp.experts.5.up_proj"]
    assert gate.adapter.r == 2 and gate.adapter.scaling == 2.0 and gate.adapter.dropout == 0
    assert gate.lora_A is up.lora_A and gate.lora_B is not up.lora_B
    assert layers["model.layers.0.self_attn.q_proj"].adapter.r == 4


def test_what_is_saved_comes_back(tmp_path: Path):
    path = mixture("qwen3_moe", tmp_path / "model")
    model = learner(path).model
    perturb_zeros(model)
    save_adapter(model, tmp_path, "base")
    written = read_json(tmp_path / "adapter_config.json")
    assert "ensure_weight_tying" not in written  # nothing is tied
    assert written["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    other, _ = loaded(path)
    load_adapter(other, tmp_path)
    mine, theirs = dict(lora_layers(model)), dict(lora_layers(other))
    assert mine.keys() == theirs.keys()
    for name, layer in mine.items():
        assert isinstance(theirs[name], LoraLinear)
        assert layer.adapter.scaling == theirs[name].adapter.scaling
        for key, p in layer.trained().items():
            assert torch.equal(p, theirs[name].trained()[key]), name


def test_each_expert_has_its_columns(tmp_path: Path):
    model = learner(mixture("mixtral", tmp_path)).model
    perturb_zeros(model)
    first = next(adapted_experts(model))
    a, b = first.tensors().values()
    gate, up = first.layers[3]
    assert torch.equal(a.view(4, 2, -1)[3], gate.lora_A)
    assert torch.equal(b[:, 1 * 4 + 3], torch.cat([gate.lora_B[:, 1], up.lora_B[:, 1]]))


def test_dora_of_experts_is_refused(tmp_path: Path):
    path = mixture("qwen3_moe", tmp_path)
    with pytest.raises(UsageError, match="experts take no DoRA"):
        learner(path, use_dora=True)


def test_a_dense_model_has_no_experts_to_adapt(stories: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="has no experts"):
        learner(stories)


def test_names_of_experts_lead_to_the_option(tmp_path: Path):
    """The list that most scripts have (mlx-lm 571)."""
    path = mixture("qwen3_moe", tmp_path)
    with pytest.raises(UsageError) as error:
        learner(path, target_modules="q_proj,gate_proj,up_proj,down_proj", target_experts=False)
    assert "--target_experts true" in str(error.value)

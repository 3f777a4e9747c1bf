"""Tests of `files.model_config`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from halfbyte.errors import (
    ModelError,
)
from halfbyte.files import hub
from halfbyte.files.model_config import computed_by, differences, read_config
from halfbyte.model.architecture import build_empty


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": -1},
        {"vocab_size": "many"},
        {"head_dim": 10**12},
        {"head_dim": [16, 16]},
        {"intermediate_size": [96, 0]},
        {"num_attention_heads": 0},
        {"num_experts": -1},
        {"auto_map": {"AutoModel": "x.Y"}, "model_type": "mine"},
        {"model_type": ["llama"]},
    ],
)
def test_configurations_no_model_has(reliable_inputs: Path, tmp_path: Path, change: dict[str, Any]):
    shutil.copytree(reliable_inputs / "base", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError):
        read_config(hub.resolve(str(tmp_path / "m")))


def test_a_checkpoint_does_not_choose_what_computes(tmp_path: Path):
    """Not by the name of a kernel of the Hub, which would be downloaded and run."""
    raw = json.loads((hub.resolve("demo") / "config.json").read_text())
    for name in ("evil/kernel", "flash_attention_2"):
        (tmp_path / "config.json").write_text(json.dumps({**raw, "_attn_implementation": name}))
        config = read_config(tmp_path)
        assert build_empty(config).config._attn_implementation in ("sdpa", "eager")


def test_what_decides_what_is_computed_is_compared_by_key(tmp_path: Path):
    raw = json.loads((hub.resolve("demo") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw))
    before = computed_by(tmp_path)
    named = {**raw, "transformers_version": "0", "_name_or_path": "x", "use_cache": False}
    (tmp_path / "config.json").write_text(json.dumps(named))
    assert differences(before, computed_by(tmp_path)) == {}
    (tmp_path / "config.json").write_text(json.dumps({**raw, "rms_norm_eps": 1e-3}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    found = differences(before, computed_by(tmp_path))
    assert set(found) == {"rms_norm_eps", "generation.eos_token_id"}
    assert found["rms_norm_eps"][1] == 1e-3


def test_a_size_of_each_layer_and_a_mixture_of_no_experts_are_sizes(tmp_path: Path):
    """Gemma 3n and a dense Granite hybrid."""
    layers = {"intermediate_size": [64, 96], "num_hidden_layers": 2}
    for name, said in (("gemma3n_text", layers), ("granitemoehybrid", {"num_local_experts": 0})):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": name, **said}))
        assert read_config(tmp_path).model_type == name

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
from halfbyte.files.model_config import read_config


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": -1},
        {"vocab_size": "many"},
        {"head_dim": 10**12},
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

"""Tests of `files.safetensors`."""

import json
from pathlib import Path

import pytest
import torch

from halfbyte.errors import StorageError
from halfbyte.files.safetensors import Checkpoint, TensorFile, write_safetensors


def test_a_tensor_file_refuses_a_full_disk_and_leaves_nothing(tmp_path: Path):
    with (
        pytest.raises(StorageError, match="cannot write"),
        TensorFile(tmp_path / "x.safetensors", {"a": (torch.uint8, (1 << 60,))}, {}),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_single_file_stands_above_an_index_of_shards(tmp_path: Path):
    """As transformers opens a directory that holds both."""
    write_safetensors(tmp_path / "model.safetensors", {"a": torch.ones(2)})
    shard = "model-00001-of-00001.safetensors"
    write_safetensors(tmp_path / shard, {"a": torch.zeros(2)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    assert Checkpoint(tmp_path).read("a").tolist() == [1.0, 1.0]

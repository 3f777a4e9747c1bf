"""Tests of `files.safetensors`."""

from pathlib import Path

import pytest
import torch

from halfbyte.errors import StorageError
from halfbyte.files.safetensors import TensorFile


def test_a_tensor_file_refuses_a_full_disk_and_leaves_nothing(tmp_path: Path):
    with (
        pytest.raises(StorageError, match="cannot write"),
        TensorFile(tmp_path / "x.safetensors", {"a": (torch.uint8, (1 << 60,))}, {}),
    ):
        pass
    assert not list(tmp_path.iterdir())

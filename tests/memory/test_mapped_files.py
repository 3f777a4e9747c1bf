"""Tests of `memory.mapped_files`."""

import errno
import mmap
import os
from pathlib import Path

import pytest
import torch

from halfbyte.errors import StorageError
from halfbyte.memory.mapped_files import ReadOnlyMmap, ScratchFile, lies_in_memory

from ..helpers import MIB


def test_a_room_takes_memory_while_it_is_used_and_keeps_its_values(tmp_path: Path):
    file = ScratchFile(8 * MIB, tmp_path)
    assert not list(tmp_path.iterdir()), "the file has no name"
    values = file.tensor(MIB, 6 * MIB // 4, torch.float32)
    assert not values.any()
    values.copy_(torch.arange(len(values)))
    assert 6 * MIB <= file.resident_bytes() <= 8 * MIB
    file.release()
    assert file.resident_bytes() == 0
    file.will_need(0, 8 * MIB)
    assert torch.equal(values, torch.arange(len(values)).float())
    file.release(MIB, 4 * MIB)
    assert file.resident_bytes() <= 4 * MIB


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path):
    with pytest.raises(StorageError, match="cannot lay"):
        ScratchFile(1 << 60, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_system_that_maps_no_files_is_not_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Object stores, some network mounts: ENODEV."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(StorageError, match="No such device") as caught:
        ScratchFile(MIB, tmp_path)
    assert caught.value.ways_out == ("choose another --output_dir",)
    (tmp_path / "weights").write_bytes(b"weights")
    with pytest.raises(StorageError, match="cannot map") as caught:
        ReadOnlyMmap(tmp_path / "weights")
    assert "--weight_streaming never" in caught.value.ways_out[1]


def test_files_in_memory_are_known_by_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A tmpfs saves no memory, wherever it is mounted."""
    for name in ("my ram", "données", "tab\tback\\slash"):
        (tmp_path / name).mkdir()
    place = str(tmp_path).encode()
    mounts = b"\n".join(
        (
            b"/dev/sda1 / ext4 rw 0 0",
            b"tmpfs " + place + b"/my\\040ram tmpfs rw 0 0",
            b"tmpfs " + place + "/données tmpfs rw 0 0".encode(),
            b"tmpfs " + place + b"/tab\\011back\\134slash tmpfs rw 0 0",
            b"/dev/sdb1 /mnt/caf\xe9 ext4 rw 0 0",
        )
    )
    monkeypatch.setattr(Path, "read_bytes", lambda self: mounts)
    assert not lies_in_memory(tmp_path)
    for name in ("my ram", "données", "tab\tback\\slash"):
        assert lies_in_memory(tmp_path / name), name

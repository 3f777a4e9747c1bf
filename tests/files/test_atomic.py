"""Directories and files that are there whole or not at all."""

import errno
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from halfbyte.errors import ModelError, StorageError, UsageError
from halfbyte.files import atomic


def names(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_a_directory_appears_when_it_is_complete(tmp_path: Path):
    with atomic.new_directory(tmp_path / "out") as building:
        (building / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["file"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path: Path, error: BaseException):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("x")
    expected = StorageError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected), atomic.new_directory(tmp_path / "out", replace=True) as building:
        (building / "new").write_text("x")
        raise error
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["old"]


def test_what_is_there_is_replaced_only_where_that_is_meant(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with atomic.new_directory(tmp_path / "out") as building:  # an empty one gives way
        (building / "first").write_text("x")
    with pytest.raises(UsageError, match="not empty"), atomic.new_directory(tmp_path / "out"):
        raise AssertionError("not reached")
    with atomic.new_directory(tmp_path / "out", replace=True) as building:
        (building / "second").write_text("x")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["second"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="no directory"), atomic.new_directory(tmp_path / "file"):
        raise AssertionError("not reached")


def test_what_failed_is_named_where_it_lies_elsewhere(tmp_path: Path):
    with pytest.raises(StorageError) as caught, atomic.new_directory(tmp_path / "out"):
        (tmp_path / "gone").read_bytes()
    assert caught.value.where == str(tmp_path / "gone")
    assert "another directory" in caught.value.ways_out[-1]


def test_running_out_of_memory_is_no_question_of_the_disk(tmp_path: Path):
    target = tmp_path / "out"
    with pytest.raises(OSError, match="Cannot allocate"), atomic.new_directory(target):
        raise OSError(12, "Cannot allocate memory")
    assert not names(tmp_path)


def test_files_are_written_whole(tmp_path: Path):
    atomic.write_json(tmp_path / "deep/a.json", {"é": [1]})
    assert atomic.read_json(tmp_path / "deep/a.json") == {"é": [1]} and names(tmp_path) == ["deep"]
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ModelError, match="JSON object"):
        atomic.read_json(tmp_path / "list.json")
    with pytest.raises(StorageError, match="cannot write"):
        atomic.write_bytes(tmp_path / "list.json/under", b"x")


def test_a_volume_is_filled_in_place_known_files_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A mount point is not renamed onto."""
    volume = tmp_path / "volume"
    (volume / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(Path, "is_mount", lambda self: self == volume)
    moved: list[str] = []
    honest = Path.rename

    def rename(self: Path, target: Path) -> Path:
        moved.append(self.name)
        return honest(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with atomic.new_directory(volume) as building:
        assert building.parent == volume
        for name in ("config.json", "adapter_config.json", "weights", "tokenizer.json"):
            (building / name).write_text(name)
    assert moved == ["tokenizer.json", "weights", "adapter_config.json", "config.json"]
    assert names(volume) == [
        *("adapter_config.json", "config.json", "lost+found", "tokenizer.json", "weights")
    ]
    with atomic.new_directory(volume, replace=True) as building:
        (building / "config.json").write_text("new")
    assert names(volume) == ["config.json", "lost+found"]
    with pytest.raises(KeyboardInterrupt), atomic.new_directory(volume, replace=True) as building:
        (building / "config.json").write_text("newer")
        raise KeyboardInterrupt
    assert (volume / "config.json").read_text() == "new" and names(volume) == [
        *("config.json", "lost+found")
    ]


def test_a_link_means_what_it_leads_to(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with atomic.new_directory(tmp_path / "link") as building:
        (building / "file").write_text("x")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == ["file"]


def test_what_editors_leave_in_a_directory_is_nobodys(tmp_path: Path):
    (tmp_path / "out" / ".ipynb_checkpoints").mkdir(parents=True)
    with atomic.new_directory(tmp_path / "out") as building:
        (building / "file").write_text("x")
    assert "file" in names(tmp_path / "out")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_directories_that_cannot_be_synced_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    honest = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        honest(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    atomic.write_json(tmp_path / "a.json", {})
    with atomic.new_directory(tmp_path / "out") as building:
        (building / "file").write_text("x")
    assert names(tmp_path) == ["a.json", "out"]


@pytest.mark.parametrize(
    ("number", "way"),
    [
        (errno.ENOSPC, "free space"),
        (errno.EDQUOT, "free space"),
        (errno.EACCES, "fix the permissions"),
        (errno.EIO, "another"),
    ],
)
def test_the_way_out_is_the_errors_own(tmp_path: Path, number: int, way: str):
    with pytest.raises(StorageError) as caught, atomic.new_directory(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert way in caught.value.ways_out[0]
    assert ("free space" in " ".join(caught.value.ways_out)) == (way == "free space")


def test_a_file_system_that_does_not_say_is_not_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert (atomic.free_bytes(tmp_path) or 0) > 0
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda place: SimpleNamespace(total=0, free=0))
    assert atomic.free_bytes(tmp_path) is None


def test_what_killed_processes_wrote_aside_is_removed_and_nothing_else(tmp_path: Path):
    gone = [".run.json.13808.tmp", ".adapter.77.old.tmp", ".memory.jsonl.5.tmp"]
    kept = ["run.json", ".run.json", ".notes.tmp", "mine.12.tmp"]
    for name in (*gone, *kept):
        (tmp_path / name).write_text("x")
    (tmp_path / ".adapter.41.tmp").mkdir()
    (tmp_path / ".adapter.41.tmp" / "half").write_text("x")
    atomic.remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)

"""Directories and files that are there whole or not at all."""

from pathlib import Path

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

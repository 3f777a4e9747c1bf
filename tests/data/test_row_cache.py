"""Tests of `data.row_cache`."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config.options import DataOptions
from halfbyte.data import dataset, row_cache
from halfbyte.data.dataset import Data, read_data
from halfbyte.data.stored_rows import StoredRows
from halfbyte.files import atomic

from ..helpers import A, Q


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(row_cache, "KEPT_FROM", 1)
    return tmp_path / "cache" / "rows"


def rows(path: Path, count: int = 30, **more: Any) -> str:
    talks = [{"messages": [{**Q, "content": f"hi {i}"}, A], **more} for i in range(count)]
    lines = [json.dumps(talk) for talk in talks]
    path.write_text("\n".join([*lines, '{"messages": []}', ""]))
    return str(path)


def alike(a: Data, b: Data) -> None:
    assert list(a.train.rows) == list(b.train.rows) and list(a.held_out) == list(b.held_out)
    assert [row.example for row in a.train.rows] == [row.example for row in b.train.rows]
    assert a.counts() == b.counts() and a.noticed == b.noticed and a.format == b.format
    assert list(map(str, a.bad)) == list(map(str, b.bad))
    assert a.questions(3) == b.questions(3)


def test_rows_are_tokenized_once(
    tmp_path: Path, stories: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    source, said = rows(tmp_path / "r.jsonl", column="kept"), list[str]()
    options = DataOptions(skip_bad=1, eval_split=4)
    first = read_data(source, options, stories, say=said.append)
    assert any("kept for other commands" in line for line in said)
    honest = dataset.encode_into
    monkeypatch.setattr(dataset, "encode_into", lambda *given: pytest.fail("tokenized again"))
    again = read_data(source, options, stories, say=said.append)
    assert any("as they were tokenized before" in line for line in said)
    alike(first, again)
    # what is decided after it is of no matter to it
    shorter = read_data(source, DataOptions(skip_bad=1, max_length=64), stories)
    assert shorter.max_length == 64
    monkeypatch.setattr(dataset, "encode_into", honest)
    changes: list[dict[str, Any]] = [
        {"assistant_only_loss": False},
        {"drop_roles": "system"},
        {"turns": "each"},
    ]
    for number, change in enumerate(changes):
        read_data(source, DataOptions(skip_bad=1, **change), stories)
        assert len([p for p in cache.iterdir() if p.is_dir()]) == min(2 + number, 3)


def test_another_file_of_that_name_is_read(tmp_path: Path, stories: Path, cache: Path):
    options = DataOptions(skip_bad=1)
    read_data(rows(tmp_path / "r.jsonl"), options, stories)
    assert len(read_data(rows(tmp_path / "r.jsonl", 31), options, stories).train.rows) == 31


@pytest.mark.parametrize("where", ["begin", "end"])
def test_rows_that_cannot_be_kept_are_used(
    tmp_path: Path, stories: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    source, said = rows(tmp_path / "r.jsonl"), list[str]()
    first = read_data(source, DataOptions(skip_bad=1), stories)
    if where == "begin":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "file"))
    else:
        monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "other"))
        full = OSError(28, "No space left on device")
        monkeypatch.setattr(StoredRows, "arrays", lambda rows: raised(full))
    alike(first, read_data(source, DataOptions(skip_bad=1), stories, say=said.append))
    assert any("are not kept" in line for line in said)
    assert not list((tmp_path / "other").glob("rows/*.json")), "nothing is left behind"


def raised(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("name", ["ids", "sources", "index.npz", "rows.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_entry_is_made_anew(
    tmp_path: Path, stories: Path, cache: Path, name: str, damage: str
):
    source, options = rows(tmp_path / "r.jsonl"), DataOptions(skip_bad=1)
    first = read_data(source, options, stories)
    (entry,) = (p for p in cache.iterdir() if p.is_dir())
    data = bytearray((entry / name).read_bytes())
    data[len(data) // 2] ^= 4
    (entry / name).unlink()
    if damage != "remove":
        (entry / name).write_bytes(data if damage == "flip" else data[: len(data) // 2])
    alike(first, read_data(source, options, stories))
    assert row_cache._opened(entry) is not None, "it is whole again"


def test_a_template_that_asks_for_the_time_is_asked_each_time(
    tmp_path: Path, stories: Path, cache: Path
):
    template = tmp_path / "t.jinja"
    template.write_text(
        "{{ strftime_now('%s') }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    )
    options = DataOptions(skip_bad=1, chat_template=str(template), assistant_only_loss=False)
    for _ in range(2):
        read_data(rows(tmp_path / "r.jsonl"), options, stories)
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 2


def test_who_waits_for_rows_is_told_so(tmp_path: Path, stories: Path, cache: Path):
    source, said = rows(tmp_path / "r.jsonl"), list[str]()
    options = DataOptions(skip_bad=1)
    first = read_data(source, options, stories)
    (entry,) = (p for p in cache.iterdir() if p.is_dir())
    with ThreadPoolExecutor(1) as other:
        with atomic.locked_file(cache / f"{entry.name}.lock"):
            second = other.submit(read_data, source, options, stories, say=said.append)
            while not said:
                time.sleep(0.01)
        alike(first, second.result())
    assert "another command" in said[0]

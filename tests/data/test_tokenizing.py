"""Tests of `data.tokenizing`."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config.options import DataOptions
from halfbyte.data import row_cache, tokenizing
from halfbyte.data.dataset import Data, read_data
from halfbyte.data.formats import Example
from halfbyte.data.renderer import Renderer
from halfbyte.data.row_cache import SO_FAR, Making
from halfbyte.data.stored_rows import StoredRows
from halfbyte.data.tokenizing import encode, encode_into
from halfbyte.files import hub

from ..helpers import A, Q


def talk(number: int) -> dict[str, Any]:
    return {"messages": [{**Q, "content": f"hi {number}"}, {**A, "content": f"ho {number} " * 3}]}


def examples(count: int) -> list[Example]:
    return [Example(f"row {i}", talk(i)["messages"]) for i in range(count)]


@pytest.fixture
def batches_of_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "BATCH", 4)


@pytest.fixture
def renderer(stories: Path) -> Renderer:
    return Renderer(hub.load_tokenizer(stories))


def test_rows_keep_their_order_and_long_ones_are_taken_alone(
    renderer: Renderer, batches_of_4: None, monkeypatch: pytest.MonkeyPatch
):
    given = examples(23)
    alone = [renderer.encode([example])[0] for example in given]
    rows, bad = encode(given, renderer)
    assert list(rows) == alone and not bad
    monkeypatch.setattr(tokenizing, "BATCH_CHARACTERS", 1)
    sizes = [len(batch) for batch in tokenizing._batches(given)]
    assert sizes == [1] * 23
    assert list(encode(given, renderer)[0]) == alone


def test_no_rows_are_none(renderer: Renderer):
    rows, bad = encode([], renderer)
    assert not len(rows) and not bad


def source(path: Path, count: int = 60) -> str:
    lines = [json.dumps({**talk(i), "column": "kept"}) for i in range(count)]
    lines[7] = json.dumps({"messages": [Q]})
    path.write_text("\n".join([*lines, ""]))
    return str(path)


class Stopped(BaseException):
    """Ctrl-C, or a signal."""


@pytest.fixture
def interrupted(
    tmp_path: Path,
    stories: Path,
    monkeypatch: pytest.MonkeyPatch,
    batches_of_4: None,
) -> Path:
    """The cache's directory of a command that was interrupted after 40 rows."""
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(row_cache, "KEPT_FROM", 1)
    monkeypatch.setattr(tokenizing, "NOTED_EVERY", 0.0)
    honest = Making.note

    def note(making: Making) -> None:
        honest(making)
        if making.read >= 40:
            raise Stopped

    monkeypatch.setattr(Making, "note", note)
    with pytest.raises(Stopped):
        read_data(source(tmp_path / "r.jsonl"), OPTIONS, stories)
    monkeypatch.setattr(Making, "note", honest)
    (place,) = (tmp_path / "cache" / "rows").glob(".*.tmp")
    return place


OPTIONS = DataOptions(skip_bad=1, eval_split=4)


def as_at_once(tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch) -> Data:
    with monkeypatch.context() as patch:
        patch.setattr(row_cache, "KEPT_FROM", 1 << 40)
        return read_data(str(tmp_path / "r.jsonl"), OPTIONS, stories)


def alike(a: Data, b: Data) -> None:
    assert list(a.train.rows) == list(b.train.rows) and list(a.held_out) == list(b.held_out)
    assert a.counts() == b.counts() and a.noticed == b.noticed and a.format == b.format
    assert list(map(str, a.bad)) == list(map(str, b.bad))


def test_an_interrupted_command_is_gone_on_from(
    tmp_path: Path, stories: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
):
    said, asked = list[str](), Counter[str]()
    honest = Renderer.tokenize

    def tokenize(self: Renderer, given: list[Example]) -> Any:
        asked.update(example.where for example in given)
        return honest(self, given)

    monkeypatch.setattr(Renderer, "tokenize", tokenize)
    with (interrupted / "ids").open("ab") as file:
        file.write(b"what a process that died wrote")
    found = read_data(str(tmp_path / "r.jsonl"), OPTIONS, stories, say=said.append)
    assert any("going on after the 40 rows" in line for line in said)
    assert len(asked) < 25
    alike(found, as_at_once(tmp_path, stories, monkeypatch))
    assert not interrupted.exists()


@pytest.mark.parametrize("name", ["ids", "sources", SO_FAR])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_what_it_left_is_not_used_when_it_was_damaged(
    tmp_path: Path,
    stories: Path,
    interrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: str,
):
    file = interrupted / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.unlink()
    if damage != "remove":
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    said = list[str]()
    found = read_data(str(tmp_path / "r.jsonl"), OPTIONS, stories, say=said.append)
    assert not any("going on" in line for line in said)
    alike(found, as_at_once(tmp_path, stories, monkeypatch))


def test_what_failed_leaves_nothing(
    tmp_path: Path, stories: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
):
    def fails(*given: object) -> Iterator[None]:
        raise OSError("a disk gave up")

    monkeypatch.setattr(StoredRows, "extend", fails)
    with pytest.raises(OSError, match="gave up"):
        read_data(str(tmp_path / "r.jsonl"), OPTIONS, stories)
    assert not interrupted.exists()


def test_rows_refused_before_are_refused_after(tmp_path: Path, stories: Path, batches_of_4: None):
    template = (
        "{% for m in messages %}{{ raise_exception('no') if 'hi 2' == m.content }}"
        "{{ m.content }}</s>{% endfor %}"
    )
    given = examples(12)
    renderer = Renderer(hub.load_tokenizer(stories), template, assistant_only=False)
    whole = Making(StoredRows())
    encode_into(whole, given, renderer)
    assert len(whole.refused) == 1
    first = Making.going_on(tmp_path)
    encode_into(first, given[:8], renderer)
    first.note()
    second = Making.going_on(tmp_path)
    assert second.read == 8
    encode_into(second, given, renderer)
    assert list(second.rows) == list(whole.rows) and second.read == 12
    assert list(map(str, second.refused)) == list(map(str, whole.refused))

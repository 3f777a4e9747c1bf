"""Tests of `data.stored_rows`."""

import gc
import random
from pathlib import Path

import numpy
import pytest

from halfbyte.data.batches import prepare
from halfbyte.data.encoder import TokenizedExample
from halfbyte.data.formats import Example
from halfbyte.data.stored_rows import TRAINED, Selection, StoredRows
from halfbyte.errors import StorageError

from ..helpers import A, Q


def made(count: int) -> list[TokenizedExample]:
    draw = random.Random(0)
    rows = []
    for i in range(count):
        ids = [draw.randrange(200_000) for _ in range(draw.randrange(1, 40))]
        mask = [draw.random() < 0.3 for _ in ids]
        talk = Example(f"f:{i}", messages=[Q, A], part_of=f"talk {i // 3}" if i % 5 else "")
        text = Example(f"f:{i}", completion="once")
        ready = Example(f"f:{i}", input_ids=ids, loss_mask=mask)
        rows.append(TokenizedExample(f"f:{i}", ids, mask, (talk, text, ready, None)[i % 4]))
    return rows


def same(found: TokenizedExample, row: TokenizedExample) -> bool:
    return found == row and found.example == row.example


def test_rows_come_back_as_they_went():
    rows = made(300)
    stored = StoredRows(rows[:100])
    stored.extend(rows[100:])
    assert len(stored) == 300 and all(map(same, stored, rows)), "also where they were made of ids"
    assert same(stored[-1], rows[-1]) and stored.where(7) == "f:7"
    assert stored.lengths.tolist() == [len(row.input_ids) for row in rows]
    assert stored.texts.tolist() == [i % 4 == 1 for i in range(300)]
    assert stored.highest == max(id for row in rows for id in row.input_ids)
    with pytest.raises(IndexError):
        stored[300]
    assert [row.where for row in stored[10:30:7]] == ["f:10", "f:17", "f:24"]


def test_answers_of_a_conversation_have_one_number():
    of = ["a", "a", "", "", "b", "b", "b", ""]
    stored = StoredRows(
        TokenizedExample(f"{i}", [1], [True], Example(f"{i}", [Q, A], part_of=name))
        for i, name in enumerate(of)
    )
    assert stored.wholes.tolist() == [0, 0, 2, 3, 4, 4, 4, 7]
    assert stored.chosen([1, 3, 6]).wholes.tolist() == [0, 3, 4]


def test_all_rows_are_passed_in_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("halfbyte.data.stored_rows.CHUNK_TOKENS", 50)
    rows = made(120)
    stored = StoredRows(rows)
    for chosen in (stored, stored[5:100:3]):
        seen: list[int] = []
        for of, begins, marked in chosen.chunks():
            assert len(marked) == begins[-1] and (len(marked) <= 50 or of.stop - of.start == 1)
            for number in range(of.start, of.stop):
                row = chosen[number]
                part = marked[begins[number - of.start] : begins[number - of.start + 1]]
                assert (part & (TRAINED - 1)).tolist() == row.input_ids
                assert (part >= TRAINED).tolist() == row.loss_mask
                seen.append(number)
        assert seen == list(range(len(chosen)))


def test_parts_of_parts_are_parts_of_the_row():
    stored = StoredRows(made(20))
    whole = numpy.array([3, 5, 5]), numpy.array([0, 1, 3]), numpy.array([1, 3, 5])
    first = Selection(stored, *whole, parts=numpy.array([0, 1, 2]))
    again = Selection(first, numpy.array([2, 0]), numpy.array([1, 0]), numpy.array([2, 1]))
    assert [row.where for row in again] == ["f:5 part 2", "f:3"]
    assert again[0].input_ids == stored[5].input_ids[4:5] and again[0].example is None
    assert again.where(0) == "f:5 part 2"


@pytest.mark.parametrize("over_length", ["truncate", "drop"])
def test_counts_are_those_of_rows_looked_at_one_by_one(
    over_length: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("halfbyte.data.stored_rows.CHUNK_TOKENS", 64)
    rows, limit = made(400), 16
    found = prepare(rows, limit, over_length)  # pyright: ignore[reportArgumentType]
    kept: list[tuple[list[int], list[bool]]] = []
    cut = ends = 0
    for row in rows:
        long, text = len(row.input_ids) > limit, bool(row.example and row.example.completion)
        if long and over_length == "drop":
            continue
        starts = range(0, len(row.input_ids) if long and text else 1, limit)
        pieces = [(row.input_ids[at : at + limit], row.loss_mask[at : at + limit]) for at in starts]
        good = [piece for piece in pieces if any(piece[1][1:])]
        kept += good
        if long and not text and good:
            cut, ends = cut + 1, ends + any(row.loss_mask[limit:])
    assert [(row.input_ids, row.loss_mask) for row in found.rows] == kept
    assert (found.truncated, found.end_lost) == (cut, ends)
    assert found.supervised == sum(sum(mask[1:]) for _, mask in kept)
    assert found.tokens == sum(len(ids) for ids, _ in kept)


def test_files_end_with_the_rows_and_a_full_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path))
    fds, device = Path("/proc/self/fd"), Path("/dev/full")
    gc.collect()
    open_files = len(list(fds.iterdir())) if fds.is_dir() else 0
    stored = StoredRows(made(10))
    assert list(tmp_path.iterdir()) == [], "nothing is left behind by a kill"
    del stored
    gc.collect()
    if open_files:
        assert len(list(fds.iterdir())) == open_files
    if device.exists():
        full = StoredRows()
        full._ids = device.open("wb")
        with pytest.raises(StorageError, match="No space left") as caught:
            full.extend(made(10))
        assert any("HALFBYTE_CACHE" in way for way in caught.value.ways_out)
        with pytest.raises(OSError, match="No space"):
            full._ids.close()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "file"))
    assert len(StoredRows(made(3))) == 3, "a cache that others fill: the temporary directory"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot keep the tokenized rows"):
        StoredRows()

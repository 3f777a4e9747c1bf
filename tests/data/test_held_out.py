"""Tests of `data.held_out`."""

import hashlib
from array import array

import pytest

from halfbyte.data.encoder import TokenizedExample
from halfbyte.data.held_out import count_distinct, held_by_default, hold_out, row_digests
from halfbyte.data.stored_rows import StoredRows
from halfbyte.errors import DataError


def test_rows_that_are_equal_when_they_are_cut_stay_on_one_side():
    rows = StoredRows(
        TokenizedExample(f"{start}.{end}", [start] * 6 + [end] * 4, [True] * 10)
        for start in range(10, 20)
        for end in range(30, 34)
    )
    kept, out = hold_out(rows, 0.25, row_digests(rows, "0", 6))
    assert {row.input_ids[0] for row in kept}.isdisjoint(row.input_ids[0] for row in out)
    kept, out = hold_out(rows, 0.25, row_digests(rows, "0", None))
    assert not {row.input_ids[0] for row in kept}.isdisjoint(row.input_ids[0] for row in out)


def test_the_choice_is_by_the_digest_of_seed_and_ids():
    """As it was when every row was a list: a run of an earlier release holds out the same."""
    rows = StoredRows(TokenizedExample(f"{i}", [i % 50, i % 7, i], [True] * 3) for i in range(200))

    def digest(row: TokenizedExample) -> bytes:
        return hashlib.sha256(b"3" + array("q", row.input_ids[:2]).tobytes()).digest()

    digests = row_digests(rows, "3", 2)
    expected = sorted(range(200), key=lambda i: (digest(rows[i]), i))[:20]
    edge = digest(rows[expected[-1]])
    expected += [i for i in range(200) if i not in expected and digest(rows[i]) == edge]
    _, out = hold_out(rows, 20, digests)
    assert [row.where for row in out] == [str(i) for i in sorted(expected)]
    assert count_distinct(digests) == len({digest(row) for row in rows})


def test_few_rows_are_all_trained():
    assert [held_by_default(n) for n in (1, 99, 100, 1000, 10**6)] == [0, 0, 16, 20, 64]
    rows = StoredRows(TokenizedExample(f"{i}", [i], [True]) for i in range(5))
    kept, out = hold_out(rows, 0, row_digests(rows, "", None))
    assert len(kept) == 5 and not len(out)
    with pytest.raises(DataError, match="holds out all 5 rows"):
        hold_out(rows, 5, row_digests(rows, "", None))

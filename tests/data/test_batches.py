"""Tests of `data.batches`."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.data.batches import Schedule, collate, pack, prepare
from halfbyte.data.encoder import TokenizedExample
from halfbyte.data.stored_rows import StoredRows
from halfbyte.errors import DataError
from halfbyte.ops.library import ROW_MULTIPLE


def row(length: int, supervised_from: int = 1) -> TokenizedExample:
    return TokenizedExample(
        f"f:{length}", list(range(length)), [i >= supervised_from for i in range(length)]
    )


def test_labels_are_shifted_within_rows_only():
    batch = collate([row(3), row(4, 2)], [1, 0])
    assert batch.input_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert batch.labels.tolist() == [-100, 2, 3, -100, 1, 2, -100]
    assert batch.cu_seqlens.tolist() == [0, 4, 7]
    assert [(at, part.labels.tolist()) for at, part in batch.split(1)] == [
        (0, [-100, 2, 3, -100]),
        (4, [1, 2, -100]),
    ]
    assert [(at, part.rows, part.cu_seqlens.tolist()) for at, part in batch.split(7)] == [
        (0, batch.rows, [0, 4, 7])
    ]


def test_padding_is_a_row_of_its_own_that_trains_nothing():
    batch = collate([row(3), row(4, 2)], [1, 0])
    padded = batch.padded()
    assert len(padded.input_ids) == ROW_MULTIPLE and padded.cu_seqlens.tolist() == [0, 4, 7, 16]
    assert padded.position_ids.tolist()[7:] == [0, 1, 2, 3, 0, 1, 2, 3, 0], "no longer than a row"
    assert padded.supervised == batch.supervised and padded.padded() is padded


def test_long_rows_are_counted_not_forgotten():
    rows = [row(5), row(20), row(30, 15)]
    result = prepare(rows, 10, "truncate")
    assert (result.truncated, result.end_lost, result.dropped_unsupervised) == (1, 1, ["f:30"])
    assert prepare(rows, 10, "drop").dropped_long == ["f:20", "f:30"]
    with pytest.raises(DataError, match="longer than max_length") as caught:
        prepare(rows, 10, "error")
    assert caught.value.where == "f:20"
    with pytest.raises(DataError, match="none of 1 rows"):
        prepare([row(30, 15)], 10, "truncate")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=80), st.integers(0, 5))
def test_packing_keeps_every_row_once(lengths: list[int], epoch: int):
    rows = StoredRows(row(n) for n in lengths)
    schedule = Schedule(rows, 1, 2, 2, 40)
    sequences = list(schedule.sequences(epoch))
    assert sorted(r for sequence in sequences for r in sequence) == list(range(len(rows)))
    assert all(sum(lengths[r] for r in sequence) <= 40 for sequence in sequences)
    assert len(sequences) == len(schedule.sequences(0)), "every epoch has as many steps"
    sums = [sum(lengths[r] for r in sequence) for sequence in schedule.sequences(0)]
    assert sum(lengths[r] for r in schedule.largest()) == sum(sorted(sums)[-2:])
    assert sequences == list(schedule.sequences(epoch))
    assert [r for step in schedule.epoch(epoch) for group in step for r in group] == [
        r for sequence in sequences for r in sequence
    ]


def test_packing_fills_bins():
    assert list(pack([6, 4, 5, 5], [0, 1, 2, 3], 10)) == [[0, 1], [2, 3]]


def test_packed_sequences_come_in_no_order_of_lengths():
    """Over ten epochs the place of a sequence tells neither how many rows it holds nor how long
    they are."""
    draw = random.Random(0)
    lengths = [draw.choice((5, 9, 20, 40, 90)) for _ in range(600)]
    rows = StoredRows(TokenizedExample(str(n), [7] * n, [True] * n) for n in lengths)
    schedule = Schedule(rows, 3, 1, 1, pack_to=96)
    counts, longest, orders = [], [], set()
    for epoch in range(10):
        sequences = schedule.sequences(epoch)
        orders.add(tuple(map(tuple, sequences)))
        counts.append([len(sequence) for sequence in sequences])
        longest.append([max(lengths[i] for i in sequence) for sequence in sequences])
        assert sorted(i for sequence in sequences for i in sequence) == list(range(600))
    assert len(orders) == 10
    for measured in (counts, longest):
        values = torch.tensor(measured, dtype=torch.float64)
        places = torch.arange(values.shape[1], dtype=torch.float64).repeat(10)
        found = torch.corrcoef(torch.stack((places, values.flatten())))[0, 1]
        assert abs(float(found)) < 3 / math.sqrt(values.numel()), "three standard errors"

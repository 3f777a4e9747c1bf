"""Tests of `planning.workload`."""

from torch import Tensor

from halfbyte.data.batches import collate
from halfbyte.data.encoder import TokenizedExample


def test_encoded_rows_are_what_a_micro_batch_is_made_of():
    batch = collate([TokenizedExample("x", [1, 2, 3], [True] * 3)], [0, 0])
    assert isinstance(batch.input_ids, Tensor) and len(batch.input_ids) == 6

"""Parts of memory: a misspelt one is an error, not a new part."""

import threading

import pytest

from halfbyte.ledger import RESIDENT, Part, counted_as, current_part
from halfbyte.ops.library import record_workspace, recording_workspace


def test_tensors_count_for_the_layer_unless_said_otherwise():
    assert current_part() is Part.LIVE_LAYER
    with counted_as(Part.LOGITS):
        assert current_part() is Part.LOGITS
        with counted_as(Part.OPTIMIZER):
            assert current_part() is Part.OPTIMIZER
        seen = []
        other = threading.Thread(target=lambda: seen.append(current_part()))
        other.start()
        other.join()
        assert seen == [Part.LIVE_LAYER] and current_part() is Part.LOGITS
    assert current_part() is Part.LIVE_LAYER


def test_a_misspelt_part_is_an_error():
    with pytest.raises(ValueError, match="logit chunk"), counted_as("logit chunk"):  # pyright: ignore[reportArgumentType]
        raise AssertionError("not reached")
    with pytest.raises(ValueError, match="kernel scratches"), recording_workspace(lambda *a: None):
        record_workspace("kernel scratches", 3)  # pyright: ignore[reportArgumentType]


def test_names_in_files_are_what_they_were():
    assert [str(part) for part in RESIDENT[:2]] == ["4-bit codes", "scales"]

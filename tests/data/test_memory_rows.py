"""Rows in memory become the file that a run keeps."""

import json

import pytest

from halfbyte.data.memory_rows import rows_in_memory, rows_name
from halfbyte.errors import DataError


def test_lists_and_data_sets_are_json_lines():
    import datasets

    rows = [{"text": "é"}, {"text": "b"}]
    wanted = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    assert rows_in_memory(rows) == wanted
    assert rows_in_memory(datasets.Dataset.from_list(rows)) == wanted
    assert rows_in_memory("rows.jsonl") is None and rows_in_memory(["a.jsonl", "b.jsonl"]) is None
    assert rows_name(wanted) == rows_name(wanted) != rows_name(wanted + b"x")
    with pytest.raises(DataError, match="JSON cannot hold") as caught:
        rows_in_memory([{"text": "a"}, {"text": {1, 2}}])
    assert caught.value.where == "row 2"

"""Tests of `data.bad_rows`."""

import pytest

from halfbyte.data.bad_rows import refuse_bad
from halfbyte.errors import DataError


def test_an_error_that_quotes_each_row_is_one_kind():
    bad = [DataError("no end is written", found=f"row {i}", where=f"r:{i}") for i in range(9)]
    with pytest.raises(DataError, match="9 of 12 rows: no end is written") as caught:
        refuse_bad(bad, 12, 0)
    assert "row 0" in caught.value.found and "r:1" in caught.value.found
    bad += [DataError("refused", found=f"by {i}", where="r:10") for i in range(2)]
    with pytest.raises(DataError, match="11 of 12 rows cannot be used") as caught:
        refuse_bad(bad, 12, 0)
    lines = caught.value.found.splitlines()
    assert "9 x no end is written (such as row 0)" in lines[0] and len(lines) == 3

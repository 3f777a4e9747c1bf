"""Which rows are held out: a function of what they hold and a seed, whatever their order."""

import hashlib
from typing import Any

import numpy

from ..errors import DataError
from .stored_rows import TRAINED, Rows, Selection


def held_by_default(rows: int) -> int:
    """How many rows are held out where nobody said: two of a hundred, 16 to 64; of fewer than a
    hundred rows none."""
    return min(max(round(0.02 * rows), 16), 64) if rows >= 100 else 0


def row_digests(rows: Rows, salt: str, length: int | None) -> numpy.ndarray[Any, Any]:
    """The first 16 bytes of each row's sha256: of a salt, and of its first ``length`` ids (None:
    all). Big-endian uint64 [rows, 2], the higher half first."""
    found, at = bytearray(16 * len(rows)), 0
    for of, begins, marked in rows.chunks():
        ids = (marked & (TRAINED - 1)).astype("<i8")
        for index in range(of.stop - of.start):
            row = ids[begins[index] : begins[index + 1]][:length]
            found[at : at + 16] = hashlib.sha256(salt.encode() + row.tobytes()).digest()[:16]
            at += 16
    return numpy.frombuffer(found, ">u8").reshape(-1, 2)


def count_distinct(digests: numpy.ndarray[Any, Any]) -> int:
    """How many different ones there are."""
    order, differ = _order(digests), numpy.zeros(max(len(digests) - 1, 0), bool)
    for half in (0, 1):
        ordered = digests[:, half][order]
        differ |= ordered[1:] != ordered[:-1]
    return len(digests[:1]) + int(differ.sum())


def _order(digests: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    return numpy.lexsort((digests[:, 1], digests[:, 0]))


def hold_out(
    rows: Rows, share: float, digests: numpy.ndarray[Any, Any]
) -> tuple[Selection, Selection]:
    """(to train on, held out): a share of the rows below 1, else that many; rows of equal digests
    stay on one side, as all answers of a conversation do, which go by the digest of the last.

    Args:
        digests: `row_digests`, salted with the seed, of the tokens that rows are cut to.

    Raises:
        DataError: nothing would be left to train on.
    """
    count = len(rows)
    wanted = max(share > 0, round(share * count)) if share < 1 else int(share)
    wholes = rows.wholes
    last = numpy.searchsorted(wholes, wholes, "right") - 1  # of the same conversation
    del wholes
    order = _order(digests[last]) if (last != numpy.arange(count)).any() else _order(digests)

    def judged(place: int) -> list[int]:
        return digests[last[order[place]]].tolist()

    while 0 < wanted < count and judged(wanted) == judged(wanted - 1):
        wanted += 1
    if wanted >= count:
        raise DataError(
            f"eval_split {share:g} holds out all {count} rows: nothing is left to train on",
            ways_out=["lower --eval_split"],
        )
    out = numpy.zeros(count, bool)
    out[order[:wanted]] = True
    return rows.chosen(numpy.flatnonzero(~out)), rows.chosen(numpy.flatnonzero(out))

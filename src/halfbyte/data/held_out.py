"""Which rows are held out: a function of what they hold and a seed, whatever their order."""

import hashlib
import struct
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
    all). uint64 [rows, 2], the higher half first; each half lies in one piece."""
    found, at = numpy.empty((len(rows), 2), numpy.uint64, order="F"), 0
    for of, begins, marked in rows.chunks():
        ids = (marked & (TRAINED - 1)).astype("<i8")
        for index in range(of.stop - of.start):
            row = ids[begins[index] : begins[index + 1]][:length]
            digest = hashlib.sha256(salt.encode() + row.tobytes()).digest()
            found[at] = struct.unpack(">QQ", digest[:16])
            at += 1
    return found


def count_distinct(digests: numpy.ndarray[Any, Any]) -> int:
    """How many different ones there are."""
    differ = _steps(digests[:, 0], order := _order(digests))
    differ |= _steps(digests[:, 1], order)
    return len(digests[:1]) + int(differ.sum())


def _order(digests: numpy.ndarray[Any, Any]) -> numpy.ndarray[Any, Any]:
    """By the digest, equal ones by their place."""
    order = numpy.argsort(digests[:, 0], kind="stable")
    same = ~_steps(digests[:, 0], order)
    same &= _steps(digests[:, 1], order)
    # 64 bits that are equal by chance are not to be expected of any data
    return numpy.lexsort((digests[:, 1], digests[:, 0])) if same.any() else order


def _steps(half: numpy.ndarray[Any, Any], order: numpy.ndarray[Any, Any]) -> Any:
    """Whether each differs from the one before it in an order, but for the first."""
    ordered = half[order]
    return ordered[1:] != ordered[:-1]


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
    if (wholes[1:] == wholes[:-1]).any():  # answers of one conversation go by the last
        digests = digests[numpy.searchsorted(wholes, wholes, "right") - 1]
    del wholes
    order = _order(digests)

    def judged(place: int) -> list[int]:
        return digests[order[place]].tolist()

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

"""Tokenized rows to micro-batches, as a function of (seed, epoch): nothing is carried, so any step
can be replayed.

A *unit* is what ``per_device_train_batch_size`` counts: one row, or with packing one bin of rows
that fills ``max_length``. A micro-batch lays the rows of its units end to end; an optimizer step is
``gradient_accumulation_steps`` micro-batches. The last step of an epoch takes what is left.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, overload

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import DataError
from ..ops.library import ROW_MULTIPLE
from .encoder import TokenizedExample
from .formats import IGNORE
from .stored_rows import TRAINED, Rows, Selection, as_rows

Array = numpy.ndarray[Any, Any]
EVAL_TOKENS = 2048
"""An evaluation lays rows end to end up to this many tokens."""


@dataclass
class Prepared:
    """Rows ready to train on, and the count of everything that was done to them.

    supervised: tokens that are predicted. texts_split: texts without a prompt that were longer than
    a row may be. parts: rows they became.
    """

    rows: Rows
    given: int
    supervised: int
    truncated: int = 0
    end_lost: int = 0
    tokens_cut: int = 0
    texts_split: int = 0
    parts: int = 0
    dropped_long: list[str] = field(default_factory=list)
    dropped_unsupervised: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return int(self.rows.lengths.sum())

    def counts(self) -> dict[str, int]:
        return {
            "rows": len(self.rows),
            "tokens": self.tokens,
            "supervised_tokens": self.supervised,
            "rows_truncated": self.truncated,
            "rows_that_lost_their_end": self.end_lost,
            "rows_dropped_as_too_long": len(self.dropped_long),
            "rows_dropped_as_unsupervised": len(self.dropped_unsupervised),
        }


def prepare(
    rows: Sequence[TokenizedExample],
    max_length: int,
    over_length: Literal["truncate", "drop", "error"],
) -> Prepared:
    """Rows no longer than max_length, each with something to learn. Of a text without a prompt
    (over_length "truncate") every part is a row: it has no answer that must be whole.

    Raises:
        DataError: a row is too long (over_length "error"), or no row is left.
    """
    rows = as_rows(rows)
    lengths = rows.lengths
    long = lengths > max_length
    if over_length == "error" and long.any():
        first = int(long.argmax())
        raise DataError(
            f"a row of {lengths[first]} tokens is longer than max_length {max_length}",
            where=rows.where(first),
            ways_out=["raise --max_length", "or choose --over_length truncate or drop"],
        )
    if not long.any():
        return _uncut(rows, lengths, max_length)
    limit = min(max_length, int(lengths.max(initial=1)))  # which 32 bits hold
    divided = long & rows.texts if over_length == "truncate" else numpy.zeros_like(long)
    pieces = numpy.where(divided, -(-lengths // limit), 1).astype(numpy.int32)
    if over_length == "drop":
        pieces[long] = 0
    chosen = numpy.repeat(numpy.arange(len(rows), dtype=numpy.int32), pieces)
    firsts = numpy.cumsum(pieces, dtype=numpy.int32) - pieces
    number = numpy.arange(len(chosen), dtype=numpy.int32) - firsts[chosen]
    starts = number * numpy.int32(limit)
    stops = numpy.minimum(starts + numpy.int32(limit), lengths[chosen])
    number[~divided[chosen]] = -1
    cut = Selection(rows, chosen, starts, stops, number + numpy.int32(1))
    del firsts, number
    trained, beyond = _trained_tokens(rows, chosen, starts, stops)
    left_out = [rows.where(int(i)) for i in numpy.flatnonzero(pieces == 0)]
    unsupervised = [cut.where(int(i)) for i in numpy.flatnonzero(trained == 0)]
    kept = numpy.flatnonzero(trained)
    if not len(kept):
        raise _none_left(len(rows), left_out, unsupervised, max_length)
    truncated = (trained > 0) & long[chosen] & ~divided[chosen]
    return Prepared(
        cut if len(kept) == len(cut) else cut.chosen(kept),
        given=len(rows),
        supervised=int(trained.sum()),
        truncated=int(truncated.sum()),
        end_lost=int((truncated & (beyond > 0)).sum()),
        tokens_cut=int((lengths[chosen] - stops)[truncated].sum()),
        texts_split=int(divided.sum()),
        parts=int(pieces[divided].sum()),
        dropped_long=left_out,
        dropped_unsupervised=unsupervised,
    )


def _uncut(rows: Rows, lengths: Array, max_length: int) -> Prepared:
    """Rows of which none is too long, each with something to learn."""
    every = numpy.arange(len(rows), dtype=numpy.int32)
    none = numpy.broadcast_to(numpy.int32(0), lengths.shape)
    trained, _ = _trained_tokens(rows, every, none, lengths)
    unsupervised = [rows.where(int(i)) for i in numpy.flatnonzero(trained == 0)]
    if len(unsupervised) == len(rows):
        raise _none_left(len(rows), [], unsupervised, max_length)
    return Prepared(
        rows.chosen(numpy.flatnonzero(trained)) if unsupervised else rows,
        given=len(rows),
        supervised=int(trained.sum()),
        dropped_unsupervised=unsupervised,
    )


def _none_left(
    count: int, left_out: list[str], unsupervised: list[str], max_length: int
) -> DataError:
    return DataError(
        f"none of {count} rows is left",
        found=f"{len(left_out)} too long, {len(unsupervised)} without a trained token within "
        f"max_length {max_length}",
        where=(left_out + unsupervised)[0] if count else "",
        ways_out=["raise --max_length", "or look at the rows: the answer must lie within it"],
    )


def _trained_tokens(rows: Rows, chosen: Array, starts: Array, stops: Array) -> tuple[Array, Array]:
    """Of pieces of rows, as of a `Selection` in the order of the rows: the trained tokens in each
    but its first, which is predicted by nothing, and those of its row behind it."""
    within, beyond = numpy.zeros_like(chosen), numpy.zeros_like(chosen)
    for of, begins, marked in rows.chunks():
        counts = numpy.concatenate(([0], numpy.cumsum(marked >= TRAINED)))
        here = slice(*numpy.searchsorted(chosen, numpy.array((of.start, of.stop), chosen.dtype)))
        row = chosen[here] - of.start
        first, end = begins[row] + starts[here], begins[row] + stops[here]
        within[here] = counts[end] - counts[numpy.minimum(first + 1, end)]
        beyond[here] = counts[begins[row + 1]] - counts[end]
    return within, beyond


def coarse_length(tokens: int) -> int:
    """The next of a few lengths, four to each doubling: multiples of `ROW_MULTIPLE`, and of a
    quarter of the power of two below."""
    step = max(ROW_MULTIPLE, 1 << max(tokens.bit_length() - 3, 0))
    return -(-tokens // step) * step


@dataclass(frozen=True)
class MicroBatch:
    """Rows laid end to end. input_ids, position_ids, labels: int64 [T]; cu_seqlens: int32 [rows +
    1], from 0 to T.

    labels[t] is the token that position t shall predict, or `IGNORE`. rows: their places in the
    data file.
    """

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    rows: tuple[str, ...]

    @property
    def supervised(self) -> int:
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> "MicroBatch":
        ids, positions, labels = (
            t.to(device) for t in (self.input_ids, self.position_ids, self.labels)
        )
        return MicroBatch(ids, positions, labels, self.cu_seqlens, self.rows)

    def padded(self, coarse: bool = False) -> "MicroBatch":
        """The same rows, and a row of padding up to a multiple of `ROW_MULTIPLE` tokens (or, if
        ``coarse``, to `coarse_length`), which nothing is trained on.

        Matrix units work on 16 rows at a time, so the padding is nearly free; and a library that
        compiles and keeps a kernel per shape (oneDNN: about a megabyte each) then meets few shapes
        instead of one for every row length.
        """
        count = len(self.input_ids)
        lack = coarse_length(count) - count if coarse else -count % ROW_MULTIPLE
        if lack == 0:
            return self
        # no longer than the longest row: what a pass computes may depend on its last position
        longest = int(self.cu_seqlens.diff().max())
        positions = torch.arange(lack, device=self.position_ids.device) % longest
        return MicroBatch(
            functional.pad(self.input_ids, (0, lack)),
            torch.cat((self.position_ids, positions)),
            functional.pad(self.labels, (0, lack), value=IGNORE),
            torch.cat((self.cu_seqlens, self.cu_seqlens[-1:] + lack)),
            self.rows,
        )

    def split(
        self, most: int, kind: Callable[[int], int] = lambda length: 0
    ) -> list[tuple[int, "MicroBatch"]]:
        """Parts of whole rows that follow each other, of at most ``most`` tokens where a single row
        has no more, and of one ``kind`` of lengths; and the token of this micro-batch that each
        begins with."""
        cu_seqlens = self.cu_seqlens.tolist()
        kinds = [kind(b - a) for a, b in pairwise(cu_seqlens)]
        parts, first = [], 0
        for row in range(1, len(cu_seqlens)):
            if (
                row + 1 == len(cu_seqlens)
                or cu_seqlens[row + 1] - cu_seqlens[first] > most
                or kinds[row] != kinds[row - 1]
            ):
                parts.append((cu_seqlens[first], self._rows(first, row)))
                first = row
        return parts

    def _rows(self, first: int, last: int) -> "MicroBatch":
        """Rows ``first`` to ``last`` (exclusive)."""
        a, b = int(self.cu_seqlens[first]), int(self.cu_seqlens[last])
        return MicroBatch(
            self.input_ids[a:b],
            self.position_ids[a:b],
            self.labels[a:b],
            self.cu_seqlens[first : last + 1] - a,
            self.rows[first:last],
        )


def collate(rows: Sequence[TokenizedExample], indices: Sequence[int]) -> MicroBatch:
    """The chosen rows end to end."""
    ids, positions, labels, cu_seqlens = [], [], [], [0]
    for index in indices:
        row = rows[index]
        ids += row.input_ids
        positions += range(len(row.input_ids))
        labels += [
            token if flag else IGNORE
            for token, flag in zip(row.input_ids[1:], row.loss_mask[1:], strict=True)
        ]
        labels.append(IGNORE)
        cu_seqlens.append(len(ids))
    return MicroBatch(
        torch.tensor(ids),
        torch.tensor(positions),
        torch.tensor(labels),
        torch.tensor(cu_seqlens, dtype=torch.int32),
        tuple(rows[index].where for index in indices),
    )


def permutation(count: int, seed: int, epoch: int, of: int = 0) -> Array:
    """The order in an epoch: of rows, or (``of`` 1) of what they are packed into. int64 [count]."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + (of << 40)) % 2**63)
    return torch.randperm(count, generator=generator).numpy()


@dataclass(frozen=True)
class Units(Sequence[list[int]]):
    """Lists of row numbers. rows: all, one list after the other, int64 [rows]. ends: where each
    list ends, int64 [units]."""

    rows: Array
    ends: Array

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        begin = self.ends[index - 1] if index else 0
        return self.rows[begin : self.ends[index]].tolist()

    def reordered(self, order: Array) -> "Units":
        sizes = numpy.diff(self.ends, prepend=0)[order]
        ends = numpy.cumsum(sizes)
        within = numpy.arange(len(self.rows)) - numpy.repeat(ends - sizes, sizes)
        begins = numpy.repeat((self.ends - numpy.diff(self.ends, prepend=0))[order], sizes)
        return Units(self.rows[begins + within], ends)


def pack(lengths: Sequence[int] | Array, order: Sequence[int] | Array, capacity: int) -> Units:
    """Rows into bins of at most ``capacity`` tokens: best fit, longest first, ties in the epoch's
    order. Bins come as they are filled: those of long rows first.

    Bins are indexed by the space they have left, of which a bit says whether there are any, so the
    search is over words of lengths and not over bins. The number of bins depends on the lengths
    only, so every epoch has as many steps as the first.
    """
    lengths, order = numpy.asarray(lengths), numpy.asarray(order)
    rows = order[numpy.argsort(-lengths[order], kind="stable")]
    bins, there = array("q"), 0
    open_bins: dict[int, list[int]] = {}
    count = 0
    for need in lengths[rows].tolist():
        if fitting := there >> need:
            left = need + (fitting & -fitting).bit_length() - 1
            number = open_bins[left].pop()
            if not open_bins[left]:
                there &= ~(1 << left)
        else:
            number, left, count = count, capacity, count + 1
        bins.append(number)
        open_bins.setdefault(left - need, []).append(number)
        there |= 1 << (left - need)
    of = numpy.array(bins, numpy.int64)
    return Units(
        rows[numpy.argsort(of, kind="stable")],
        numpy.cumsum(numpy.bincount(of, minlength=count)),
    )


@dataclass(frozen=True)
class Epoch(Sequence[list[list[int]]]):
    """Per step, per micro-batch, the row numbers."""

    units: Units
    batch_size: int
    accumulation: int

    def __len__(self) -> int:
        return -(-len(self.units) // (self.batch_size * self.accumulation))

    @overload
    def __getitem__(self, index: int) -> list[list[int]]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[list[int]]]: ...
    def __getitem__(self, index: int | slice) -> list[list[int]] | list[list[list[int]]]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        start = range(len(self))[index] * self.batch_size * self.accumulation
        chosen = self.units[start : start + self.batch_size * self.accumulation]
        groups = [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]
        return [[row for unit in group for row in unit] for group in groups]


@dataclass(frozen=True)
class Schedule:
    """Which rows each optimizer step trains on."""

    rows: Rows
    seed: int
    batch_size: int
    accumulation: int
    pack_to: int | None = None

    def sequences(self, epoch: int) -> Units:
        """The epoch's units in order, each a list of row numbers."""
        order = permutation(len(self.rows), self.seed, epoch)
        if self.pack_to is None:
            return Units(order, numpy.arange(1, len(order) + 1))
        bins = pack(self.rows.lengths, order, self.pack_to)
        return bins.reordered(permutation(len(bins), self.seed, epoch, of=1))

    def largest(self) -> list[int]:
        """Row numbers of a micro-batch no smaller, in tokens, than any of any epoch: of the longest
        units."""
        units = self.sequences(0)
        begins = numpy.concatenate((units.ends[:1] * 0, units.ends[:-1]))
        tokens = numpy.add.reduceat(self.rows.lengths[units.rows], begins)
        longest = numpy.argsort(-tokens, kind="stable")[: self.batch_size]
        return [row for unit in longest.tolist() for row in units[unit]]

    def epoch(self, epoch: int) -> Epoch:
        return Epoch(self.sequences(epoch), self.batch_size, self.accumulation)


def largest_pass(rows: Rows, schedule: Schedule, tokens_per_pass: int) -> tuple[MicroBatch, int]:
    """A pass no smaller, in tokens, than any of a training, and how many passes a largest
    micro-batch takes.

    Where micro-batches go in parts it is the longest row, and a row of padding up to the limit.
    """
    largest = collate(rows, schedule.largest())
    count = len(largest.input_ids)
    if not 0 < tokens_per_pass < count:
        return largest, 1
    longest = rows[int(rows.lengths.argmax())]
    most = min(count, max(tokens_per_pass, len(longest.input_ids)))
    lack = most - len(longest.input_ids)
    padding = [TokenizedExample("padding", [0] * lack, [True] * lack)] if lack > 1 else []
    return collate([longest, *padding], range(1 + len(padding))), -(-count // most)

"""Tokenized rows to micro-batches, as a function of (seed, epoch): nothing is carried, so any step
can be replayed.

A *unit* is what ``per_device_train_batch_size`` counts: one row, or with packing one bin of rows
that fills ``max_length``. A micro-batch lays the rows of its units end to end; an optimizer step is
``gradient_accumulation_steps`` micro-batches. The last step of an epoch takes what is left.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import DataError
from ..ops.library import ROW_MULTIPLE
from .encoder import TokenizedExample
from .formats import IGNORE

EVAL_TOKENS = 2048
"""An evaluation lays rows end to end up to this many tokens."""


@dataclass
class Prepared:
    """Rows ready to train on, and the count of everything that was done to them.

    texts_split: texts without a prompt that were longer than a row may be. parts: rows they became.
    """

    rows: list[TokenizedExample]
    given: int = 0
    truncated: int = 0
    end_lost: int = 0
    tokens_cut: int = 0
    texts_split: int = 0
    parts: int = 0
    dropped_long: list[str] = field(default_factory=list)
    dropped_unsupervised: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def supervised(self) -> int:
        return sum(sum(row.loss_mask[1:]) for row in self.rows)

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
    result = Prepared([], given=len(rows))
    for row in _in_parts(rows, max_length, over_length, result):
        kept = row
        if len(row.input_ids) > max_length:
            if over_length == "error":
                raise DataError(
                    f"a row of {len(row.input_ids)} tokens is longer than max_length {max_length}",
                    where=row.where,
                    ways_out=["raise --max_length", "or choose --over_length truncate or drop"],
                )
            if over_length == "drop":
                result.dropped_long.append(row.where)
                continue
            kept = replace(
                row, input_ids=row.input_ids[:max_length], loss_mask=row.loss_mask[:max_length]
            )
        # the first token of a row is predicted by nothing
        if not any(kept.loss_mask[1:]):
            result.dropped_unsupervised.append(row.where)
            continue
        if kept is not row:
            result.truncated += 1
            result.tokens_cut += len(row.input_ids) - max_length
            result.end_lost += any(row.loss_mask[max_length:])
        result.rows.append(kept)
    if not result.rows:
        raise DataError(
            f"none of {result.given} rows is left",
            found=f"{len(result.dropped_long)} too long, {len(result.dropped_unsupervised)} "
            "without a trained token "
            f"within max_length {max_length}",
            where=(result.dropped_long + result.dropped_unsupervised)[0] if result.given else "",
            ways_out=["raise --max_length", "or look at the rows: the answer must lie within it"],
        )
    return result


def _in_parts(
    rows: Sequence[TokenizedExample], max_length: int, over_length: str, result: Prepared
) -> Iterator[TokenizedExample]:
    for row in rows:
        example, size = row.example, len(row.input_ids)
        is_text = example is not None and not (
            example.messages or example.prompt or example.input_ids
        )
        if size <= max_length or over_length != "truncate" or not is_text:
            yield row
            continue
        starts = range(0, size, max_length)
        result.texts_split += 1
        result.parts += len(starts)
        for number, start in enumerate(starts, 1):
            part = slice(start, start + max_length)
            yield TokenizedExample(
                f"{row.where} part {number}", row.input_ids[part], row.loss_mask[part]
            )


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


def permutation(count: int, seed: int, epoch: int, of: int = 0) -> list[int]:
    """The order in an epoch: of rows, or (``of`` 1) of what they are packed into."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch + (of << 40)) % 2**63)
    return torch.randperm(count, generator=generator).tolist()


def pack(lengths: Sequence[int], order: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows into bins of at most ``capacity`` tokens: best fit, longest first, ties in the epoch's
    order. Bins come as they are filled: those of long rows first.

    Bins are indexed by the space they have left, so the search is over lengths and not over bins.
    The number of bins depends on the lengths only, so every epoch has as many steps as the first.
    """
    rank = {row: place for place, row in enumerate(order)}
    bins: list[list[int]] = []
    open_bins: dict[int, list[int]] = {}
    for row in sorted(order, key=lambda r: (-lengths[r], rank[r])):
        need = lengths[row]
        left = next((space for space in range(need, capacity + 1) if open_bins.get(space)), None)
        if left is None:
            bins.append([])
            number, left = len(bins) - 1, capacity
        else:
            number = open_bins[left].pop()
        bins[number].append(row)
        open_bins.setdefault(left - need, []).append(number)
    return bins


@dataclass(frozen=True)
class Schedule:
    """Which rows each optimizer step trains on."""

    rows: Sequence[TokenizedExample]
    seed: int
    batch_size: int
    accumulation: int
    pack_to: int | None = None

    def sequences(self, epoch: int) -> list[list[int]]:
        """The epoch's units in order, each a list of row numbers."""
        order = permutation(len(self.rows), self.seed, epoch)
        if self.pack_to is None:
            return [[row] for row in order]
        bins = pack([len(row.input_ids) for row in self.rows], order, self.pack_to)
        return [bins[i] for i in permutation(len(bins), self.seed, epoch, of=1)]

    def largest(self) -> list[int]:
        """Row numbers of a micro-batch no smaller, in tokens, than any of any epoch: of the longest
        units."""
        tokens = [len(row.input_ids) for row in self.rows]
        sequences = sorted(
            self.sequences(0), key=lambda sequence: -sum(tokens[i] for i in sequence)
        )
        return [row for sequence in sequences[: self.batch_size] for row in sequence]

    def epoch(self, epoch: int) -> list[list[list[int]]]:
        """Per step, per micro-batch, the row numbers."""
        sequences = self.sequences(epoch)
        per_step = self.batch_size * self.accumulation
        steps = []
        for start in range(0, len(sequences), per_step):
            chosen = sequences[start : min(start + per_step, len(sequences))]
            micro = [
                chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)
            ]
            steps.append([[row for sequence in group for row in sequence] for group in micro])
        return steps


def largest_pass(
    rows: Sequence[TokenizedExample], schedule: Schedule, tokens_per_pass: int
) -> tuple[MicroBatch, int]:
    """A pass no smaller, in tokens, than any of a training, and how many passes a largest
    micro-batch takes.

    Where micro-batches go in parts it is the longest row, and a row of padding up to the limit.
    """
    largest = collate(rows, schedule.largest())
    count = len(largest.input_ids)
    if not 0 < tokens_per_pass < count:
        return largest, 1
    longest = max(rows, key=lambda row: len(row.input_ids))
    most = min(count, max(tokens_per_pass, len(longest.input_ids)))
    lack = most - len(longest.input_ids)
    padding = [TokenizedExample("padding", [0] * lack, [True] * lack)] if lack > 1 else []
    return collate([longest, *padding], range(1 + len(padding))), -(-count // most)

"""Tokenized rows in files, so that a data file of any size takes little memory.

Ids lie one after the other as 32 bits each, of which the highest says whether the id is trained;
what a row was made of lies in a second file. Without a directory to lie in, both are gone with the
process. In memory are some 40 bytes a row. Rows that are chosen, cut or divided are a `Selection`:
which row, from where to where.
"""

import contextlib
import marshal
import os
import tempfile
import weakref
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import IO, Any, overload

import numpy

from ..errors import StorageError
from ..files.atomic import ways_around
from ..files.places import cache_directory
from .encoder import TokenizedExample
from .formats import Example

TRAINED = 1 << 31
"""Set in a stored id that the model is trained to predict."""
CHUNK_TOKENS = 1 << 18
"""Tokens that a pass over all rows reads at once."""
_BUFFER_BYTES = 1 << 20
_FIELDS = tuple(field.name for field in fields(Example))
Array = numpy.ndarray[Any, Any]


class Rows(Sequence[TokenizedExample]):
    """Tokenized rows, and what can be known of all of them without making each."""

    @property
    @abstractmethod
    def lengths(self) -> numpy.ndarray[Any, Any]:
        """Tokens of each row: int32 [rows]."""

    @property
    @abstractmethod
    def texts(self) -> numpy.ndarray[Any, Any]:
        """Whether each row is a text without a prompt, which may be divided: bool [rows]."""

    @property
    @abstractmethod
    def wholes(self) -> numpy.ndarray[Any, Any]:
        """For each row the number of the conversation it is an answer of, equal for all answers of
        one, in the order of the rows: int32 [rows]."""

    @abstractmethod
    def marked(self, index: int) -> numpy.ndarray[Any, Any]:
        """The ids of a row, `TRAINED` set in those that are trained: uint32 [tokens]."""

    @abstractmethod
    def where(self, index: int) -> str:
        """The place of a row in the data."""

    @abstractmethod
    def row(self, index: int) -> TokenizedExample:
        """A row, made anew each time."""

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> "Selection": ...
    def __getitem__(self, index: int | slice) -> "TokenizedExample | Selection":
        if isinstance(index, slice):
            return self.chosen(numpy.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.row(index % len(self))

    def __iter__(self) -> Iterator[TokenizedExample]:
        return (self.row(index) for index in range(len(self)))

    def chosen(self, indices: "numpy.ndarray[Any, Any] | Sequence[int]") -> "Selection":
        """Some of the rows, whole."""
        chosen = numpy.asarray(indices, numpy.int32)
        return Selection(self, chosen, _zeros(chosen), self.lengths[chosen])

    def chunks(self) -> Iterator[tuple[slice, numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]]:
        """All rows, some at a time: which, where each begins in their ids (and the end of the
        last), and their ids as `marked`."""
        ends = self._ends()
        first = 0
        while first < len(self):
            last = int(numpy.searchsorted(ends, ends[first] + CHUNK_TOKENS, "right")) - 1
            last = min(max(last, first + 1), len(self))
            yield slice(first, last), ends[first : last + 1] - ends[first], self._read(first, last)
            first = last

    def _ends(self) -> numpy.ndarray[Any, Any]:
        """Where each row ends in the ids of all, after a 0: int64 [rows + 1]."""
        ends = numpy.zeros(len(self) + 1, numpy.int64)
        numpy.cumsum(self.lengths, out=ends[1:])
        return ends

    def _read(self, first: int, last: int) -> numpy.ndarray[Any, Any]:
        """Ids of the rows from ``first`` to ``last`` (exclusive) as `marked`, end to end."""
        return numpy.concatenate([self.marked(index) for index in range(first, last)])


class StoredRows(Rows):
    """Rows that are added one after the other.

    Args:
        rows: the first of them; or a directory, whose files they are to be.

    Raises:
        StorageError: the disk does not take them.
    """

    def __init__(self, rows: Iterable[TokenizedExample] | Path = ()) -> None:
        self._place = rows if isinstance(rows, Path) else None
        self._ids, self._sources = (_file(self._place, name) for name in ("ids", "sources"))
        for file in (self._ids, self._sources):
            weakref.finalize(self, file.close)
        self._starts, self._places = array("q", [0]), array("q", [0])
        self._texts, self._wholes = bytearray(), array("i")
        self._part_of = ""
        self.highest = 0
        """The highest id of all."""
        if not isinstance(rows, Path):
            self.extend(rows)

    @classmethod
    def opened(cls, place: Path, index: Mapping[str, Array], highest: int) -> "StoredRows":
        """The rows of a directory. index: what was in memory (`arrays`)."""
        rows = cls(place)
        rows._starts, rows._places, rows._wholes = (
            array(kind, index[name].tobytes())
            for kind, name in (("q", "starts"), ("q", "places"), ("i", "wholes"))
        )
        rows._texts = bytearray(index["texts"].tobytes())
        rows.highest = highest
        return rows

    def arrays(self) -> dict[str, Any]:
        """What is in memory only."""
        return {
            "starts": numpy.array(self._starts),
            "places": numpy.array(self._places),
            "wholes": numpy.array(self._wholes),
            "texts": numpy.frombuffer(bytes(self._texts), numpy.uint8),
        }

    def sizes(self) -> dict[str, int]:
        """Bytes of the rows in each file."""
        return {"ids": 4 * self._starts[-1], "sources": self._places[-1]}

    def go_on(self) -> None:
        """Be ready for more rows after `opened`: what a process that died wrote behind the last one
        is taken off."""
        for file, size in zip((self._ids, self._sources), self.sizes().values(), strict=True):
            file.truncate(size)
            file.seek(size)

    def extend(self, rows: Iterable[TokenizedExample]) -> None:
        ids, sources = bytearray(), bytearray()
        written = self._places[-1]
        for row in rows:
            marked = numpy.array(row.input_ids, numpy.uint32)
            self.highest = max(self.highest, int(marked.max(initial=0)))
            marked |= numpy.array(row.loss_mask, numpy.uint32)[: len(marked)] << 31
            ids += marked.tobytes()
            sources += marshal.dumps((row.where, _values(row)))
            self._starts.append(self._starts[-1] + len(marked))
            self._places.append(written + len(sources))
            self._note(row)
            if len(ids) + len(sources) > _BUFFER_BYTES:
                self._write(ids, sources)
                written = self._places[-1]
        self._write(ids, sources)

    def _note(self, row: TokenizedExample) -> None:
        example = row.example
        part_of = example.part_of if example else ""
        same = part_of and part_of == self._part_of
        self._wholes.append(self._wholes[-1] if same else len(self._wholes))
        self._part_of = part_of
        self._texts.append(
            example is not None
            and not (example.messages or example.prompt or example.input_ids is not None)
        )

    def _write(self, ids: bytearray, sources: bytearray) -> None:
        for file, data in ((self._ids, ids), (self._sources, sources)):
            try:
                file.write(data)
                file.flush()
            except OSError as error:
                raise StorageError(
                    f"cannot keep the tokenized rows in {cache_directory()}: {error.strerror}",
                    found=f"{len(self):,} rows, {self._starts[-1]:,} tokens so far",
                    ways_out=ways_around(error, "name another directory: HALFBYTE_CACHE=..."),
                ) from error
            data.clear()

    def __len__(self) -> int:
        return len(self._wholes)

    @property
    def lengths(self) -> numpy.ndarray[Any, Any]:
        starts = numpy.frombuffer(self._starts, numpy.int64)
        return numpy.subtract(starts[1:], starts[:-1], dtype=numpy.int32, casting="unsafe")

    def _ends(self) -> numpy.ndarray[Any, Any]:
        return numpy.frombuffer(self._starts, numpy.int64)

    @property
    def texts(self) -> numpy.ndarray[Any, Any]:
        return numpy.frombuffer(self._texts, numpy.uint8).astype(bool)

    @property
    def wholes(self) -> numpy.ndarray[Any, Any]:
        return numpy.array(self._wholes, numpy.int32)

    def marked(self, index: int) -> numpy.ndarray[Any, Any]:
        return self._read(index, index + 1)

    def _read(self, first: int, last: int) -> numpy.ndarray[Any, Any]:
        begin, end = self._starts[first], self._starts[last]
        return numpy.frombuffer(_bytes(self._ids, begin * 4, end * 4), numpy.uint32)

    def _source(self, index: int) -> tuple[str, Any]:
        raw = _bytes(self._sources, self._places[index], self._places[index + 1])
        where, values = marshal.loads(raw)
        return where, None if values is None else Example(*values)

    def where(self, index: int) -> str:
        return self._source(index)[0]

    def row(self, index: int) -> TokenizedExample:
        where, example = self._source(index)
        ids, mask = _apart(self.marked(index))
        if example is not None and example.input_ids is not None:  # it came as ids
            example = replace(example, input_ids=ids, loss_mask=mask)
        return TokenizedExample(where, ids, mask, example)


class Selection(Rows):
    """Some rows of others, each from one token to another.

    Args:
        rows: what is chosen from.
        chosen, starts, stops: the row's number, its first token, and the one behind its last: int32
            [selected rows].
        parts: the number of a row's part, from 1, where rows are divided; 0: the row itself. int32
            [selected rows].
    """

    def __init__(
        self,
        rows: Rows,
        chosen: numpy.ndarray[Any, Any],
        starts: numpy.ndarray[Any, Any],
        stops: numpy.ndarray[Any, Any],
        parts: numpy.ndarray[Any, Any] | None = None,
    ) -> None:
        parts = _zeros(chosen) if parts is None else parts
        if isinstance(rows, Selection):
            starts, stops = starts + rows._starts[chosen], stops + rows._starts[chosen]
            parts = numpy.where(parts, parts, rows._parts[chosen])
            rows, chosen = rows._rows, rows._chosen[chosen]
        self._rows, self._chosen = rows, chosen
        self._starts, self._stops, self._parts = starts, stops, parts

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def lengths(self) -> numpy.ndarray[Any, Any]:
        return self._stops - self._starts

    @property
    def texts(self) -> numpy.ndarray[Any, Any]:
        return self._rows.texts[self._chosen] & (self._parts == 0)

    @property
    def wholes(self) -> numpy.ndarray[Any, Any]:
        return self._rows.wholes[self._chosen]

    def marked(self, index: int) -> numpy.ndarray[Any, Any]:
        whole = self._rows.marked(int(self._chosen[index]))
        return whole[self._starts[index] : self._stops[index]]

    def where(self, index: int) -> str:
        where, part = self._rows.where(int(self._chosen[index])), self._parts[index]
        return f"{where} part {part}" if part else where

    def row(self, index: int) -> TokenizedExample:
        whole = self._rows.row(int(self._chosen[index]))
        of = slice(int(self._starts[index]), int(self._stops[index]))
        ids, mask = whole.input_ids[of], whole.loss_mask[of]
        if part := self._parts[index]:  # it was made of none
            return TokenizedExample(f"{whole.where} part {part}", ids, mask)
        return replace(whole, input_ids=ids, loss_mask=mask)


def _zeros(like: Array) -> Array:
    """As many zeros, which take no memory."""
    return numpy.broadcast_to(numpy.int32(0), like.shape)


def as_rows(rows: Sequence[TokenizedExample]) -> Rows:
    """Rows as they are stored."""
    return rows if isinstance(rows, Rows) else StoredRows(rows)


def _file(place: Path | None, name: str) -> IO[bytes]:
    """A file of a directory, opened as it is; else one without a name: where the cache is, or, of a
    cache that others fill, in the system's temporary directory."""
    directory = place or cache_directory()
    try:
        with contextlib.suppress(OSError) if place is None else contextlib.nullcontext():
            directory.mkdir(parents=True, exist_ok=True)
            if place is None:
                return tempfile.TemporaryFile(dir=directory)
            return os.fdopen(os.open(place / name, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        return tempfile.TemporaryFile()
    except OSError as error:
        raise StorageError(
            f"cannot keep the tokenized rows in {directory}: {error.strerror}",
            ways_out=ways_around(error, "name another directory: HALFBYTE_CACHE=..."),
        ) from error


def _bytes(file: IO[bytes], begin: int, end: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), end - begin, begin)
    at = file.tell()  # Windows
    try:
        file.seek(begin)
        return file.read(end - begin)
    finally:
        file.seek(at)


def _apart(marked: numpy.ndarray[Any, Any]) -> tuple[list[int], list[bool]]:
    return (marked & (TRAINED - 1)).tolist(), (marked >= TRAINED).tolist()


def _values(row: TokenizedExample) -> tuple[Any, ...] | None:
    """What a row was made of, without ids that are the row's own."""
    example = row.example
    if example is None:
        return None
    if example.input_ids is not None:
        example = replace(example, input_ids=[], loss_mask=[])
    return tuple(getattr(example, name) for name in _FIELDS)

"""JSON to rows: an array, an object a line, objects over several lines, an object that holds the
rows under a key."""

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import DataError
from .cells import Refuse, Row

LONGEST_LINE = 16 << 20
"""Bytes: a longer row is not one."""
ANY_LENGTH = 1 << 62


class Begun(io.RawIOBase):
    """A stream of which the beginning was read, and lines of it."""

    def __init__(self, begun: bytes, stream: IO[bytes]) -> None:
        self.begun, self.stream = begun, stream

    def read(self, size: int = -1) -> bytes:
        found, self.begun = self.begun, b""
        return found or self.stream.read(size)

    def readline(self, size: int | None = -1) -> bytes:
        line, end, rest = self.begun.partition(b"\n")
        if end:
            self.begun = rest
            return line + end
        self.begun = b""
        return line + self.stream.readline(LONGEST_LINE)

    def unread(self, line: bytes) -> None:
        self.begun = line + self.begun


class Window:
    """The text of a stream from where it is read on, as much of it as a value needs.

    Args:
        name: how places begin.

    Raises:
        DataError: naming the line: it is not UTF-8, or holds a value that is not JSON.
    """

    def __init__(self, name: str, stream: Begun) -> None:
        self._name, self._stream = name, stream
        self._text, self._at, self._line, self._ended = "", 0, 1, False
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._lines_decoded, self._bytes_of_line = 1, 0

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        while True:
            text, at = self._text, self._at
            while at < len(text) and text[at] in " \t\r\n\ufeff":
                at += 1
            self._go_to(at)
            if at < len(text):
                return text[at]
            if not self._more():
                return ""

    def skip(self) -> None:
        """Go past the character that `peek` found."""
        self._go_to(self._at + 1)

    @property
    def where(self) -> str:
        return f"{self._name}:{self._line}"

    def value(self, most: int = LONGEST_LINE) -> Any:
        """The value that begins here, of at most so many characters."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                if end < len(self._text) or not self._more():  # a number may go on
                    self._go_to(end)
                    return value
            except (ValueError, RecursionError) as error:
                if self._is_cut(error):
                    if len(self._text) - self._at > most:
                        raise _too_long(len(self._text) - self._at, self.where) from None
                    if self._more():
                        continue
                at = error.pos if isinstance(error, json.JSONDecodeError) else self._at
                line = self._line + self._text.count("\n", self._at, at)
                raise _bad_json(f"{self._name}:{line}", error) from error

    def _is_cut(self, error: ValueError | RecursionError) -> bool:
        """Whether a value may be whole when more is read: it ends within what was read."""
        return isinstance(error, json.JSONDecodeError) and (
            error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 12
        )

    def _go_to(self, at: int) -> None:
        self._line += self._text.count("\n", self._at, at)
        self._at = at

    def _more(self) -> bool:
        """Read as much as there is already; False at the end."""
        while not self._ended:
            raw = self._stream.read(max(_READ, len(self._text) - self._at))
            self._ended = not raw
            try:
                more = self._decoder.decode(raw, final=self._ended)
            except UnicodeDecodeError as error:
                line, column = self._lines_decoded, self._bytes_of_line
                raise _not_utf8(self._name, error.object, line, error, column) from error
            self._lines_decoded += raw.count(b"\n")
            last = raw.rfind(b"\n")
            self._bytes_of_line = (
                self._bytes_of_line + len(raw) if last < 0 else len(raw) - last - 1
            )
            if more:
                self._text, self._at = self._text[self._at :] + more, 0
                return True
        return False


_DECODER = json.JSONDecoder()
_READ = 1 << 20


def json_rows(
    path: Path, name: str, whole: "Begun", first: bytes, split: str, refuse: Refuse
) -> Iterator[Row]:
    """Rows of a JSON file.

    Args:
        name: how places begin.
        first: its first byte that is no space.
        split: the key of the rows, where an object holds several lists of them.
    """
    if first == b"[" and not _is_line(whole, list):
        yield from _objects(_array_items(Window(str(path), whole)), refuse)
    elif first == b"{" and not _is_line(whole, dict):
        yield from _objects(_values(name, Window(str(path), whole), split), refuse)
    else:
        yield from _objects(_lines(name, whole, split, refuse), refuse)


def _not_utf8(
    name: str, raw: bytes, line: int, error: UnicodeDecodeError, before: int = 0
) -> DataError:
    """raw begins on a line, ``before`` bytes from where that begins."""
    began = raw.rfind(b"\n", 0, error.start) + 1
    column = error.start - began + (0 if began else before)
    return DataError(
        f"the data is not UTF-8: byte 0x{raw[error.start]:02x}",
        where=f"{name}:{line + raw.count(bytes([10]), 0, error.start)}:{column}",
        ways_out=["convert the file to UTF-8, e.g. with iconv"],
    )


def text_of(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(str(path), raw, 1, error) from error


def text_lines(path: Path, stream: IO[bytes]) -> Iterator[str]:
    """The lines of a text, with their ends, whichever these are."""
    for number, raw in enumerate(iter(stream.readline, b""), 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(str(path), raw, number, error) from error
        yield from io.StringIO(line, newline="")


def _too_long(size: int, where: str) -> DataError:
    return DataError(
        f"a row of {size >> 20} MB: no model reads that much at once",
        where=where,
        ways_out=["cut it into rows", "--skip_bad N"],
    )


def _objects(pairs: Iterator[tuple[str, Any]], refuse: Refuse) -> Iterator[Row]:
    for where, value in pairs:
        if isinstance(value, dict):
            yield where, value
        elif column := _column_of(value):
            yield where, {column: value}
        else:
            refuse(
                DataError(f"a row must be a JSON object, not a {type(value).__name__}", where=where)
            )


def _column_of(value: Any) -> str:
    """Under which column a row that is nothing but the list of its messages would have them."""
    if not isinstance(value, list) or not value:
        return ""
    for column, keys in (("messages", {"role"}), ("conversations", {"from", "value"})):
        if all(isinstance(item, dict) and keys <= item.keys() for item in value):
            return column
    return ""


def _bad_json(where: str, error: ValueError | RecursionError) -> DataError:
    message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(
        f"not valid JSON: {message}",
        where=where,
        ways_out=["mend or remove this row", "--skip_bad N"],
    )


def _is_line(stream: Begun, kind: type) -> bool:
    """Whether rows of a kind stand on a line each: the first one is a value by itself, or is
    damaged and not the beginning of one over several lines (which goes on, and whose next line is
    no row). Of lists a second line must say that the first is not all of them."""
    read: list[bytes] = []
    lines: list[bytes] = []
    while len(lines) < 2 and (line := stream.readline()):
        read.append(line)
        if text := line.removeprefix(b"\xef\xbb\xbf").strip():
            lines.append(text)
    stream.unread(b"".join(read))
    first, second = (*lines, b"", b"")[:2]
    if kind is list:
        return second[:1] == b"[" and _is_value(first, list)
    return _is_value(first, dict) or first[-1:] not in (b"{", b"[", b",") or _is_value(second, dict)


def _is_value(line: bytes, kind: type) -> bool:
    """Whether a line is a whole object, or a list of messages."""
    try:
        value = json.loads(line)
        return isinstance(value, dict) if kind is dict else bool(_column_of(value))
    except UnicodeDecodeError:
        return True  # refused where it is read
    except (ValueError, RecursionError):
        return False


def _values(name: str, text: Window, split: str) -> Iterator[tuple[str, Any]]:
    """Objects that follow each other, over several lines each; or one that holds the rows."""
    found = 0
    while character := text.peek():
        if character == ",":
            text.skip()
            continue
        where = text.where
        value = text.value(LONGEST_LINE if found else ANY_LENGTH)
        found += 1
        alone = found == 1 and not text.peek()
        if alone and isinstance(value, dict) and (key := _key_of_rows(value, name, split)):
            for item, row in enumerate(value[key]):
                yield f"{name} {key}[{item}]", row
            return
        yield where, value


def _key_of_rows(value: dict[str, Any], name: str, split: str) -> str:
    """The key of an object under which a file's rows stand, "" if it is a row itself."""
    own = ("messages", "conversations", "prompt", "completion", "tools", "functions", "history")
    if any(key in value for key in (*own, "instruction", "question", "text", "input_ids")):
        return ""
    keys = [
        key
        for key, items in value.items()
        if isinstance(items, list) and items and all(isinstance(item, dict) for item in items)
    ]
    if not keys:
        return ""
    if len(keys) > 1 and split not in keys:
        raise DataError(
            "the file holds rows under several keys",
            where=name,
            found=", ".join(keys),
            ways_out=[f"--dataset_train_split {keys[0]} takes one of them"],
        )
    return split if split in keys else keys[0]


def _lines(name: str, stream: Begun, split: str, refuse: Refuse) -> Iterator[tuple[str, Any]]:
    first, number = True, 0
    while line := stream.readline():
        number += 1
        if first:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if len(line) >= LONGEST_LINE:
            size = len(line)
            while line[-1:] != b"\n" and (line := stream.readline()):
                size += len(line)
            refuse(_too_long(size, f"{name}:{number}"))
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode())
            if first and isinstance(value, dict) and (key := _key_of_rows(value, name, split)):
                rest = stream.readline()
                stream.unread(rest)
                if not rest.strip():
                    yield from ((f"{name} {key}[{i}]", row) for i, row in enumerate(value[key]))
                    return
            first = False
            yield f"{name}:{number}", value
        except UnicodeDecodeError as error:
            refuse(_not_utf8(name, line, number, error))
        except (ValueError, RecursionError) as error:
            place = error.pos if isinstance(error, json.JSONDecodeError) else 0
            column = len(line.decode()[:place].encode())
            refuse(_bad_json(f"{name}:{number}:{column}", error))
        first = False


def _array_items(text: Window) -> Iterator[tuple[str, Any]]:
    text.peek()
    text.skip()
    before, item, separated = "", 0, True
    while (character := text.peek()) != "]":
        where = text.where
        if not character:
            raise DataError(
                "the JSON array has no closing bracket: the file is cut off", where=where
            )
        if not separated:
            raise DataError("the JSON array is not closed here", where=where)
        value = text.value()
        # several rows on a line are told apart by their number in the array
        item += 1
        yield where + (f" item {item}" if where == before else ""), value
        before, separated = where, text.peek() == ","
        if separated:
            text.skip()
    text.skip()
    if text.peek():
        raise DataError("text follows the end of the JSON array", where=text.where)

"""JSON to rows: an array, an object a line, objects over several lines, an object that holds the
rows under a key."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..errors import DataError
from .cells import Refuse, Row

LONGEST_LINE = 16 << 20
"""Bytes: a longer row is not one."""


class Begun(io.RawIOBase):
    """A stream of which the beginning was read, and lines of it."""

    def __init__(self, begun: bytes, stream: IO[bytes]) -> None:
        self.begun, self.stream = begun, stream

    def read(self, size: int = -1) -> bytes:
        found, self.begun = self.begun + self.stream.read(), b""
        return found

    def readline(self, size: int | None = -1) -> bytes:
        line, end, rest = self.begun.partition(b"\n")
        if end:
            self.begun = rest
            return line + end
        self.begun = b""
        return line + self.stream.readline(LONGEST_LINE)

    def unread(self, line: bytes) -> None:
        self.begun = line + self.begun


def json_rows(
    path: Path, name: str, whole: "Begun", first: bytes, split: str, refuse: Refuse
) -> Iterator[Row]:
    """Rows of a JSON file.

    Args:
        name: how places begin.
        first: its first byte that is no space.
        split: the key of the rows, where an object holds several lists of them.
    """
    if first == b"[":
        yield from _objects(_array_items(name, text_of(path, whole.read())), refuse)
    elif first == b"{" and not _is_line(whole):
        yield from _objects(_values(name, text_of(path, whole.read()), split), refuse)
    else:
        yield from _objects(_lines(name, whole, split, refuse), refuse)


def _not_utf8(path: Path, raw: bytes, line: int, error: UnicodeDecodeError) -> DataError:
    column = error.start - (raw.rfind(b"\n", 0, error.start) + 1)
    return DataError(
        f"the data is not UTF-8: byte 0x{raw[error.start]:02x}",
        where=f"{path}:{line + raw.count(bytes([10]), 0, error.start)}:{column}",
        ways_out=["convert the file to UTF-8, e.g. with iconv"],
    )


def text_of(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, raw, 1, error) from error


def _objects(pairs: Iterator[tuple[str, Any]], refuse: Refuse) -> Iterator[Row]:
    for where, value in pairs:
        if isinstance(value, dict):
            yield where, value
        else:
            refuse(
                DataError(f"a row must be a JSON object, not a {type(value).__name__}", where=where)
            )


def _bad_json(where: str, error: ValueError | RecursionError) -> DataError:
    message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(
        f"not valid JSON: {message}",
        where=where,
        ways_out=["mend or remove this row", "--skip_bad N"],
    )


def _bad_text(name: str, text: str, position: int, error: ValueError | RecursionError) -> DataError:
    """Of a value that begins at a position of the whole text."""
    at = error.pos if isinstance(error, json.JSONDecodeError) else position
    return _bad_json(f"{name}:{text.count(chr(10), 0, at) + 1}", error)


def _is_line(stream: Begun) -> bool:
    """Whether rows stand on a line each: the first one is a value by itself, or is damaged and not
    the beginning of an object over several lines (which goes on, and whose next line is no row)."""
    read: list[bytes] = []
    lines: list[bytes] = []
    while len(lines) < 2 and (line := stream.readline()):
        read.append(line)
        if text := line.removeprefix(b"\xef\xbb\xbf").strip():
            lines.append(text)
    stream.unread(b"".join(read))
    first, second = (*lines, b"", b"")[:2]
    return _is_value(first) or first[-1:] not in (b"{", b"[", b",") or _is_value(second)


def _is_value(line: bytes) -> bool:
    """Whether a line is a whole object."""
    try:
        return isinstance(json.loads(line), dict)
    except UnicodeDecodeError:
        return True  # refused where it is read
    except (ValueError, RecursionError):
        return False


def _values(name: str, text: str, split: str) -> Iterator[tuple[str, Any]]:
    """Objects that follow each other, over several lines each; or one that holds the rows."""
    decoder, position, number, counted, found = json.JSONDecoder(), 0, 1, 0, 0
    text = text.lstrip("\ufeff")
    while True:
        while position < len(text) and text[position] in " \t\r\n,":
            position += 1
        if position >= len(text):
            return
        number, counted = number + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _bad_text(name, text, position, error) from error
        found += 1
        alone = found == 1 and not text[position:].strip()
        if alone and isinstance(value, dict) and (key := _key_of_rows(value, name, split)):
            for item, row in enumerate(value[key]):
                yield f"{name} {key}[{item}]", row
            return
        yield f"{name}:{number}", value


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
            refuse(
                DataError(
                    f"a row of {size >> 20} MB: no model reads that much at once",
                    where=f"{name}:{number}",
                    ways_out=["cut it into rows", "--skip_bad N"],
                )
            )
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
            refuse(_not_utf8(Path(name), line, number, error))
        except (ValueError, RecursionError) as error:
            place = error.pos if isinstance(error, json.JSONDecodeError) else 0
            column = len(line.decode()[:place].encode())
            refuse(_bad_json(f"{name}:{number}:{column}", error))
        first = False


def _array_items(path: str, text: str) -> Iterator[tuple[str, Any]]:
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0

    def skip_space(start: int) -> int:
        while start < len(text) and text[start] in " \t\r\n":
            start += 1
        return start

    position, before, item = skip_space(position), 0, 0
    while position < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise _bad_text(path, text, position, error) from error
        # several rows on a line are told apart by their number in the array
        item += 1
        yield f"{path}:{line}" + (f" item {item}" if line == before else ""), value
        before = line
        position = skip_space(end)
        if position < len(text) and text[position] == ",":
            position = skip_space(position + 1)
        elif position < len(text) and text[position] != "]":
            raise DataError(
                "the JSON array is not closed here",
                where=f"{path}:{text.count(chr(10), 0, position) + 1}",
            )
    if position >= len(text):
        raise DataError(
            "the JSON array has no closing bracket: the file is cut off", where=f"{path}:{line}"
        )
    if text[position + 1 :].strip():
        number = text.count("\n", 0, skip_space(position + 1)) + 1
        raise DataError("text follows the end of the JSON array", where=f"{path}:{number}")

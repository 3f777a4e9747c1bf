"""Training rows: JSON and JSONL files to examples, every row with its place in the file.

Two shapes come out: a conversation (`messages`) or a prompt with its completion. Alpaca rows become a conversation of
one question and one answer. We read the files ourselves because an error must name the line in the user's file, which
no reader at hand does; lines end at the newline byte only, as JSON allows U+2028 inside strings.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DataError

ROLES = ("system", "user", "assistant", "tool")
FORMS = (
    '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}',
    '{"instruction": ..., "input": ..., "output": ...}',
    '{"prompt": ..., "completion": ...}',
)


@dataclass(frozen=True)
class Example:
    """One row: a conversation, or a prompt (string) with its completion."""

    where: str
    messages: list[dict[str, Any]] | None = None
    prompt: str = ""
    completion: str = ""


def read_examples(path: str | Path) -> list[Example]:
    """All rows of a JSON array or JSONL file.

    Raises:
        DataError: naming file and line: not JSON, unknown or changing columns, wrong types, no rows.
    """
    path = Path(path).expanduser()
    rows = list(_objects(path, _read_text(path)))
    if not rows:
        raise DataError(f"{path} holds no rows", expected="a JSON array of objects, or one JSON object per line")
    form = _form_of(rows[0][1], rows[0][0])
    return [_example(form, row, where) for where, row in rows]


def _read_text(path: Path) -> str:
    try:
        if path.is_dir():
            raise DataError(f"{path} is a directory", ways_out=["name a .json or .jsonl file in it"])
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}", ways_out=["check --data"]) from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - (raw.rfind(b"\n", 0, error.start) + 1)
        raise DataError(
            f"the data is not UTF-8: byte 0x{raw[error.start]:02x}",
            where=f"{path}:{line}:{column}",
            ways_out=["convert the file to UTF-8, e.g. with iconv"],
        ) from error


def _objects(path: Path, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of each row; a file whose first character is [ is an array."""
    pairs = _array_items(path, text) if text.lstrip()[:1] == "[" else _lines(path, text)
    for where, value in pairs:
        if not isinstance(value, dict):
            raise DataError(f"a row must be a JSON object, not a {type(value).__name__}", where=where)
        yield where, value


def _bad_json(where: str, error: ValueError | RecursionError) -> DataError:
    message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(f"not valid JSON: {message}", where=where, ways_out=["mend or remove this row"])


def _lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                column = error.pos if isinstance(error, json.JSONDecodeError) else 0
                raise _bad_json(f"{path}:{number}:{len(line[:column].encode())}", error) from error


def _array_items(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0

    def skip_space(start: int) -> int:
        while start < len(text) and text[start] in " \t\r\n":
            start += 1
        return start

    position = skip_space(position)
    while position < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            raise _bad_json(f"{path}:{text.count(chr(10), 0, at) + 1}", error) from error
        yield f"{path}:{line}", value
        position = skip_space(end)
        if position < len(text) and text[position] == ",":
            position = skip_space(position + 1)
        elif position < len(text) and text[position] != "]":
            raise DataError("the JSON array is not closed here", where=f"{path}:{text.count(chr(10), 0, position) + 1}")
    if position >= len(text):
        raise DataError("the JSON array has no closing bracket: the file is cut off", where=f"{path}:{line}")
    if text[position + 1 :].strip():
        number = text.count("\n", 0, skip_space(position + 1)) + 1
        raise DataError("text follows the end of the JSON array", where=f"{path}:{number}")


def _form_of(row: dict[str, Any], where: str) -> str:
    """Which form the file has, by the columns of its first row."""
    if "messages" in row:
        return "messages"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if "prompt" in row and "completion" in row:
        return "prompt"
    if {"chosen", "rejected"} <= row.keys():
        raise DataError(
            "these are preference pairs, which supervised fine-tuning does not use",
            where=where,
            ways_out=["rename the good answers to `completion` and drop `rejected`"],
        )
    raise DataError(
        "the columns fit no known form",
        where=where,
        found=", ".join(map(str, row)) or "no columns",
        expected=" or ".join(FORMS),
        ways_out=["rename the columns"],
    )


def _example(form: str, row: dict[str, Any], where: str) -> Example:
    if form == "messages":
        return Example(where, _messages(row.get("messages"), where, "messages"))
    if form == "alpaca":
        question = _text(row, "instruction", where)
        if extra := _text(row, "input", where, optional=True):
            question = f"{question}\n\n{extra}"
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": _text(row, "output", where)}]
        if system := _text(row, "system", where, optional=True):
            turns.insert(0, {"role": "system", "content": system})
        return Example(where, _messages(turns, where, "output"))
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        if any(isinstance(m, dict) and m.get("role") == "assistant" for m in prompt):
            raise DataError(
                "the prompt holds an assistant's turn, which would be trained like the completion",
                where=where,
                ways_out=["give such conversations as `messages`, of which every answer is trained"],
            )
        return Example(where, _messages(prompt + completion, where, "prompt + completion"))
    answer = _text(row, "completion", where)
    if not answer:
        raise DataError("the completion is empty: there is nothing to train", where=where)
    return Example(where, None, _text(row, "prompt", where), answer)


def _text(row: dict[str, Any], column: str, where: str, *, optional: bool = False) -> str:
    value = row.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        found = "no such column" if column not in row else "null" if value is None else f"a {type(value).__name__}"
        raise DataError(f"column {column!r} must be a string", where=where, found=found)
    return _encodable(value, where)


def _encodable(text: str, where: str) -> str:
    """The text, if it has a UTF-8 form: JSON can escape half of a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a lone surrogate U+{ord(text[error.start]):04X} at character {error.start} is no text",
            where=where,
            ways_out=["write the character whole, or remove it"],
        ) from error
    return text


def _messages(value: Any, where: str, column: str) -> list[dict[str, Any]]:
    """Checked turns: known roles, string contents, an answer to train on."""
    if not isinstance(value, list) or not value:
        raise DataError(f"column {column!r} must be a non-empty list of messages", where=where)
    for number, message in enumerate(value):
        here = f"{where} message {number}"
        if not isinstance(message, dict):
            raise DataError("a message must be an object with role and content", where=here)
        if message.get("role") not in ROLES:
            raise DataError("unknown role", where=here, found=repr(message.get("role")), expected=", ".join(ROLES))
        if not isinstance(message.get("content"), str):
            found = f"a {type(message.get('content')).__name__}" if message.get("content") is not None else "none"
            raise DataError("a message's content must be a string", where=here, found=found)
        _encodable(message["content"], here)
        if message["role"] == "assistant" and not message["content"].strip():
            raise DataError("an assistant's turn is empty: there is nothing to train", where=here)
    if not any(message["role"] == "assistant" for message in value):
        raise DataError("the conversation has no assistant's turn: there is nothing to train", where=where)
    return value

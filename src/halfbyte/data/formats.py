"""What a row means: the columns of the forms people use, to one `Example`.

The first row decides the form of the whole source. Seven are known: conversations (``messages``,
with tools and system; ShareGPT's ``conversations``), alpaca (``instruction``, ``input``,
``output``, ``system``, ``history``), ``question`` and ``answer``, prompt and completion (strings or
messages), plain ``text``, and ``input_ids``. Preference pairs are recognized and refused: their
second answer would be trained as if it were wanted.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .readers import raise_it, read_rows

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "assistant": "assistant",
    "tool": "tool",
    "observation": "tool",
}
FORMATS = (
    '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}',
    '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}',
    '{"instruction": ..., "input": ..., "output": ...}',
    '{"question": ..., "answer": ...}',
    '{"prompt": ..., "completion": ...}',
    '{"text": ...}',
    '{"input_ids": [...], "labels": [...]}',
)
IGNORE, DEEPEST = -100, 64


@dataclass(frozen=True)
class Example:
    """One row: a conversation, a prompt (string) with its completion, or ids.

    messages: the conversation; those before ``supervised_from`` are read only. tools: handed to the
    template. prompt, completion: strings; a plain text is a completion without a prompt. input_ids,
    loss_mask: ready-made.
    """

    where: str
    messages: list[dict[str, Any]] | None = None
    prompt: str = ""
    completion: str = ""
    tools: list[Any] | None = None
    supervised_from: int = 0
    input_ids: list[int] | None = None
    loss_mask: list[bool] | None = None


@dataclass(frozen=True)
class Examples:
    """A source's rows and the form they were taken for."""

    format: str
    rows: list[Example]
    bad: list[DataError]


def read_examples(
    data: str | Path, *, config: str | None = None, split: str = "train", skip_bad: int = 0
) -> Examples:
    """All rows of a source.

    Args:
        config, split: of a Hub data set.
        skip_bad: so many bad rows are left out (and returned); one more is an error.

    Raises:
        DataError: naming file and line: unreadable, unknown or changing columns, wrong types, no
            rows.
    """
    bad: list[DataError] = []

    def refuse(error: DataError) -> None:
        if len(bad) >= skip_bad:
            raise error
        bad.append(error)

    rows: list[Example] = []
    format = ""
    for where, row in read_rows(
        data, config=config, split=split, refuse=refuse if skip_bad else raise_it
    ):
        try:
            format = format or format_of(row, where)
            rows.append(_READERS[format](row, where))
        except DataError as error:
            refuse(error)
    if not rows:
        raise DataError(
            f"{data} holds no rows" + (f" but {len(bad)} bad ones" if bad else ""),
            where=bad[0].where if bad else "",
            expected="a JSON array of objects, one JSON object per line, or a table",
        )
    return Examples(format, rows, bad)


def format_of(row: dict[str, Any], where: str) -> str:
    """Which form a row has, by its columns.

    Raises:
        DataError: preference pairs, or unknown columns.
    """
    has = {key for key, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= has:
        raise DataError(
            "these are preference pairs (chosen, rejected): not supervised fine-tuning",
            where=where,
            ways_out=["rename the good answers to `completion` and drop `rejected`"],
        )
    for format, columns in (
        ("messages", {"messages"}),
        ("sharegpt", {"conversations"}),
        ("alpaca", {"instruction", "output"}),
        ("qa", {"question", "answer"}),
        ("prompt", {"prompt", "completion"}),
        ("input_ids", {"input_ids"}),
        ("text", {"text"}),
    ):
        if columns <= has:
            turns = format == "prompt" and isinstance(_loaded(row["prompt"], dict), list)
            return "turns" if turns else format
    raise DataError(
        "the columns fit no known form",
        where=where,
        found=", ".join(map(str, row)) or "no columns",
        expected=" or ".join(FORMATS),
        ways_out=["rename the columns"],
    )


# --- one reader a form ----------------------------------------------------------------------------


def _from_messages(row: dict[str, Any], where: str) -> Example:
    return Example(
        where, _messages(row.get("messages"), where, "messages"), tools=_tools(row, where)
    )


def _from_sharegpt(row: dict[str, Any], where: str) -> Example:
    turns = _messages(row.get("conversations"), where, "conversations")
    if system := _string(row, "system", where, optional=True):
        if turns[0]["role"] == "system" and turns[0]["content"] != system:
            raise DataError(
                "the row has two system messages: its own and the conversation's", where=where
            )
        turns = turns[1:] if turns[0]["role"] == "system" else turns
        turns = [{"role": "system", "content": system}, *turns]
    return Example(where, turns, tools=_tools(row, where))


def _from_alpaca(row: dict[str, Any], where: str) -> Example:
    question = _string(row, "instruction", where)
    if extra := _string(row, "input", where, optional=True):
        question = f"{question}\n\n{extra}"
    turns: list[dict[str, Any]] = []
    if system := _string(row, "system", where, optional=True):
        turns.append({"role": "system", "content": system})
    for number, pair in enumerate(_loaded(row.get("history"), list) or []):
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise DataError(
                "history must be a list of [question, answer] pairs",
                where=f"{where} history {number}",
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    turns += [
        {"role": "user", "content": question},
        {"role": "assistant", "content": _string(row, "output", where)},
    ]
    return Example(where, _messages(turns, where, "output"))


def _from_qa(row: dict[str, Any], where: str) -> Example:
    turns = [
        {"role": "user", "content": _string(row, "question", where)},
        {"role": "assistant", "content": _string(row, "answer", where)},
    ]
    return Example(where, _messages(turns, where, "answer"))


def _from_prompt(row: dict[str, Any], where: str) -> Example:
    prompt, completion = (_loaded(row.get(column), dict) for column in ("prompt", "completion"))
    if isinstance(prompt, list) and isinstance(completion, list):
        turns = _messages(prompt + completion, where, "prompt + completion")
        if not any(turn["role"] == "assistant" for turn in turns[len(prompt) :]):
            raise DataError(
                "the completion has no assistant's turn: there is nothing to train", where=where
            )
        return Example(where, turns, tools=_tools(row, where), supervised_from=len(prompt))
    answer = _string(row, "completion", where)
    if not answer:
        raise DataError("the completion is empty: there is nothing to train", where=where)
    return Example(where, None, _string(row, "prompt", where), answer)


def _from_text(row: dict[str, Any], where: str) -> Example:
    text = _string(row, "text", where)
    if not text.strip():
        raise DataError("the text is empty: there is nothing to train", where=where)
    return Example(where, None, "", text)


def _from_ids(row: dict[str, Any], where: str) -> Example:
    ids = _integers(row.get("input_ids"), where, "input_ids")
    if row.get("labels") is None:
        return Example(where, input_ids=ids, loss_mask=[True] * len(ids))
    labels = _integers(row["labels"], where, "labels")
    if len(labels) != len(ids):
        raise DataError(f"{len(ids)} input_ids but {len(labels)} labels", where=where)
    if wrong := [
        i for i, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (a, IGNORE)
    ]:
        raise DataError(
            f"label {labels[wrong[0]]} at position {wrong[0]} is neither the id there nor {IGNORE}",
            where=where,
            ways_out=["labels stand beside their ids; they are shifted when the loss is computed"],
        )
    return Example(where, input_ids=ids, loss_mask=[label != IGNORE for label in labels])


_READERS: dict[str, Callable[[dict[str, Any], str], Example]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "qa": _from_qa,
    "prompt": _from_prompt,
    "turns": _from_prompt,
    "text": _from_text,
    "input_ids": _from_ids,
}


# --- cells ----------------------------------------------------------------------------------------


def _string(row: dict[str, Any], column: str, where: str, *, optional: bool = False) -> str:
    value = row.get(column)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        found = (
            "no such column"
            if column not in row
            else "null"
            if value is None
            else f"a {type(value).__name__}"
        )
        raise DataError(f"column {column!r} must be a string", where=where, found=found)
    return _encodable(value, where)


def _encodable(text: str, where: str) -> str:
    """The text, if it can be text: JSON can escape half of a character (a lone surrogate), and NUL
    ends strings."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"a lone surrogate U+{ord(text[error.start]):04X} at character {error.start} is no "
            "text",
            where=where,
            ways_out=["write the character whole, or remove it"],
        ) from error
    if (place := text.find("\0")) >= 0:
        raise DataError(
            f"a NUL character at character {place}: the row is binary or damaged",
            where=where,
            ways_out=["remove the character", "--skip_bad N"],
        )
    return text


def _loaded(value: Any, of: type) -> Any:
    """A list as it is; a cell that holds a JSON list of such items (tables have only strings)
    read."""
    if isinstance(value, str) and value.lstrip()[:1] == "[" and value.rstrip()[-1:] == "]":
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if found and all(type(item) is of for item in found) else value
    return list(value) if isinstance(value, tuple) else value


def _integers(value: Any, where: str, column: str) -> list[int]:
    value = _loaded(value, int)
    if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
        raise DataError(f"column {column!r} must be a non-empty list of integers", where=where)
    if column == "input_ids" and min(value) < 0:
        raise DataError("an id is negative", where=where, found=str(min(value)))
    return value


def _tools(row: dict[str, Any], where: str) -> list[Any] | None:
    value = row.get("tools")
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (ValueError, RecursionError) as error:
            raise DataError(
                "column 'tools' is not valid JSON", where=where, found=str(error)
            ) from error
    if value is None or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError("column 'tools' must be a list of JSON schemas", where=where)
    for text in _leaves(value, where):
        _encodable(text, where)
    return value


def _messages(value: Any, where: str, column: str) -> list[dict[str, Any]]:
    """Checked turns: known roles, string contents, an answer to train on."""
    value = _loaded(value, dict)
    if not isinstance(value, list) or not value:
        raise DataError(f"column {column!r} must be a non-empty list of messages", where=where)
    turns = [_message(message, f"{where} message {number}") for number, message in enumerate(value)]
    if not any(turn["role"] == "assistant" for turn in turns):
        raise DataError(
            "the conversation has no assistant's turn: there is nothing to train", where=where
        )
    for number, (turn, before) in enumerate(zip(turns[1:], turns, strict=False), 1):
        if turn["role"] == "system":
            raise DataError(
                "a system message stands after the first turn", where=f"{where} message {number}"
            )
        if turn["role"] == before["role"] == "user":
            raise DataError(
                "two user's turns follow each other: roles are out of order",
                where=f"{where} message {number}",
                ways_out=["join them", "--skip_bad N"],
            )
    return turns


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise DataError("a message must be an object with role and content", where=where)
    turn = {key: item for key, item in message.items() if item is not None}
    if "role" not in turn and "from" in turn:
        role = SHAREGPT_ROLES.get(str(turn.pop("from")))
        turn = {"role": role or str(message["from"]), "content": turn.pop("value", None), **turn}
    if turn.get("role") not in ROLES:
        expected = ", ".join(ROLES if "role" in message else SHAREGPT_ROLES)
        raise DataError(
            "unknown role", where=where, found=repr(turn.get("role")), expected=expected
        )
    content = turn.get("content")
    if isinstance(content, list):
        content = _joined_parts(content, where)
    if content is None and turn["role"] == "assistant" and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        found = f"a {type(content).__name__}" if content is not None else "none"
        raise DataError("a message's content must be a string", where=where, found=found)
    for text in _leaves({**turn, "content": content}, where):
        _encodable(text, where)
    if turn["role"] == "assistant" and not content.strip() and not turn.get("tool_calls"):
        raise DataError("an assistant's turn is empty: there is nothing to train", where=where)
    return {**turn, "content": content}


def _joined_parts(parts: list[Any], where: str) -> str:
    texts = []
    for part in parts:
        if not (
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
        ):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise DataError(
                "a message holds something else than text",
                where=where,
                found=repr(kind),
                expected="text",
            )
        texts.append(part["text"])
    return "".join(texts)


def _leaves(value: Any, where: str = "") -> list[str]:
    """Every string in a nested value, keys included.

    Raises:
        DataError: it is nested deeper than `DEEPEST`.
    """
    found: list[str] = []
    waiting: list[tuple[Any, int]] = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > DEEPEST:
            raise DataError(f"a value is nested more than {DEEPEST} levels deep", where=where)
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, dict):
            waiting += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple):
            waiting += [(part, depth + 1) for part in item]
    return found


def other_strings(example: Example) -> list[str]:
    """Strings of a conversation that reach the template beside the contents: tool calls, names,
    tool schemas."""
    turns = [
        [v for k, v in turn.items() if k not in ("role", "content")]
        for turn in example.messages or []
    ]
    return _leaves([turns, example.tools or []], example.where)

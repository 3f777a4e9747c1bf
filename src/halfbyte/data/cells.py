"""A row and its single values: text that can be text, lists of integers, lists kept as JSON."""

import json
import math
from collections.abc import Callable
from datetime import timedelta
from numbers import Integral, Number
from typing import Any
from uuid import UUID

from ..errors import DataError

DEEPEST = 64

Row = tuple[str, dict[str, Any]]
"""Where a row stands, and its columns."""

Refuse = Callable[[DataError], None]
"""What happens to a row that cannot be read: raise, or count it and go on (``--skip_bad``)."""


def raise_it(error: DataError) -> None:
    """The default for bad rows."""
    raise error


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing: null, or the NaN by which tables write it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def plain(value: Any) -> Any:
    """A value as JSON would hold it: dates and times in ISO form, numbers of any kind as numbers;
    what is none of these by the name of its type, as transformers shows it to templates."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if callable(isoformat := getattr(value, "isoformat", None)):
        return isoformat()
    if isinstance(value, str | UUID | timedelta):
        return str(value)
    if isinstance(value, Number):
        return int(value) if isinstance(value, Integral) else float(value)  # pyright: ignore
    return f"<{type(value).__name__}>"


def string(row: dict[str, Any], column: str, where: str, *, optional: bool = False) -> str:
    """A column's text; "" where it is optional and missing.

    Raises:
        DataError: it is no text.
    """
    value = row.get(column)
    if is_missing(value) and optional:
        return ""
    if not isinstance(value, str):
        found = (
            "no such column"
            if column not in row
            else "null"
            if is_missing(value)
            else f"a {type(value).__name__}"
        )
        raise DataError(f"column {column!r} must be a string", where=where, found=found)
    return encodable(value, where)


def encodable(text: str, where: str) -> str:
    """The text, if it can be text: JSON can escape half of a character (a lone surrogate), and NUL
    ends strings."""
    if text.isascii() and "\0" not in text:
        return text
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


def loaded(value: Any, of: type) -> Any:
    """A list as it is; a cell that holds a JSON list of such items (tables have only strings)
    read."""
    if isinstance(value, str) and value.lstrip()[:1] == "[" and value.rstrip()[-1:] == "]":
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if found and all(type(item) is of for item in found) else value
    return list(value) if isinstance(value, tuple) else value


def integers(value: Any, where: str, column: str) -> list[int]:
    """A column of whole numbers."""
    value = loaded(value, int)
    if column.endswith(("mask", "masks")) and isinstance(value, list):
        value = [int(item) if isinstance(item, bool) else item for item in value]
    if not isinstance(value, list) or not value or not all(type(item) is int for item in value):
        raise DataError(f"column {column!r} must be a non-empty list of integers", where=where)
    if column == "input_ids" and min(value) < 0:
        raise DataError("an id is negative", where=where, found=str(min(value)))
    return value


def leaves(value: Any, where: str = "") -> list[str]:
    """Every string in a nested value, keys included.

    Raises:
        DataError: it is nested deeper than `DEEPEST`.
    """
    if isinstance(value, str):
        return [value]
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

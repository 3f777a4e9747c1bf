"""Strings whose characters know where they come from, through slices, splits, joins, replacements,
concatenation and ``tojson``: what `data.origins` gives to a template."""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Origin = tuple[int, int, int]
"""Some characters that follow each other: how many, the number of their place (`TEMPLATE`: none),
and the first one's number in it."""
TEMPLATE = -1

# --- strings --------------------------------------------------------------------------------------


class Tracked(str):
    """A string whose characters know where they come from."""

    _origins: list[Origin]

    def __new__(cls, text: str, origins: list[Origin]) -> "Tracked":
        self = str.__new__(cls, text)
        self._origins = origins
        return self

    def __str__(self) -> str:
        return self

    __hash__ = str.__hash__

    def _part(self, start: int, stop: int) -> "Tracked":
        found: list[Origin] = []
        at = 0
        for count, place, first in self._origins:
            low, high = max(start - at, 0), min(stop - at, count)
            if low < high:
                found.append((high - low, place, first + low))
            at += count
            if at >= stop:
                break
        return Tracked(str.__getitem__(self, slice(start, stop)), found)

    def __getitem__(self, key: Any) -> "Tracked":
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._part(start, max(start, stop))
            return joined([self._part(i, i + 1) for i in range(start, stop, step)], self)
        place = range(len(self))[key]
        return self._part(place, place + 1)

    def __iter__(self) -> Iterator[str]:
        return (self._part(i, i + 1) for i in range(len(self)))

    def __add__(self, other: str) -> Any:
        if type(other) is not str:
            return joined((self, other)) if isinstance(other, str) else NotImplemented
        if not other:
            return self
        *before, (count, place, first) = self._origins or [(0, TEMPLATE, 0)]
        if place == TEMPLATE:
            added = (count + len(other), TEMPLATE, first)
            return Tracked(str.__add__(self, other), [*before, added])
        return Tracked(str.__add__(self, other), [*self._origins, (len(other), TEMPLATE, 0)])

    def __radd__(self, other: str) -> Any:
        if not isinstance(other, str):
            return NotImplemented
        if not other:
            return self
        (count, place, first), *after = self._origins or [(0, TEMPLATE, 0)]
        if place == TEMPLATE:
            added = (count + len(other), TEMPLATE, first)
            return Tracked(str.__add__(other, self), [added, *after])
        return Tracked(str.__add__(other, self), [(len(other), TEMPLATE, 0), *self._origins])

    def __mul__(self, times: Any) -> Any:
        return joined([self] * times, self)

    def __rmul__(self, times: Any) -> Any:
        return self * times

    def strip(self, chars: str | None = None, /) -> "Tracked":
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> "Tracked":
        return self._part(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> "Tracked":
        return self._part(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> "Tracked":
        return self._part(len(prefix) * str.startswith(self, prefix), len(self))

    def removesuffix(self, suffix: str, /) -> "Tracked":
        return self._part(0, len(str.removesuffix(self, suffix)))

    def _pieces(self, pieces: list[str], gap: int | None) -> list["Tracked"]:
        """The parts that a split gave; gap: characters between them, None for white space."""
        found, at = [], 0
        for piece in pieces:
            start = at if gap is not None else str.find(self, piece, at)
            found.append(self._part(start, start + len(piece)))
            at = start + len(piece) + (gap or 0)
        return found

    def split(self, sep: str | None = None, maxsplit: Any = -1) -> Any:
        return self._pieces(str.split(self, sep, maxsplit), None if sep is None else len(sep))

    def rsplit(self, sep: str | None = None, maxsplit: Any = -1) -> Any:
        return self._pieces(str.rsplit(self, sep, maxsplit), None if sep is None else len(sep))

    def splitlines(self, keepends: bool = False) -> Any:
        whole = self._pieces(str.splitlines(self, True), 0)
        bare = str.splitlines(self)
        return (
            whole
            if keepends
            else [line._part(0, len(text)) for line, text in zip(whole, bare, strict=True)]
        )

    def partition(self, sep: str, /) -> Any:
        return tuple(self._pieces(list(str.partition(self, sep)), 0))

    def rpartition(self, sep: str, /) -> Any:
        return tuple(self._pieces(list(str.rpartition(self, sep)), 0))

    def replace(self, old: str, new: str, count: Any = -1, /) -> "Tracked":
        if not old:
            cut: list[str] = ["", *self, ""] if count < 0 else [self]
            return joined(between(cut, new), self)
        return joined(between(self.split(old, count), new), self)

    def join(self, parts: Iterable[str], /) -> "Tracked":
        return joined(between(list(parts), self), self)

    def _rewritten(self, text: str) -> "Tracked":
        """What another method made of this string: character by character where none came or went;
        else all of it is from the row, from about there."""
        if len(text) == len(self):
            return Tracked(text, self._origins)
        _, place, first = next((o for o in self._origins if o[1] != TEMPLATE), (0, TEMPLATE, 0))
        return Tracked(text, [(len(text), place, first)] if text else [])


def _rewriting(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    @functools.wraps(method)
    def call(self: Tracked, *args: Any, **kwargs: Any) -> Tracked:
        return self._rewritten(method(self, *args, **kwargs))

    return call


for _name in (
    *("lower", "upper", "title", "capitalize", "swapcase", "casefold", "translate", "expandtabs"),
    *("center", "ljust", "rjust", "zfill", "format", "format_map", "__mod__"),
):
    setattr(Tracked, _name, _rewriting(_name))


def between(parts: list[str], separator: str) -> list[str]:
    found = [item for part in parts for item in (part, separator)]
    return found[:-1]


def origins_of(text: str) -> list[Origin]:
    if isinstance(text, Tracked):
        return text._origins
    return [(len(text), TEMPLATE, 0)] if text else []


def joined(parts: Iterable[Any], whole: Any = None) -> Any:
    """Strings one after the other; tracked if one of them is, or ``whole`` is given."""
    parts = list(parts)
    text = "".join(parts)
    if whole is None and not any(isinstance(part, Tracked) for part in parts):
        return text
    found: list[Origin] = []
    for part in parts:
        for count, place, first in origins_of(part):
            if (
                found
                and found[-1][1] == place
                and (place == TEMPLATE or found[-1][2] + found[-1][0] == first)
            ):
                found[-1] = (found[-1][0] + count, place, found[-1][2])
            else:
                found.append((count, place, first))
    return Tracked(text, found)


def is_tracked(value: Any) -> bool:
    """Whether a value holds a tracked string, however deep."""
    if isinstance(value, dict):
        return any(is_tracked(item) for pair in value.items() for item in pair)
    if isinstance(value, list | tuple):
        return any(map(is_tracked, value))
    return isinstance(value, Tracked)


# --- JSON -----------------------------------------------------------------------------------------

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_ASCII = re.compile(r'[^"\\\x00-\x1f\x7f-\U0010ffff]+')


def _json_string(text: str, ascii_only: bool) -> str:
    whole = json.dumps(text, ensure_ascii=ascii_only)
    if not isinstance(text, Tracked):
        return whole
    if len(whole) == len(text) + 2:
        return joined(('"', text, '"'))
    parts, at, pattern = ['"'], 0, _ASCII if ascii_only else _PLAIN
    while at < len(text):
        if match := pattern.match(text, at):
            parts.append(text[at : match.end()])
            at = match.end()
        else:  # an escape stands for one character
            ((_, place, first),) = text[at]._origins
            escape = json.dumps(str.__getitem__(text, at), ensure_ascii=ascii_only)[1:-1]
            parts.append(Tracked(escape, [(len(escape), place, first)]))
            at += 1
    return joined([*parts, '"'])


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """``json.dumps`` with origins, as transformers' filter of this name calls it."""
    options: dict[str, Any] = {"ensure_ascii": ensure_ascii, "sort_keys": sort_keys}
    plain = json.dumps(value, indent=indent, separators=separators, **options)
    if not is_tracked(value):
        return plain
    comma, colon = separators or (", " if indent is None else ",", ": ")
    step = " " * indent if isinstance(indent, int) else indent

    def write(item: Any, depth: int) -> str:
        if isinstance(item, str):
            return _json_string(item, ensure_ascii)
        if not isinstance(item, dict | list | tuple) or not item:
            return json.dumps(item, **options)
        line = "" if step is None else "\n" + step * (depth + 1)
        end = "" if step is None else "\n" + step * depth
        if not isinstance(item, dict):
            inner = [write(each, depth + 1) for each in item]
            return joined(("[", line, *between(inner, comma + line), end, "]"))
        pairs = sorted(item.items()) if sort_keys else item.items()
        inner = [
            joined(
                (
                    _json_string(key, ensure_ascii)
                    if isinstance(key, str)
                    else json.dumps({key: 0})[1:].split(":")[0],
                    colon,
                    write(each, depth + 1),
                )
            )
            for key, each in pairs
        ]
        return joined(("{", line, *between(inner, comma + line), end, "}"))

    return write(value, 0)

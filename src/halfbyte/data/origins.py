"""Which characters of a rendered conversation come from the row, and from where in it.

A chat template is a program that cuts, joins and rewrites strings. Looking for a row's text in what
it wrote, or putting marks into it, is guessing: the row may hold the marks, and a template may cut
between them. So the strings of a row carry their origin through the program: `Tracked` is a string
whose characters know the place (a number from `walk`) and the character of it they were, through
slices, splits, joins, replacements, concatenation and ``tojson``. What has no origin is the
template's own. Runs in the template's process (`data.template`); `walk` runs on both sides.

Where an operation is met that cannot be followed, `Tracker.lost` says so for this conversation.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any, ClassVar

from jinja2 import runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

Origin = tuple[int, int, int]
"""Some characters that follow each other: how many, the number of their place (`TEMPLATE`: none),
and the first one's number in it."""
TEMPLATE = -1
Path = tuple[Any, ...]
"""Where a string stands in a row: ``("messages", 1, "content")``; keys end with ``KEY``."""
KEY = "*key*"

# --- places ---------------------------------------------------------------------------------------


def walk(value: Any, path: Path, visit: Callable[[str, Path], str]) -> Any:
    """The same value with every string replaced by what visit makes of it, in a fixed order. A
    message's role and its own keys are the form's words, not the row's, and stay."""
    if isinstance(value, str):
        return visit(value, path)
    if isinstance(value, list | tuple):
        return [walk(item, (*path, i), visit) for i, item in enumerate(value)]
    if isinstance(value, dict):
        message = len(path) == 2 and path[0] == "messages"
        return {
            key if message else walk(key, (*path, key, KEY), visit): (
                item if message and key == "role" else walk(item, (*path, key), visit)
            )
            for key, item in value.items()
        }
    return value


def places(messages: Any, tools: Any) -> list[tuple[Path, str]]:
    """Every string of a conversation that a template can write, by number: its tools' first, so
    that the beginning of a conversation has the numbers that all of it has."""
    found: list[tuple[Path, str]] = []
    if tools is not None:
        _list_places(tools, ("tools",), found)
    message: dict[str, Any]
    for i, message in enumerate(messages or []):
        for key, item in message.items():
            if type(item) is str:  # nearly all of them
                if key != "role":
                    found.append((("messages", i, key), item))
            elif key != "role":
                _list_places(item, ("messages", i, key), found)
    return found


def _list_places(value: Any, path: Path, found: list[tuple[Path, str]]) -> None:
    """The strings that `walk` visits, in its order."""
    if isinstance(value, str):
        found.append((path, value))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _list_places(item, (*path, i), found)
    elif isinstance(value, dict):
        for key, item in value.items():
            _list_places(key, (*path, key, KEY), found)
            _list_places(item, (*path, key), found)


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
            return joined(_between(cut, new), self)
        return joined(_between(self.split(old, count), new), self)

    def join(self, parts: Iterable[str], /) -> "Tracked":
        return joined(_between(list(parts), self), self)

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


def _between(parts: list[str], separator: str) -> list[str]:
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
            return joined(("[", line, *_between(inner, comma + line), end, "]"))
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
        return joined(("{", line, *_between(inner, comma + line), end, "}"))

    return write(value, 0)


# --- the environment ------------------------------------------------------------------------------

_UNFOLLOWED = (
    *("escape", "e", "forceescape", "urlize", "urlencode", "wordwrap", "center", "title", "indent"),
    *("striptags", "xmlattr", "pprint", "truncate"),
)
"""Filters that write strings of their own."""


class _Formatter(SandboxedFormatter):
    def vformat(self, format_string: str, args: Any, kwargs: Any) -> Any:
        parts: list[str] = []
        for automatic, (literal, field, spec, conversion) in enumerate(self.parse(format_string)):
            parts.append(literal)
            if field is None:
                continue
            name = field if field[:1] not in ("", ".", "[") else f"{automatic}{field}"
            value, _ = self.get_field(name, args, kwargs)
            if conversion:
                value = self.convert_field(value, conversion)
            parts.append(str(value) if not spec else format(value, spec))
        return joined(parts)


class Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, which remembers what it decided: of plain values the type decides."""

    _safe: ClassVar[dict[tuple[type, str], bool]] = {}

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        key = type(obj), attr
        if (safe := self._safe.get(key)) is None:
            safe = self._safe[key] = super().is_safe_attribute(obj, attr, value)
        return safe


class Environment(Sandbox):
    """transformers' environment for chat templates, with strings that are followed."""

    intercepted_binops = frozenset("%")
    concat = staticmethod(joined)  # pyright: ignore[reportAssignmentType]
    lost: bool = False

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        values = right if isinstance(right, tuple) else (right,)
        if not isinstance(left, str) or not is_tracked(list(values)):
            return super().call_binop(context, operator, left, right)
        pieces = re.split(r"(%[sd%])", left)
        if left.count("%") == sum(len(piece) for piece in pieces[1::2] if piece != "%%") / 2:
            waiting = iter(values)
            pieces[1::2] = [str(next(waiting)) for _ in pieces[1::2]]
            return joined(pieces)
        self.lost = True
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner: Any = getattr(obj, "__self__", None)
        # a compiled template hands its loops' variables to every call
        given = [list(args), [v for k, v in kwargs.items() if k[:1] != "_"]]
        followed = type(owner) is str and is_tracked(given)
        if followed:
            name = getattr(obj, "__name__", "")
            if name in ("join", "replace", "removeprefix", "removesuffix"):
                return getattr(Tracked(owner, origins_of(owner)), name)(*args)
        result = super().call(context, obj, *args, **kwargs)
        if followed and type(result) is str:
            self.lost = True
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None or value.__name__ != "format" or type(value.__self__) is not str:
            return wrapped
        formatter, text = _Formatter(self), value.__self__

        def call(*args: Any, **kwargs: Any) -> str:
            if is_tracked([list(args), kwargs]):
                return formatter.vformat(text, args, kwargs)
            return wrapped(*args, **kwargs)

        return call


def settled(variables: Any, clock: datetime | None) -> dict[str, Any]:
    """What a template's program finds beside a conversation, as one dict (it is copied for each
    rendering), and the time it sees."""
    return {**variables, **({"strftime_now": clock.strftime} if clock else {})}


def _join(value: Any, d: str = "", attribute: Any = None) -> str:
    items = list(value)
    if attribute is not None:
        items = [item[attribute] if isinstance(item, dict) else item for item in items]
    return joined(_between([str(item) for item in items], d))


def _replace(text: Any, old: str, new: str, count: Any = -1) -> str:
    text = str(text)
    if not is_tracked([text, new]):
        return text.replace(str(old), str(new), -1 if count is None else count)
    whole = Tracked(text, origins_of(text))
    return whole.replace(str(old), new, -1 if count is None else count)


class Tracker:
    """A chat template that says where what it writes comes from.

    Args:
        template: Jinja text.
        compile_: transformers' compiler of templates.
        clock: what ``strftime_now`` sees.
    """

    def __init__(
        self, template: str, compile_: Callable[[str], Any], clock: datetime | None = None
    ) -> None:
        # transformers keeps what it compiled: this environment is another's
        self.environment: Any = compile_(template + "{# followed #}").environment
        self.environment.__class__ = Environment
        runtime.str_join = lambda seq: joined([str(item) for item in seq])  # type: ignore[assignment]
        filters = self.environment.filters
        filters["tojson"], filters["join"], filters["replace"] = tojson, _join, _replace
        filters["safe"] = filters["string"] = lambda value: str(value)
        for name in _UNFOLLOWED:
            filters[name] = self._noticed(filters[name])
        filters["format"] = lambda text, *args, **kwargs: self.environment.call_binop(
            None, "%", str(text), kwargs or args
        )
        self.environment.finalize = self._shown
        self.template = self.environment.from_string(template)
        self.template.globals = settled(self.template.globals, clock)

    def _noticed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.environment.lost |= is_tracked([list(args), kwargs])
            return function(*args, **kwargs)

        return call

    def _shown(self, value: Any) -> Any:
        if isinstance(value, dict | list | tuple) and is_tracked(value):
            self.environment.lost = True
        return value

    def render(
        self, messages: Any, tools: Any, aliased: Callable[[Any], Any], variables: dict[str, Any]
    ) -> tuple[str, list[Origin], list[tuple[int, int]], bool]:
        """(text, origins, spans inside ``{% generation %}``, whether something was lost)."""
        number = -1

        def visit(text: str, _path: Path) -> str:
            nonlocal number
            number += 1
            return Tracked(text, [(len(text), number, 0)] if text else [])

        schemas = walk(tools, ("tools",), visit)
        tracked = walk(messages, ("messages",), visit)
        self.environment.lost = False
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        with self.environment.activate_tracker(blocks, spans):
            for block in self.template.generate(
                messages=aliased(tracked), tools=schemas, documents=None, **variables
            ):
                blocks.append(block)
        text = joined(blocks)
        return str.__str__(text), origins_of(text), list(spans), self.environment.lost

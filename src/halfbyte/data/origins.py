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
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, ClassVar

from jinja2 import runtime
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter

from .tracked import Origin, Tracked, between, is_tracked, joined, origins_of, tojson

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
    return joined(between([str(item) for item in items], d))


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

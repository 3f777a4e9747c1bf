"""Where progress goes: lines of text, a bar over work, a call per step."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")


def to_stderr(line: str) -> None:
    print(f"halfbyte: {line}", file=sys.stderr)


class Progress(Protocol):
    """Passes items on and shows how many. total: how many there are; 0 where nobody knows."""

    def __call__(self, items: Iterable[Item], total: int, title: str, /) -> Iterable[Item]: ...


def no_progress(items: Iterable[Item], total: int, title: str) -> Iterable[Item]:
    return items


Say = Callable[[str], None]


@dataclass
class Reporter:
    """Where progress goes: lines of text, a bar over work, a call per step, and a row as
    `Renderer.pieces`."""

    say: Say = lambda line: None
    progress: Progress = no_progress
    on_step: Callable[[dict[str, Any], int], None] = lambda row, total: None
    show_row: Callable[[list[tuple[str, str]]], None] = lambda pieces: None

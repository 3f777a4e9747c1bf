"""What a person sees: text on stdout (on stderr beside ``--json``), errors, progress bars."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

JSON = False
_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def use_json(flag: bool) -> None:
    global JSON
    JSON = flag


def _people() -> Console:
    return _err if JSON else _out


def say(line: str) -> None:
    _people().print(line, markup=False)


def error(text: str) -> None:
    _err.print("error: " + text, style="red" if _err.is_terminal else None, markup=False)


def piece(text: str) -> None:
    """Part of a line, at once."""
    stream = sys.stderr if JSON else sys.stdout
    stream.write(text)
    stream.flush()


def progress(items: Iterable[str], total: int, title: str) -> Iterable[str]:
    """The items, with a bar that shows itself once two seconds have passed."""
    bar = Progress(
        TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=_people(), transient=True
    )
    began, shown = time.monotonic(), False
    task = bar.add_task(title, total=total)
    try:
        for item in items:
            if not shown and time.monotonic() - began > 2 and _people().is_terminal:
                bar.start()
                shown = True
            yield item
            bar.advance(task)
    finally:
        if shown:
            bar.stop()


class StepProgress:
    """Training as a live line on a terminal, or a line every few seconds elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._task: Any = None
        self._began, self._first, self._printed = time.monotonic(), 0, 0.0

    def update(self, row: dict[str, Any], total: int) -> None:
        text = (
            f"loss {row['loss']:.3f}  {row['tokens_per_s']:.0f} tokens/s  memory {row['memory_bytes'] / 2**30:.2f} GiB"
        )
        if self._first == 0:
            self._first, self._began = row["step"], time.monotonic()
        if _people().is_terminal:
            self._on_terminal(row["step"], total, text)
            return
        now = time.monotonic()
        if now - self._printed > 5 or row["step"] in (self._first, total):
            self._printed = now
            say(f"step {row['step']}/{total}  {text}{self._remaining(row['step'], total, now)}")

    def _remaining(self, step: int, total: int, now: float) -> str:
        if step == self._first:
            return ""
        return f"  {(now - self._began) / (step - self._first) * (total - step):.0f} s left"

    def _on_terminal(self, step: int, total: int, text: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
                console=_people(),
            )
            self._task = self._bar.add_task("training", total=total, text=text)
            self._bar.start()
        self._bar.update(self._task, completed=step, text=text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def steps() -> Iterator[StepProgress]:
    shown = StepProgress()
    try:
        yield shown
    finally:
        shown.close()

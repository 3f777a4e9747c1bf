"""What a person sees: text on stdout (on stderr beside ``--json``), errors, progress bars."""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..progress import Item

JSON = False
_out = Console(highlight=False, soft_wrap=True, emoji=False)
_err = Console(stderr=True, highlight=False, soft_wrap=True, emoji=False)


def use_json(flag: bool) -> None:
    global JSON
    JSON = flag


NOTES_ON_STDERR = False


@contextmanager
def notes_on_stderr(flag: bool) -> Iterator[None]:
    """Within this block stdout takes pieces of an answer and nothing else, if ``flag``."""
    global NOTES_ON_STDERR
    before, NOTES_ON_STDERR = NOTES_ON_STDERR, flag
    try:
        yield
    finally:
        NOTES_ON_STDERR = before


def _people() -> Console:
    return _err if JSON or NOTES_ON_STDERR else _out


def write_anything() -> None:
    """Have text that a terminal's encoding lacks written with question marks instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _print(*things: Any, to: Console | None = None, **how: Any) -> None:
    """Print for people, as long as somebody reads: a closed pipe or a full device ends nothing."""
    people = to or _people()
    try:
        people.print(*things, **how)
        people.file.flush()
    except OSError:
        _let_go(people.file)


def _let_go(stream: Any) -> None:
    """Have a stream that takes no more text write to nowhere, what it still holds included."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _reads(text: str) -> bool:
    """Whether people's terminal has these characters."""
    try:
        text.encode(_people().encoding)
    except (UnicodeError, LookupError):
        return False
    return True


def say(line: str) -> None:
    people = _people()
    if (
        line.startswith("next: halfbyte")
        and shutil.which("halfbyte") is None
        and sys.argv[0].endswith("halfbyte")
    ):
        # as it was called: a fresh .venv is on nobody's PATH
        line = line.replace("halfbyte", sys.argv[0], 1)
    _print(line, markup=False, soft_wrap=not people.is_terminal)


def following(verb: str, *words: Any, raw: str = "") -> None:
    """The command to type next, its words quoted for a shell. raw: what stands at its end as it
    is."""
    line = " ".join(["next: halfbyte", verb, *(shlex.quote(str(word)) for word in words)])
    say(f"{line} {raw}".rstrip())


def result(value: Any) -> None:
    """What ``--json`` gives programs, on stdout."""
    try:
        print(json.dumps(value), flush=True)
    except OSError:
        _let_go(sys.stdout)


def error(text: str) -> None:
    style = "red" if _err.is_terminal else None
    _print("error: " + text, to=_err, style=style, markup=False)


def piece(text: str) -> None:
    """Part of a line, at once."""
    stream = sys.stderr if JSON else sys.stdout
    try:
        stream.write(text)
        stream.flush()
    except OSError:
        _let_go(stream)


_STYLES = {"read": "dim", "trained": "green", "end": "bold white on green"}


def show_row(pieces: list[tuple[str, str]]) -> None:
    """A row of training data: what is only read dim, what is trained green, its end token marked.
    Without colours, trained text stands in brackets."""
    people, text = _people(), Text()
    coloured = people.color_system is not None
    left, right = "⟦⟧" if _reads("⟦⟧") else ("[[", "]]")
    for piece, kind in pieces:
        shown = piece if len(piece) <= 600 else piece[:400] + " [...] " + piece[-150:]
        if kind != "read" and shown[:1] == "\n":  # what is trained is seen to be
            shown = ("↵" if _reads("↵") else "\\n") + shown[1:]
        text.append(
            shown if coloured or kind == "read" else f"{left}{shown}{right}",
            style=_STYLES[kind] if coloured else "",
        )
    legend = (
        Text("dim: read only   ", style="dim")
        if coloured
        else Text(f"outside {left}{right}: read only   ")
    )
    legend.append(
        "green: trained" if coloured else f"{left}trained{right}", style="green" if coloured else ""
    )
    _print(Padding(text, (0, 0, 0, 2)), soft_wrap=False)
    _print(Padding(legend, (0, 0, 0, 2)))


def samples(rows: list[dict[str, Any]]) -> None:
    """The same questions answered before and after training."""

    def cut(text: str, stopped: bool = True) -> Text:
        text = " ".join(text.split())
        shown = text if len(text) <= 150 else text[:147] + "..."
        return Text(shown + ("" if stopped else " (goes on)"))

    for row in rows:
        lines = Table.grid(padding=(0, 1))
        lines.add_row(Text("asked", style="bold"), cut(row["asked"]))
        lines.add_row(Text("wanted", style="dim"), cut(row["expected"]))
        lines.add_row(Text("before", style="dim"), cut(row["before"], row["before_stopped"]))
        lines.add_row(Text("after", style="green"), cut(row["after"], row["after_stopped"]))
        _print(Padding(lines, (0, 0, 1, 2)), soft_wrap=False)


def paragraph(text: str) -> None:
    """Running text, wrapped to the terminal (to 100 columns at most)."""
    people = _people()
    _print(Padding(Text(text), (0, 0, 1, 0)), soft_wrap=False, width=min(people.width, 100))


_FIGURE = re.compile(r"[-+]?[\d,.]*\d( ?(%|ms|M|GB|MiB|GiB))?|-|")


def table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A small table: columns of figures on the right, words on the left."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_header=any(columns))
    for number, column in enumerate(columns):
        figures = number > 0 and all(_FIGURE.fullmatch(str(row[number])) for row in rows)
        grid.add_column(column, justify="right" if figures else "left")
    for row in rows:
        grid.add_row(*(Text(str(cell)) for cell in row))
    if title:
        _print(Text(title, style="bold"), soft_wrap=False)
    _print(grid, soft_wrap=False)


def progress(items: Iterable[Item], total: int, title: str) -> Iterable[Item]:
    """The items, with a bar that shows itself once two seconds have passed."""
    bar = Progress(
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=_people(),
        transient=True,
    )
    began, shown = time.monotonic(), False
    task = bar.add_task(title, total=total or None)
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
        loss = "not finite, skipped" if row["loss"] is None else f"{row['loss']:.3f}"
        text = (
            f"loss {loss}  {row['tokens_per_s']:.0f} tokens/s  memory "
            f"{row['memory_bytes'] / 2**30:.2f} GiB"
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

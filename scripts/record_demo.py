"""A terminal recording of `halfbyte demo` as an SVG: the picture in the README.

    pip install pyte && python scripts/record_demo.py docs/demo.svg

The demo runs in a real pseudo-terminal; a terminal emulator keeps the screen, which is drawn as it
stands at the end.
"""

import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

import pyte  # pyright: ignore[reportMissingImports]
from rich.console import Console
from rich.text import Text

COLUMNS, LINES = 104, 300
NAMED = {"brown": "yellow", "brightblack": "bright_black"}


def record(arguments: list[str], home: str) -> pyte.Screen:
    """Run a command on a terminal of COLUMNS x LINES; the screen it leaves."""
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color"}
    process = subprocess.Popen(
        arguments, stdin=theirs, stdout=theirs, stderr=theirs, cwd=home, env=environment
    )
    os.close(theirs)
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:
            break
        if not data:
            break
        stream.feed(data)
    if process.wait():
        raise SystemExit("the demo failed:\n" + "\n".join(screen.display).rstrip())
    return screen


def line_of(screen: pyte.Screen, row: int) -> Text:
    text = Text()
    for column in range(COLUMNS):
        cell = screen.buffer[row][column]
        colour = str(NAMED.get(cell.fg, cell.fg))
        style = " ".join(
            part
            for part in (
                "bold" if cell.bold else "",
                ""
                if colour == "default"
                else colour
                if not colour.isalnum() or colour.isalpha()
                else f"#{colour}",
                "" if cell.bg == "default" else f"on {NAMED.get(cell.bg, cell.bg)}",
            )
            if part
        )
        text.append(cell.data, style)
    text.rstrip()
    return text


def main() -> None:
    target = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as home:
        screen = record([sys.executable, "-m", "halfbyte", "demo"], home)
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115, PTH123
    console.print(Text("$ halfbyte demo", "bold"))
    last = max(row for row in range(LINES) if screen.display[row].strip())
    for row in range(last + 1):
        console.print(line_of(screen, row))
    target.write_text(console.export_svg(title="halfbyte demo"), encoding="utf-8")


if __name__ == "__main__":
    main()

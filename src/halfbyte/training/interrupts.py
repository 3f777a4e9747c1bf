"""SIGINT, SIGTERM and SIGHUP while a run is worked on."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from ..errors import Interrupted

NOTHING_LOST = (
    "no step was under way, so nothing is lost. Repeat the command with "
    "--resume_from_checkpoint auto to go on"
)
ONLY_THE_RESULT = (
    "the training is done and its last checkpoint saved. "
    "Repeat the command with --resume_from_checkpoint auto to write the adapter"
)


SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""A lost connection's (SIGHUP) as well. One that is ignored stays so, as under nohup, or of a
command that a script put into the background."""


class Abandoned(Interrupted):
    """Raised by a signal inside `Interrupts.immediate`: what was under way can be thrown away."""


class Interrupts:
    """Signals that end a run while it is worked on: noted where state changes, acted on at once
    where it does not.

    The first signal is noted in ``signal``; inside `immediate` it raises `Abandoned`. A second one
    ends the process there and then, which every file of the run survives.
    """

    def __init__(self) -> None:
        self.signal = 0
        self._message: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread() and not self.signal:
            for number in SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        if self._message is not None:
            raise self._abandoned()

    def _abandoned(self) -> "Abandoned":
        return Abandoned(f"interrupted: {self._message}", self.signal)

    @contextlib.contextmanager
    def immediate(self, message: str) -> Iterator[None]:
        """Within this block a signal raises `Abandoned`, as does one that came before."""
        outer, self._message = self._message, message
        try:
            if self.signal:
                raise self._abandoned()
            yield
        finally:
            self._message = outer

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Within this block, inside of `immediate`, a signal is noted; it raises `Abandoned` at the
        end."""
        outer, self._message = self._message, None
        try:
            yield
        finally:
            self._message = outer
        if self.signal and outer is not None:
            raise self._abandoned()

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

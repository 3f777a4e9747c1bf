"""Every failure a person can meet, with the exit code of the command line.

An error says what happened, where (``file:line``, tensor, byte), what was found and what was
expected, and then the ways out in the order we would try them. Whoever raises fills in what it
knows; the command line prints it whole.
"""

import errno
import sys
from collections.abc import Sequence
from typing import Any


class HalfbyteError(Exception):
    """A failure we foresaw. ``exit_code`` is what the process ends with."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        found: str = "",
        expected: str = "",
        ways_out: Sequence[str] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.ways_out = tuple(ways_out)

    def __str__(self) -> str:
        lines = [self.what]
        for label, text in (
            ("where", self.where),
            ("found", self.found),
            ("expected", self.expected),
        ):
            if text:
                lines.append(f"  {label + ':':<10}{text}")
        if self.ways_out:
            lines.append("  ways out:")
            lines += [f"    {number}. {way}" for number, way in enumerate(self.ways_out, 1)]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        """The same facts for ``--json``."""
        return {
            "error": type(self).__name__,
            "exit_code": self.exit_code,
            "what": self.what,
            "where": self.where,
            "found": self.found,
            "expected": self.expected,
            "ways_out": list(self.ways_out),
        }


class UsageError(HalfbyteError):
    """Wrong option, value or configuration file."""

    exit_code = 2


class DoesNotFit(HalfbyteError):
    """More memory is needed than there is: planned, or met. plan: the plan as it is in ``plan
    --json``."""

    exit_code = 3

    def __init__(self, what: str, *, plan: dict[str, Any] | None = None, **more: Any) -> None:
        super().__init__(what, **more)
        self.plan = plan

    def as_dict(self) -> dict[str, object]:
        return {**super().as_dict(), **({"plan": self.plan} if self.plan else {})}


class DataError(HalfbyteError):
    """Training data, tokenizer or chat template refused."""

    exit_code = 4


class StorageError(HalfbyteError):
    """The disk said no: full, read-only, missing directory."""

    exit_code = 5


class ModelError(HalfbyteError):
    """Model, adapter or checkpoint refused."""

    exit_code = 6


class NonFiniteError(HalfbyteError):
    """A NaN or an infinity where a number is needed."""

    exit_code = 7


class VerificationError(HalfbyteError):
    """A measured check failed its threshold."""

    exit_code = 8


class BusyError(HalfbyteError):
    """Another process holds the run directory."""

    exit_code = 9


class Interrupted(HalfbyteError):
    """Stopped by a signal after the state was saved."""

    def __init__(self, what: str, signal_number: int) -> None:
        super().__init__(what)
        self.exit_code = 128 + signal_number


def is_exhaustion(error: BaseException) -> bool:
    """Whether an exception says that memory, of the host or of a GPU, has run out."""
    # whoever has not imported it cannot have run out of its memory
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    ):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(
        sign in str(error)
        for sign in (
            "out of memory",
            "can't allocate memory",
            "create a memory object",
            "bad_alloc",
            "start new thread",
        )
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]

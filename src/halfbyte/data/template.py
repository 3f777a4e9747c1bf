"""Chat templates, run where they can do no harm: in a child process with limits.

A template is a program that came with somebody's model. transformers' sandbox keeps it from
Python's insides, not from `'a' * 400000000` or three nested loops to 99,999. So it is compiled and
run in a forked child that has a time limit a rendering, a memory limit, a limit on what it may
return, no open files but its pipe, and dies with its parent. The clock it sees (`strftime_now`)
stands still at the time it is given, so that a resumed run renders the same ids.

Where there is no fork (Windows, macOS), the child starts anew and the memory limit may not hold.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import DataError

SECONDS = 10.0
"""Longest rendering of one conversation."""
MEMORY = 256 << 20
"""Bytes the child may have more than it starts with."""
CHARACTERS = 16 << 20
"""Longest text it may return."""


class TemplateProcess:
    """A chat template running in a child process; started on first use, ended with this object.

    Args:
        template: Jinja text.
        special_tokens: variables such as ``bos_token``.
        clock: what ``strftime_now`` sees.
    """

    def __init__(self, template: str, special_tokens: dict[str, Any], clock: datetime) -> None:
        self.template, self.special_tokens, self.clock = template, special_tokens, clock
        self._pipe: Any = None
        self._end: Any = None

    def render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, ask: bool, spans: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """(text, character spans inside ``{% generation %}``) of a conversation.

        Args:
            ask: end with the prompt for the assistant's turn.
            spans: whether spans are wanted.

        Raises:
            DataError: the template raised, or broke one of its limits.
        """
        pipe = self._pipe or self._start()
        try:
            pipe.send((messages, tools, ask, spans))
            if not pipe.poll(SECONDS):
                raise _refused(f"it was still running after {SECONDS:g} seconds")
            answer = pipe.recv()
        except (EOFError, OSError) as error:
            self.close()
            raise _refused("its process ended: out of memory, or killed") from error
        except BaseException:  # an interrupt: the answer would be taken for the next one's
            self.close()
            raise
        if isinstance(answer, str):
            raise _refused(answer)
        return answer

    def _start(self) -> Any:
        # imported here, so that a forked child need not
        import transformers.utils.chat_template_utils  # noqa: F401  # pyright: ignore[reportUnusedImport]

        method = "fork" if sys.platform == "linux" else "spawn"
        context: Any = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve,
            args=(theirs, self.template, self.special_tokens, self.clock, os.getpid()),
            daemon=True,
        )
        process.start()
        theirs.close()
        self._pipe = ours
        self._end = weakref.finalize(self, _kill, process, ours)
        return ours

    def close(self) -> None:
        """End the child; the next rendering starts another."""
        if self._end is not None:
            self._end()
        self._pipe = self._end = None


def _refused(why: str) -> DataError:
    return DataError(
        "the chat template refused the conversation",
        found=why,
        ways_out=["check the order of roles", "or give another template with --chat_template"],
    )


def _kill(process: Any, pipe: Any) -> None:
    process.kill()
    process.join()
    pipe.close()


# --- in the child ---------------------------------------------------------------------------------


def _serve(
    pipe: Any, template: str, special_tokens: dict[str, Any], clock: datetime, parent: int
) -> None:  # pragma: no cover
    # Ctrl-C reaches the whole process group; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _confine(pipe.fileno(), parent)
    from transformers.utils.chat_template_utils import (
        _compile_jinja_template,
        render_jinja_template,
    )

    compiled = False
    while True:
        try:
            messages, tools, ask, spans = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if not compiled:
                _compile_jinja_template(template).globals["strftime_now"] = clock.strftime
                compiled = True
            texts, found = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=spans,
                add_generation_prompt=ask,
                **special_tokens,
            )
            if len(texts[0]) > CHARACTERS:
                raise ValueError(f"it wrote {len(texts[0]):,} characters, more than {CHARACTERS:,}")
            pipe.send((texts[0], [(int(a), int(b)) for a, b in found[0]] if spans else []))
        except MemoryError:
            pipe.send(f"it needed more than {MEMORY >> 20} MiB of memory")
        except Exception as error:  # a template is a program: it can raise anything
            pipe.send((str(error) or type(error).__name__)[:2000])


def _confine(keep: int, parent: int) -> None:  # pragma: no cover
    """No files but the pipe and the standard streams, no more memory than allowed, no life after
    the parent's."""
    if sys.platform != "linux":
        return
    for entry in list(Path("/proc/self/fd").iterdir()):
        if int(entry.name) > 2 and int(entry.name) != keep:
            with contextlib.suppress(OSError):
                os.close(int(entry.name))
    import resource

    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmData:"):
            limit, hard = (
                int(line.split()[1]) * 1024 + MEMORY,
                resource.getrlimit(resource.RLIMIT_DATA)[1],
            )
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

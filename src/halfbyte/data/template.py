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
import json
import marshal
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import DataError
from .cells import plain
from .origins import Sandbox, Tracker, settled
from .tracked import TEMPLATE, Origin

SECONDS = 7.0
"""Longest rendering of one conversation, in processor time; a template that takes longer is not
asked again."""
PATIENCE = 20
"""So many times that may pass by a clock, where the process gets little of a processor."""
TOGETHER, WAITS = 64, 0.5
"""Answers that the child sends together, and the seconds after which it sends those it has."""
DEATHS = 3
"""So many of its processes may end by themselves."""
MEMORY = 256 << 20
"""Bytes the child may have more than it starts with."""
CHARACTERS = 16 << 20
"""Longest text it may return."""


@dataclass(frozen=True)
class Request:
    """A conversation to render.

    ask: end with the prompt for the assistant's turn. follow: say where the text comes from.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    ask: bool = False
    follow: bool = False


@dataclass(frozen=True)
class Rendering:
    """What a template wrote. origins: of all its characters (`data.origins`), if it was followed.
    generated: spans inside ``{% generation %}``. lost: what comes from the row is not known in
    all. variant: of the conversation (`variants`), the first one that the template takes."""

    text: str
    origins: list[Origin] = field(default_factory=list)
    generated: list[tuple[int, int]] = field(default_factory=list)
    lost: bool = False
    variant: int = 0

    def values(self) -> tuple[Any, ...]:
        return self.text, self.origins, self.generated, self.lost, self.variant


def variants(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """A conversation as templates want it: as it is; with a call's arguments as a JSON string, as
    some write them; both with the empty text of a call as none."""
    if not any(message.get("tool_calls") for message in messages):
        return [messages]
    typed = [_with_text(message, json.dumps) for message in messages]
    return [
        messages,
        typed,
        *(
            [
                {**message, "content": None}
                if message.get("tool_calls") and not message["content"]
                else message
                for message in form
            ]
            for form in (messages, typed)
        ),
    ]


def _with_text(message: dict[str, Any], dumps: Callable[..., str]) -> dict[str, Any]:
    """A message whose calls have their arguments as text."""

    def written(call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": written(call["function"])}
        return {**call, "arguments": dumps(call.get("arguments"), ensure_ascii=False)}

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [written(call) for call in calls]} if calls else message


class TemplateStopped(DataError):
    """A template that is not asked again: no row can be rendered."""


class TemplateProcess:
    """A chat template running in a child process; started on first use, ended with this object.

    Args:
        template: Jinja text.
        variables: what it is given beside the conversation, such as ``bos_token``.
        clock: what ``strftime_now`` sees.
        where: the template is, for people.
    """

    def __init__(
        self, template: str, variables: dict[str, Any], clock: datetime, where: str = ""
    ) -> None:
        self.template, self.variables, self.clock = template, variables, clock
        self._where = where
        self._pipe: Any = None
        self._child = 0
        self._end: Any = None
        self._maker: threading.Thread | None = None
        self._stopped: TemplateStopped | None = None
        self._deaths = 0
        self._asked = threading.Lock()  # one question at a time

    def render(self, requests: Sequence[Request]) -> list[Rendering | DataError]:
        """What the template writes, or why it refuses: it raised, or broke one of its limits.

        Raises:
            TemplateStopped: it does not end, now or earlier.
        """
        with self._asked:
            return self._answers(requests)

    def _answers(self, requests: Sequence[Request]) -> list[Rendering | DataError]:
        if self._stopped:
            raise self._stopped
        found: list[Rendering | DataError] = []
        alone = False  # whether requests are sent one by one, to see which ends the process
        while len(found) < len(requests):
            if self._maker is not None and not self._maker.is_alive():
                self.close()  # the system ends a child with the thread that made it
            pipe = self._pipe or self._start()
            waiting = requests[len(found) :][: 1 if alone else None]
            wanted = len(found) + len(waiting)
            try:
                pipe.send_bytes(_packed([(r.messages, r.tools, r.ask, r.follow) for r in waiting]))
                while len(found) < wanted:
                    self._wait(pipe)
                    answers = marshal.loads(pipe.recv_bytes())
                    if answers and isinstance(answers[0], str) and answers[0].startswith(NO_JINJA):
                        self._stop(answers[0])
                    found += [
                        _refused(answer) if isinstance(answer, str) else Rendering(*answer)
                        for answer in answers
                    ]
            except (EOFError, OSError, ValueError, TypeError):
                self.close()
                if len(waiting) > 1:
                    alone = True
                    continue
                self._deaths += 1
                if self._deaths >= DEATHS:
                    self._stop(f"its process ended {DEATHS} times: out of memory, or killed")
                found.append(_refused("its process ended: out of memory, or killed"))
            except BaseException:  # an interrupt: the answer would be taken for the next one's
                self.close()
                raise
        return found

    def _wait(self, pipe: Any) -> None:
        """Until there is an answer, or the child has computed too long for one: a process that is
        starved, or stopped with its parent (Ctrl-Z), computes nothing meanwhile."""
        began, waited = _seconds_of(self._child), 0.0
        while not pipe.poll(SECONDS / 10):
            waited += SECONDS / 10
            used = _seconds_of(self._child)
            if (waited if used is None or began is None else used - began) >= SECONDS:
                self._stop(f"it was still running after {SECONDS:g} seconds")
            if waited > SECONDS * PATIENCE:
                self._stop(f"it gave no answer in {waited:.0f} seconds")

    def _stop(self, why: str) -> None:
        self.close()
        refused = _refused(why)
        self._stopped = TemplateStopped(
            refused.what, where=self._where, found=refused.found, ways_out=refused.ways_out
        )
        raise self._stopped

    def _start(self) -> Any:
        # imported here, so that a forked child need not
        import transformers.utils.chat_template_utils  # noqa: F401  # pyright: ignore[reportUnusedImport]

        method = "fork" if sys.platform == "linux" else "spawn"
        context: Any = multiprocessing.get_context(method)
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve,
            args=(theirs, self.template, self.variables, self.clock, os.getpid()),
            daemon=True,
        )
        with _allowed_a_child():
            process.start()
        theirs.close()
        self._child = process.pid
        self._pipe, self._maker = ours, threading.current_thread()
        self._end = weakref.finalize(self, _kill, process, ours)
        return ours

    def close(self) -> None:
        """End the child; the next rendering starts another."""
        if self._end is not None:
            self._end()
        self._pipe = self._end = self._maker = None


def _packed(requests: list[Any]) -> bytes:
    """For the child, which gets plain values only."""
    try:
        return marshal.dumps(requests)
    except ValueError:  # a script's may be of any type
        return marshal.dumps(plain(requests))


@contextlib.contextmanager
def _allowed_a_child() -> Iterator[None]:
    """Within this block a daemonic process (a Pool's worker) may start one: ours is left behind by
    nobody, since it ends with its pipe."""
    config: dict[str, Any] = multiprocessing.current_process()._config  # pyright: ignore[reportAttributeAccessIssue]
    daemonic = config.get("daemon")
    config["daemon"] = False
    try:
        yield
    finally:
        config["daemon"] = daemonic


ENGINE = "the template engine itself fails: "
NO_JINJA = "it is not valid Jinja: "


def _refused(why: str) -> DataError:
    if why.startswith(ENGINE):
        return DataError(
            "conversations cannot be rendered",
            found=why,
            ways_out=["pip install -U jinja2 transformers"],
        )
    if why.startswith(NO_JINJA):
        return DataError(
            "the chat template cannot be read",
            found=why,
            ways_out=["mend it", "or give another template with --chat_template"],
        )
    return DataError(
        "the chat template refused the conversation",
        found=why,
        ways_out=["check the order of roles", "or give another template with --chat_template"],
    )


def _seconds_of(process: int) -> float | None:
    """Processor time of a process; None where the system does not say."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):
        return None


def _kill(process: Any, pipe: Any) -> None:
    process.kill()
    process.join()
    pipe.close()


# --- in the child ---------------------------------------------------------------------------------


def _serve(
    pipe: Any, template: str, variables: dict[str, Any], clock: datetime, parent: int
) -> None:  # pragma: no cover
    # Ctrl-C reaches the whole process group; the parent decides
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _confine(pipe.fileno(), parent)
    program: _Program | None = None
    while True:
        try:
            raw = pipe.recv_bytes()
        except (EOFError, OSError):
            return
        requests = marshal.loads(raw)
        # several at a time: a message costs as much as a rendering
        # as values that run nothing when they are read: what answers may be a stranger's program
        done: list[tuple[Any, ...] | str] = []
        sent = time.monotonic()
        for request in requests:
            try:
                program = program or _Program(template, variables, clock)
                done.append(program.render(Request(*request)).values())
            except MemoryError:
                done.append(f"it needed more than {MEMORY >> 20} MiB of memory")
            except Exception as error:  # a template is a program: it can raise anything
                done.append(_what_it_said(error))
            if len(done) == TOGETHER or time.monotonic() - sent > WAITS:
                pipe.send_bytes(marshal.dumps(done))
                done, sent = [], time.monotonic()
        if done:
            pipe.send_bytes(marshal.dumps(done))


def _what_it_said(error: Exception) -> str:  # pragma: no cover
    from jinja2 import TemplateSyntaxError

    said = (str(error) or type(error).__name__)[:2000]
    if isinstance(error, ImportError):  # an engine too old, or none
        return ENGINE + said
    if isinstance(error, TemplateSyntaxError):
        return f"{NO_JINJA}line {error.lineno}: {said}"
    return said


class _Program:  # pragma: no cover
    """A compiled template, as transformers runs it, and followed."""

    def __init__(self, template: str, variables: dict[str, Any], clock: datetime) -> None:
        from transformers.utils import chat_template_utils as theirs

        # what later releases of transformers do to a conversation before they render it; that they
        # take its values apart first is nothing here: what comes through the pipe is plain
        self.aliased: Any = getattr(theirs, "_alias_reasoning_fields", lambda chat: chat)
        compiled = theirs._compile_jinja_template
        self.plain: Any = compiled(template)
        self.plain.globals = settled(self.plain.globals, clock)
        self.plain.environment.__class__ = Sandbox
        self.tracker: Tracker | None = None
        self._track = lambda: Tracker(template, compiled, clock)
        self.variables = plain(variables)  # which came with the fork, from a script perhaps

    def render(self, request: Request) -> Rendering:
        """The rendering of the first variant that the template takes."""
        forms = variants(request.messages)
        first: Exception | None = None
        for number, messages in enumerate(forms):
            try:
                found = self._render(messages, request)
            except MemoryError:
                raise
            except Exception as error:
                first = first or error
                continue
            return replace(found, variant=number) if number else found
        assert first is not None
        raise first

    def _render(self, messages: list[dict[str, Any]], request: Request) -> Rendering:
        tools = request.tools
        variables = {**self.variables, "add_generation_prompt": request.ask}
        text = self.plain.render(
            messages=self.aliased(messages), tools=tools, documents=None, **variables
        )
        if len(text) > CHARACTERS:
            raise ValueError(f"it wrote {len(text):,} characters, more than {CHARACTERS:,}")
        if not request.follow:
            return Rendering(text)
        try:
            self.tracker = self.tracker or self._track()
            followed, origins, generated, lost = self.tracker.render(
                messages, tools, self.aliased, variables
            )
            if followed == text:
                return Rendering(text, origins, generated, lost)
        except MemoryError:
            raise
        except Exception:
            pass  # plain strings do it
        # an operation that tracked strings do not do as strings do
        blocks: list[str] = []
        spans: list[tuple[int, int]] = []
        with self.plain.environment.activate_tracker(blocks, spans):
            for block in self.plain.generate(
                messages=self.aliased(messages), tools=tools, documents=None, **variables
            ):
                blocks.append(block)
        return Rendering(text, [(len(text), TEMPLATE, 0)], spans, True)


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
    for line in Path("/proc/self/status").read_bytes().splitlines():  # its name may be no text
        if line.startswith(b"VmData:"):
            limit, hard = (
                int(line.split()[1]) * 1024 + MEMORY,
                resource.getrlimit(resource.RLIMIT_DATA)[1],
            )
            limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

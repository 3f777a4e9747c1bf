"""``halfbyte chat RUN``."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from ..config.options import ModelOptions
from ..config.verbs import ChatConfig
from ..errors import DataError, UsageError
from . import console
from .options import Verb

Turn = dict[str, Any]


def chat(record: ChatConfig) -> dict[str, Any]:
    """Talk to MODEL: a run directory, a Hub id or a local directory. --prompt for one answer."""
    piped = record.prompt is None and not sys.stdin.isatty()
    # of one answer stdout takes that alone
    with console.notes_on_stderr(piped or record.prompt is not None):
        talk = _Talk(record)
        if piped:
            return talk.once(_all_of_stdin())
        if record.prompt is not None:
            return talk.once(record.prompt)
        return talk.dialogue()


def _all_of_stdin() -> str:
    """The text of a pipe, without what an editor adds to a file of it: a byte order mark, and the
    newline at the end."""
    try:
        text = sys.stdin.read().removeprefix("\ufeff").removesuffix("\n")
    except OSError:  # closed, or nobody's
        text = ""
    except UnicodeDecodeError as error:
        raise _undecodable(error) from error
    if not text.strip():
        raise UsageError("nothing came through the pipe", ways_out=["--prompt TEXT, or a terminal"])
    return text


def _checked(text: str) -> str:
    """A text, if it is one: bytes that are none in the terminal's encoding come as half characters.

    Raises:
        UsageError: it has such bytes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _undecodable(error) from error
    return text


def _undecodable(error: UnicodeError) -> UsageError:
    return UsageError(
        "this is no text in UTF-8",
        found=str(error)[:200],
        ways_out=["convert it: iconv -f latin1 -t utf-8"],
    )


class _Talk:
    """A model and how it is asked."""

    def __init__(self, record: ChatConfig) -> None:
        from ..data.renderer import Renderer
        from ..engine.generate import Sampling, sampling_of
        from ..run.load import load, run_renderer
        from ..run.source import held_in, run_at

        given = {
            key: getattr(record, key)
            for key in (*ModelOptions.model_fields, "base")
            if key in record.model_fields_set
        }
        self.record, self.run = record, run_at(record.model)
        self.model, tokenizer = load(record.model, progress=console.progress, **given)
        console.say(f"{record.model} is held in {held_in(self.model)}")
        switches = record.chat_template_kwargs
        if self.run is None:
            self.renderer = Renderer(tokenizer, template_kwargs=switches)
        else:
            clock = self.run.clock() if record.clock == "run" else None
            as_trained = self.run.config()
            if switches is not None:
                as_trained = as_trained.model_copy(update={"chat_template_kwargs": switches})
            self.renderer = run_renderer(self.run, as_trained, clock)
        # a run trained on texts continues texts: a chat template is a form it never saw
        form = self.run.info()["data"]["form"] if self.run is not None else ""
        self.plain = form in ("prompt", "text")
        if self.plain:
            console.say(
                "this run was trained on plain texts: what you type is continued, without a chat "
                "template"
            )
            if record.system is not None:
                raise UsageError(
                    "a system message needs a chat template, which this run was not trained with"
                )
        elif not self.renderer.has_own_template:
            console.say(
                "this model has no chat template of its own: halfbyte's is used, a form it may "
                "never have seen"
            )
        # a run was trained as it is asked; what others trained was asked with such a prompt
        if self.run is None and not self.renderer.opens_answers():
            console.say(
                "the chat template writes no prompt for an answer (add_generation_prompt): the "
                "model has to write what opens its turn"
            )
        chosen = {name: getattr(record, name) for name in Sampling.__dataclass_fields__}
        if record.generation_config == "model":
            own = sampling_of(self.model)
            said = {k: v for k, v in chosen.items() if k in record.model_fields_set}
            chosen = {**chosen, **own, **said}
            console.say(
                "sampling as the base says: " + ", ".join(f"{k} {v:g}" for k, v in chosen.items())
            )
        self.sampling = Sampling(**chosen)
        self.stop = [_unescaped(each) for each in record.stop]
        self.begun = _unescaped(record.answer_prefix)
        self.dropped = 0
        self.opening: list[Turn] = []
        self.noticed = set[str]()
        if record.system is not None:
            self.opening = [{"role": "system", "content": _checked(record.system)}]

    def once(self, prompt: str) -> dict[str, Any]:
        """One answer."""
        record = self.record
        turns = [*self.opening, {"role": "user", "content": _checked(prompt)}]
        said = self._answer(prompt if self.plain else turns)
        if self.run is not None and self.run.config().full:
            console.following("eval", record.model, raw="--data held_out.jsonl")
        elif self.run is not None:
            console.following("merge", record.model, raw="--onto trained -o merged")
        else:
            console.following("train", record.model, raw="--data my.jsonl")
        turn = self._turn_of(said, turns)
        found = {"answer": turn["content"], "stopped": said.stopped, "cut": said.cut}
        more = {key: turn[key] for key in turn if key not in ("role", "content")}
        return {"prompt": prompt, **found, **more, **self._in_force()}

    def dialogue(self) -> dict[str, Any]:
        """Turn after turn, until an empty line."""
        turns = list(self.opening)
        console.say(
            "an empty line ends the conversation; a line that ends in \\ goes on in the next"
        )
        for text in _lines():
            turns.append({"role": "user", "content": _checked(text)})
            self._fit(turns)
            said = self._answer(text if self.plain else turns)
            turns.append(self._kept(self._turn_of(said, turns), said, turns))
        if self.run:
            console.following("merge", self.record.model, raw="--onto trained -o merged")
        else:
            console.following("explain", "nf4")
        return {"messages": turns, "turns_dropped": self.dropped, **self._in_force()}

    def _in_force(self) -> dict[str, Any]:
        settings = {**self.sampling.as_dict(), "seed": self.record.seed, "stop": self.stop}
        found: dict[str, Any] = {
            "sampling": {**settings, "max_new_tokens": self.record.max_new_tokens}
        }
        if self.renderer.template_kwargs:
            found["chat_template_kwargs"] = self.renderer.template_kwargs
        return {**found, "answer_prefix": self.begun} if self.begun else found

    def _fit(self, turns: list[Turn]) -> None:
        """Leave out the oldest turns where the conversation fills the model's context, in place."""
        from ..engine.generate import room_for

        first = len(self.opening)
        while not self.plain:
            try:
                room_for(self.model, self.renderer.dialogue_ids(turns, self.begun), 1)
                return
            except UsageError:
                if len(turns) - first <= 1:
                    raise
            del turns[first]
            self.dropped += 1
            while len(turns) - first > 1 and turns[first]["role"] != "user":
                del turns[first]
                self.dropped += 1
            console.say("(the oldest turn no longer fits into the model's context: it is left out)")

    def _turn_of(self, said: Any, turns: list[Turn]) -> Turn:
        """An answer as the turn behind ``turns``: calls and reasoning in it as such, and what is
        left as its text; with control tokens where there are any that nobody read."""
        from ..data.tool_calls import read_answer

        if self.plain or not said.marked.strip():
            return {"role": "assistant", "content": said.marked or said.text}
        asked = self.renderer.render(turns, add_generation_prompt=True)
        return read_answer(self.renderer.tokenizer, said.marked, asked)

    def _kept(self, turn: Turn, said: Any, turns: list[Turn]) -> Turn:
        """An answer behind ``turns`` in a form that the template takes when it is asked again. Some
        want each call to have an id (of nine letters, which suits all), some a tool's result before
        the next question: to them the call is text."""
        if "tool_calls" not in turn:
            return turn
        before = sum(len(each.get("tool_calls", ())) for each in turns)
        numbered = enumerate(turn["tool_calls"], before)
        calls = [{"id": f"call{number:05d}", **call} for number, call in numbered]
        for form in (turn, {**turn, "tool_calls": calls}):
            question = {"role": "user", "content": "question"}
            with contextlib.suppress(DataError):
                self.renderer.render([*turns, form, question], add_generation_prompt=True)
                return form
        console.say(
            "(the chat template takes no question behind a call: it is kept as the answer's text)"
        )
        return {"role": "assistant", "content": said.marked}

    def _answer(self, prompt: str | list[Turn]) -> Any:
        from ..engine.generate import answer

        record = self.record
        if not isinstance(prompt, str):
            self._refuse_unsent(prompt)
        said = answer(
            self.model,
            self.renderer,
            prompt,
            max_new_tokens=record.max_new_tokens,
            sampling=self.sampling,
            stop=self.stop,
            begun=self.begun,
            seed=record.seed,
            emit=console.piece,
        )
        console.piece("\n")
        if said.cut == "tokens":
            console.say(
                f"(cut off after {record.max_new_tokens} tokens; --max_new_tokens raises the limit)"
            )
        elif said.cut == "context":
            console.say("(cut off: the model's context is full)")
        return said

    def _refuse_unsent(self, turns: list[Turn]) -> None:
        """Raise UsageError if the template leaves out the system message or the question; say so of
        earlier questions."""
        unsent = self.renderer.unsent(turns)
        lost = [turns[i]["role"] for i in unsent if i == len(turns) - 1 or turns[i] in self.opening]
        if lost:
            raise UsageError(
                f"the model's chat template leaves the {lost[0]} message out, or a part of it",
                ways_out=["say it in the prompt"] if lost[0] == "system" else [],
            )
        if unsent and "earlier" not in self.noticed:
            self.noticed.add("earlier")
            console.say("(the model's chat template leaves earlier questions out)")


def _unescaped(text: str) -> str:
    """What was typed for line breaks and tabs as these."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _lines() -> Iterator[str]:
    """What is typed, as it is typed; a line that ends in a backslash goes on in the next."""
    while True:
        text = ""
        while True:
            try:
                console.piece("> " if not text else "  ")
                line = input()
            except EOFError:
                line = ""
            text += line.removesuffix("\\")
            if not line.endswith("\\"):
                break
            text += "\n"
        if not text.strip():
            return
        yield text


command = Verb("chat", ChatConfig, chat, positional=("model",))

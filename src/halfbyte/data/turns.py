"""A conversation to texts, and what of each is trained: turn by turn, as the model will be asked.

An answer is what the rendering grows by from "up to the question, asking for an answer" to "up to
the answer", with the control token that ends it. Where a template goes on from a turn as it wrote
it, a conversation is one text with all its answers. Where it writes earlier turns anew (thinking
only after the last question, answers cut at ``</think>``), it becomes one text for each answer,
each rendered as it will be at inference, of which only that answer is trained (``--turns``).
"""

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..errors import DataError
from .formats import Example, trained_turns
from .origins import places
from .template import Rendering, Request, variants
from .tracked import TEMPLATE

Span = tuple[int, int]
Turns = Literal["whole", "each", "last"]
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "question"}]
ANSWER: dict[str, Any] = {"role": "assistant", "content": "answer"}


class Rewrites(DataError):
    """What the template writes of a turn depends on what follows it."""


@dataclass(frozen=True)
class Text:
    """A rendered row. data: spans from the row, the others are the template's. trained: spans, in
    order. answer: of the last trained turn, the start and the place where its end begins.
    read: characters by place number. variant: of the conversation, as the template took it."""

    example: Example
    text: str
    data: list[Span]
    trained: list[Span]
    answer: Span | None
    read: Counter[int]
    lost: bool = False
    variant: int = 0


class TurnWriter:
    """Conversations to texts, through one template.

    Args:
        template: its Jinja text.
        render: `TemplateProcess.render`.
        special: the tokenizer's flagged control tokens. added: all its added tokens.
        assistant_only, completion_only: train answers only, or all.
        turns: "whole": one text where the template allows it.
    """

    def __init__(
        self,
        template: str,
        render: Callable[[Sequence[Request]], list[Rendering | DataError]],
        special: Sequence[str],
        added: Sequence[str],
        *,
        assistant_only: bool,
        completion_only: bool,
        turns: Turns,
    ) -> None:
        self.marked = bool(GENERATION.search(template))
        self._render, self._turns = render, turns
        self._assistant_only, self._completion_only = assistant_only, completion_only
        self._special, self._added = pattern_of(special), pattern_of(added)

    def write(self, examples: Sequence[Example]) -> list[list[Text] | DataError]:
        """The texts of each conversation, or why there is none."""
        found: dict[int, list[Text] | DataError] = {}
        parts: list[tuple[int, Example]] = []
        chosen = [(i, part) for i, e in enumerate(examples) for part in self._parts(e)]
        for (i, example), text in zip(chosen, self._one([e for _, e in chosen]), strict=True):
            if isinstance(text, Rewrites) and self._is_trained_by_turn(example):
                last = trained_turns(example)
                parts += [(i, _up_to(example, turn, len(last) > 1)) for turn in last]
            else:
                _add(found, i, text)
        again = self._one([part for _, part in parts], alone=True)
        for (i, _), text in zip(parts, again, strict=True):
            _add(found, i, text)
        for i, texts in found.items():
            if isinstance(texts, DataError):
                texts.where = texts.where or examples[i].where
        return [found[i] for i in range(len(examples))]

    def _is_trained_by_turn(self, example: Example) -> bool:
        return self._completion_only if example.supervised_from else self._assistant_only

    def _parts(self, example: Example) -> list[Example]:
        turns = trained_turns(example)
        if self._turns == "whole" or not turns or not self._is_trained_by_turn(example):
            return [example]
        chosen = turns[-1:] if self._turns == "last" else turns
        return [_up_to(example, turn, len(turns) > 1) for turn in chosen]

    def _one(self, examples: Sequence[Example], alone: bool = False) -> list[Text | DataError]:
        """One text for each.

        Args:
            alone: only the last turn is trained, and the text is made for it.
        """
        requests: list[Request] = []
        asked: list[list[int]] = []
        for example in examples:
            messages, tools = example.messages or [], example.tools
            turns = trained_turns(example)
            if self.marked or not self._is_trained_by_turn(example):
                turns = []
            numbers = [len(requests)]
            requests.append(Request(messages, tools, follow=True))
            for turn in turns:
                numbers.append(len(requests))
                requests.append(Request(messages[:turn], tools, ask=True, follow=alone))
                if turn + 1 < len(messages):
                    requests.append(Request(messages[: turn + 1], tools))
            asked.append(numbers)
        answers = self._render(requests)
        found: list[Text | DataError] = []
        for example, numbers in zip(examples, asked, strict=True):
            whole = answers[numbers[0]]
            if isinstance(whole, DataError):
                found.append(whole)
                continue
            try:
                found.append(self._text(example, whole, numbers[1:], answers, alone))
            except DataError as error:
                found.append(error)
        return found

    def _text(
        self,
        example: Example,
        whole: Rendering,
        numbers: list[int],
        answers: list[Rendering | DataError],
        alone: bool,
    ) -> Text:
        example = as_taken(example, whole.variant)
        messages = example.messages or []
        owners = _owners(example)
        turns = trained_turns(example)
        if self.marked and self._is_trained_by_turn(example):
            return self._as_marked(example, whole, owners)
        if not self._is_trained_by_turn(example):
            if example.untrained:
                raise DataError(
                    "a message that is not to be trained (weight 0) stands in a row of which "
                    "everything is trained",
                    ways_out=["--assistant_only_loss true"],
                )
            return written(example, whole, [(0, len(whole.text))], None)
        spans: list[Span] = []
        answer = None
        for turn, number in zip(turns, numbers, strict=True):
            before = answers[number]
            after = answers[number + 1] if turn + 1 < len(messages) else whole
            if isinstance(after, DataError):
                raise _rewrites(turn)
            if isinstance(before, DataError) or not after.text.startswith(before.text):
                start = self._opened(turn, whole, owners)
                if start is None and alone and isinstance(before, Rendering):
                    return self._continued(example, turn, before, whole, owners)
                if start is None or not whole.text.startswith(after.text[:start]):
                    raise _rewrites(turn)
            else:
                start = len(before.text)
            text, end = self._end(after.text, start, whole.text, turn + 1 == len(messages))
            if end is None:
                raise _rewrites(turn)
            whole = _longer(whole, text)
            spans.append((start, end[1]))
            answer = (start, end[0])
        return written(example, whole, spans, answer)

    def _as_marked(self, example: Example, whole: Rendering, owners: dict[int, int]) -> Text:
        """What ``{% generation %}`` marks, without messages that are only read."""
        if not whole.generated:
            raise DataError("the template's {% generation %} marks nothing in this conversation")
        messages = example.messages or []
        starts = _starts(whole, owners)
        read = {i for i, m in enumerate(messages) if m["role"] == "assistant"}
        read -= set(trained_turns(example))
        spans = [
            span
            for span in whole.generated
            if not any(span[0] <= place < span[1] for i, place in starts.items() if i in read)
        ]
        if not spans:
            raise DataError("nothing in this conversation is to be trained")
        start, stop = spans[-1]
        ends = [m for m in self._added.finditer(whole.text, start, stop) if m.end() > m.start()]
        tail = next((m.start() for m in ends if not whole.text[m.end() : stop].strip()), stop)
        return written(example, whole, spans, (start, tail))

    def _opened(self, turn: int, whole: Rendering, owners: dict[int, int]) -> int | None:
        """Where an answer begins whose question cannot be rendered by itself (the first turn of
        all): after the prompt for an answer, which stands before its first character."""
        first, prompt = _starts(whole, owners).get(turn), self._prompt
        if first is None or not prompt or turn:
            return None
        place = len(whole.text[:first].rstrip())
        shown = prompt.rstrip()
        if shown and whole.text[:place].endswith(shown):
            gap = prompt[len(shown) :]
            return place + len(gap) if whole.text.startswith(gap, place) else place
        return None

    @functools.cached_property
    def _prompt(self) -> str:
        """The text that asks for an answer."""
        bare, asking = self._render([Request(QUESTION), Request(QUESTION, ask=True)])
        if isinstance(bare, DataError) or isinstance(asking, DataError):
            return ""
        return asking.text.removeprefix(_common(bare.text, asking.text))

    def _continued(
        self,
        example: Example,
        turn: int,
        before: Rendering,
        whole: Rendering,
        owners: dict[int, int],
    ) -> Text:
        """An answer after a prompt that the template does not write again (it opens a thinking
        block): the answer as the row has it goes on from the prompt; without such a block in it,
        the text is the template's."""
        common = _common(before.text, whole.text)
        opened = before.text[len(common) :].strip()
        content = (example.messages or [])[turn]["content"] or ""
        first = _starts(whole, owners).get(turn)
        if self._special.search(before.text, len(common)) or first is None:
            raise _rewrites(turn)
        text, end = self._end(whole.text, len(common), whole.text, True)
        if end is None:
            raise _rewrites(turn)
        last = max(
            at + count
            for at, count, place, _ in _runs(whole)
            if owners.get(place) == turn and at >= first
        )
        between = whole.text[len(common) : first].strip()
        if between or not opened or not content.lstrip().startswith(opened):
            spans = [(len(common), end[1])]
            return written(example, _longer(whole, text), spans, (len(common), end[0]))
        skipped = content.index(opened) + len(opened)
        body = content[skipped:]
        gap = before.text[len(common) :].partition(opened)[2]
        shift = len(body) - len(body.removeprefix(gap))
        place = next(number for number, owner in owners.items() if owner == turn)
        text = before.text + body[shift:] + text[last:]
        origins = [
            *before.origins,
            (len(body) - shift, place, skipped + shift),
            (len(text) - len(before.text) - len(body) + shift, TEMPLATE, 0),
        ]
        moved = len(before.text) + len(body) - shift - last
        made = replace(whole, text=text, origins=origins)
        made_text = written(
            example, made, [(len(before.text), end[1] + moved)], (len(before.text), end[0] + moved)
        )
        made_text.read[place] = len(content)
        return made_text

    def _end(
        self, after: str, start: int, text: str, last: bool
    ) -> tuple[str, tuple[int, int] | None]:
        """The text, and (where the end begins, where it stops) of an answer that begins at start;
        None if the whole text does not go on from this turn.

        A template may close a *conversation* with more control tokens than a turn (Phi's end of
        text); those are given back where it goes on. Where a turn is ended by the token of the
        next role, that is its end, and it is written after the last turn too.

        Args:
            after: the conversation up to this turn.
            text: all of it.
        """
        pattern = self._special if self._ending != "unflagged" else self._added
        tail, stop = len(after), 0
        end: tuple[int, int] | None = None
        for match in reversed(list(pattern.finditer(after, start))):
            if after[match.end() : tail].strip():
                break
            tail = match.start()
            if end is None and text.startswith(after[: match.end()]):
                stop = match.end()
                end = (tail, stop)
            elif end is not None:
                end = (tail, stop)
        if end is not None:
            return text, end
        if not text.startswith(after):
            return text, None
        if self._next_role:
            if last:
                return text + self._next_role, (len(text), len(text) + len(self._next_role))
            if match := self._added.match(text, len(after)):
                return text, match.span()
        raise DataError(
            "the chat template writes no end token after the assistant's turn, so the model "
            "would never learn to stop",
            found=repr(after[start:][-40:]),
            ways_out=["give a template that ends the turn with the end token (--chat_template)"],
        )

    @functools.cached_property
    def _ending(self) -> str:
        """How the template ends a turn: "flagged" (a control token), "unflagged" (an added token
        that is not flagged special), "role" (the next role's token)."""
        after = self._render([Request([*QUESTION, ANSWER], follow=True)])[0]
        if isinstance(after, DataError):
            return "flagged"
        last = max((at + count for at, count, place, _ in _runs(after) if place >= 0), default=0)
        for kind, pattern in (("flagged", self._special), ("unflagged", self._added)):
            if any(match.end() > match.start() for match in pattern.finditer(after.text, last)):
                return kind
        return "role"

    @functools.cached_property
    def _next_role(self) -> str:
        """The token of a question's role, where it is what ends an answer."""
        if self._ending != "role":
            return ""
        answered, going_on = self._render(
            [Request([*QUESTION, ANSWER]), Request([*QUESTION, ANSWER, *QUESTION])]
        )
        if isinstance(answered, DataError) or isinstance(going_on, DataError):
            return ""
        if not going_on.text.startswith(answered.text):
            return ""
        match = self._added.match(going_on.text, len(answered.text))
        return match.group() if match else ""


def _rewrites(turn: int) -> Rewrites:
    return Rewrites(
        f"what the chat template writes of turn {turn} is not what it asks for: the prompt for an "
        "answer is no beginning of it, so what to train cannot be told from its output",
        ways_out=["--chat_template: one with {% generation %} around the assistant's text"],
    )


# --- places ---------------------------------------------------------------------------------------


def _common(one: str, other: str) -> str:
    """What two texts begin with."""
    at = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(at, min(len(one), len(other)))]


def pattern_of(tokens: Sequence[str]) -> re.Pattern[str]:
    longest = sorted((re.escape(token) for token in tokens if token), key=len, reverse=True)
    return re.compile("|".join(longest) or r"(?!)")


def as_taken(example: Example, variant: int) -> Example:
    """A conversation in the form that its template takes (`variants`)."""
    forms = variants(example.messages or []) if variant else []
    return replace(example, messages=forms[variant]) if variant else example


def _up_to(example: Example, turn: int, named: bool) -> Example:
    """The conversation that ends with a turn, which alone is trained."""
    return replace(
        example,
        where=f"{example.where} turn {turn}" if named else example.where,
        messages=(example.messages or [])[: turn + 1],
        supervised_from=turn,
        untrained=frozenset(),
        part_of=example.where,
    )


def _add(found: dict[int, list[Text] | DataError], i: int, text: Text | DataError) -> None:
    before = found.setdefault(i, [])
    if isinstance(text, DataError):
        if isinstance(before, list):
            found[i] = text
    elif isinstance(before, list):
        before.append(text)


def _owners(example: Example) -> dict[int, int]:
    """The message of each place that is one's."""
    return {
        number: path[1]
        for number, (path, _) in enumerate(places(example.messages, example.tools))
        if path[0] == "messages"
    }


def _runs(rendering: Rendering) -> list[tuple[int, int, int, int]]:
    """(start in the text, count, place, start in the place)."""
    found, at = [], 0
    for count, place, first in rendering.origins:
        found.append((at, count, place, first))
        at += count
    return found


def _longer(whole: Rendering, text: str) -> Rendering:
    """With what was added at its end: the next role's token, which nobody wrote yet."""
    if text == whole.text:
        return whole
    added = (len(text) - len(whole.text), TEMPLATE, 0)
    return replace(whole, text=text, origins=[*whole.origins, added])


def _starts(rendering: Rendering, owners: dict[int, int]) -> dict[int, int]:
    """Where each message's first character stands in the text."""
    found: dict[int, int] = {}
    for at, _, place, _ in _runs(rendering):
        if (owner := owners.get(place)) is not None:
            found.setdefault(owner, at)
    return found


def written(
    example: Example, rendering: Rendering, trained: list[Span], answer: Span | None
) -> Text:
    data: list[Span] = []
    read: Counter[int] = Counter()
    for at, count, place, _ in _runs(rendering):
        if place == TEMPLATE:
            continue
        read[place] += count
        if data and data[-1][1] == at:
            data[-1] = (data[-1][0], at + count)
        else:
            data.append((at, at + count))
    more = rendering.lost, rendering.variant
    return Text(example, rendering.text, data, trained, answer, read, *more)

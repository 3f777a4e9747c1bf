"""The one renderer: a conversation to text, token ids and a mask. Training, chat and export all use
it.

The text of a row comes from two sources, and mixing them up is how models are broken: the
*template* writes control tokens, the *data* must not (a user's ``<|im_end|>`` is text). Which
characters are whose is followed through the template (`data.origins`), what of them is trained is
decided turn by turn (`data.turns`); the whole text is tokenized at once (`data.encoder`).

One file because what a row is trained on, what a model is asked with, what its answer is held
against and what ends it are one conversation seen four times, and are only right together.
"""

import functools
import itertools
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from ..errors import DataError
from .chat_template import builtin_template, refuse_unread, template_digest, templates_of
from .encoder import Encoder, TokenizedExample, Tokens
from .formats import ASKING, Example, trained_turns
from .origins import places
from .template import Rendering, Request, TemplateProcess, variants
from .tracked import TEMPLATE
from .turns import Text, Turns, TurnWriter, pattern_of, written
from .unread import named_unread, unread


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered row."""

    text: str
    from_data: bool
    supervised: bool


Tokenized = Sequence[Tokens | TokenizedExample | DataError]
"""What the tokenizer made of a row; several where each answer is one."""


class Renderer:
    """Conversations to ids for one tokenizer and template.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: Jinja text used instead of the tokenizer's own.
        assistant_only: train the assistant's turns only.
        completion_only: train the completion only.
        clock: the time a template that asks for it sees; now, if not given.
        turns: "whole": a conversation is one row where the template allows it; "each": a row for
            each answer; "last": the last answer only.
        parse_control_tokens: control tokens in texts, prompts and completions are control tokens.
        ends: ids that the model's own files say end an answer.
        template_kwargs: what the template is given beside a conversation.

    Raises:
        DataError: no template, none can be built (no end token), or the template cannot be used.
        UsageError: the template reads nothing of such a name.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        *,
        assistant_only: bool = True,
        completion_only: bool = True,
        clock: datetime | None = None,
        turns: Turns = "whole",
        parse_control_tokens: bool = False,
        ends: Iterable[int] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self._declared = tokenizer, list(ends)
        self.completion_only, self._parse = completion_only, parse_control_tokens
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end token (eos_token), so a model trained with it could "
                "never stop",
                ways_out=["set eos_token in tokenizer_config.json"],
            )
        templates = {"default": template} if template else templates_of(tokenizer)
        self.has_own_template = bool(templates.get("default"))
        templates.setdefault("default", "")
        templates["default"] = templates["default"] or builtin_template(tokenizer)
        # as Jinja reads it, and as it comes back from a file
        self.templates = {
            name: text.replace("\r\n", "\n").replace("\r", "\n")
            for name, text in sorted(templates.items())
        }
        self.template = self.templates["default"]
        self._template_at = "" if template else f"the chat template in {tokenizer.name_or_path}"
        self.template_kwargs = dict(template_kwargs or {})
        refuse_unread(self.template_kwargs, self.templates)
        added = tokenizer.added_tokens_decoder
        self.special: dict[str, int] = {
            token.content: index for index, token in added.items() if token.special
        }
        self._added = [token.content for token in added.values()]
        self.clock = clock or datetime.now()
        self._noticing = threading.Lock()
        self.noticed: Counter[str] = Counter()
        """What people should be told of the rows, and of how many it holds."""
        self._options: dict[str, Any] = {
            "assistant_only": assistant_only,
            "completion_only": completion_only,
            "turns": turns,
        }
        self._special_pattern = pattern_of(list(self.special))
        self._processes: dict[str, TemplateProcess] = {}
        self._writers: dict[str, TurnWriter] = {}
        self._encoder = Encoder(
            tokenizer,
            self.special,
            completion_only=completion_only,
            parse_control_tokens=parse_control_tokens,
            noticed=self.noticed,
        )

    def identity(self) -> dict[str, Any]:
        """Everything that decides what a conversation becomes, as plain values."""
        clocked = any("strftime_now" in text for text in self.templates.values())
        return {
            "tokenizer": self.tokenizer.backend_tokenizer.to_str(),
            "special": [self.tokenizer.special_tokens_map, self.special, self._added],
            "end": self.tokenizer.eos_token_id,
            "templates": self.templates,
            "kwargs": self.template_kwargs,
            "clock": self.clock.isoformat() if clocked else "",
            "parse": self._parse,
            **self._options,
        }

    def rest(self) -> None:
        """End the processes that templates run in; the next conversation starts another."""
        for process in self._processes.values():
            process.close()

    @property
    def template_sha256(self) -> str:
        return template_digest(self.chat_template)

    @property
    def chat_template(self) -> str | dict[str, str]:
        """What belongs into a tokenizer's ``chat_template``: the template, or all by name."""
        return self.template if len(self.templates) == 1 else self.templates

    # --- text ---

    def _named(self, tools: Any) -> str:
        """Which template writes a conversation, as transformers chooses it."""
        return "tool_use" if tools and "tool_use" in self.templates else "default"

    def _process(self, name: str) -> TemplateProcess:
        if name not in self._processes:
            variables = {**self.tokenizer.special_tokens_map, **self.template_kwargs}
            self._processes[name] = TemplateProcess(
                self.templates[name], variables, self.clock, self._template_at
            )
        return self._processes[name]

    def _writer(self, name: str) -> TurnWriter:
        if name not in self._writers:
            self._writers[name] = TurnWriter(
                self.templates[name],
                self._process(name).render,
                list(self.special),
                self._added,
                **self._options,
            )
        return self._writers[name]

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The template's text for a conversation.

        Raises:
            DataError: the template raised; its message is quoted.
        """
        return self._render(messages, tools, add_generation_prompt).text

    def _render(
        self, messages: list[dict[str, Any]], tools: list[Any] | None, ask: bool
    ) -> Rendering:
        request = Request(messages, tools, ask, follow=True)
        (answer,) = self._process(self._named(tools)).render([request])
        if isinstance(answer, DataError):
            raise answer
        return answer

    def _texts(self, examples: Sequence[Example]) -> list[list[Text] | DataError]:
        """The texts of each row, or why there is none: the template raised, leaves something out,
        or writes no end token; a conversation is several where its template makes it so."""
        found: dict[int, list[Text] | DataError] = {
            i: [self._plain(example)]
            for i, example in enumerate(examples)
            if example.messages is None
        }
        for name in self.templates:
            chosen = [
                i
                for i, example in enumerate(examples)
                if example.messages is not None and self._named(example.tools) == name
            ]
            if not chosen:
                continue
            texts = self._writer(name).write([examples[i] for i in chosen])
            for i, each in zip(chosen, texts, strict=True):
                found[i] = each if isinstance(each, DataError) else self._read(examples[i], each)
        return [found[i] for i in range(len(examples))]

    def _read(self, example: Example, texts: list[Text]) -> list[Text] | DataError:
        """The texts, if all of the row is in them that must be."""
        try:
            self._refuse_unfollowed(example, texts)
            unread = named_unread(example, texts)
        except DataError as error:
            error.where = example.where
            return error
        for what in unread:
            self._notice(f"rows hold what the template does not write: {what}")
        if any(map(_trains_empty_reasoning, texts)):
            self._notice(EMPTY_REASONING)
        if len(texts) > 1:
            self._notice(SPLIT)
            self._notice(PARTS, len(texts))
        return texts

    def _notice(self, what: str, count: int = 1) -> None:
        with self._noticing:  # rows are rendered in several threads
            self.noticed[what] += count

    def _plain(self, example: Example) -> Text:
        """A plain text, or a prompt and its completion; the end token follows."""
        prompt, text = example.prompt, example.prompt + example.completion
        start = len(prompt) if self.completion_only else 0
        data = [(0, len(text))]
        if found := self._special_pattern.search(text):
            if self._parse:
                data = []
            else:
                self._notice(
                    f"control tokens such as {found.group()} in a text are read as letters "
                    "(--parse_control_tokens reads them as control tokens; or bring the rows as "
                    "`messages`)"
                )
        return Text(example, text, data, [(start, len(text))], (start, len(text)), Counter())

    def _refuse_unfollowed(self, example: Example, texts: list[Text]) -> None:
        """Where a template does what cannot be followed, a row may not hold the text of a control
        token."""
        if not any(text.lost for text in texts):
            return
        for _, value in places(example.messages, example.tools):
            if found := self._special_pattern.search(value):
                raise DataError(
                    f"the text {found.group()!r} in this row would become a control token: the "
                    "chat template rewrites it in a way that cannot be followed",
                    where=example.where,
                    ways_out=[
                        "change that text in the row",
                        "or give another template with --chat_template",
                    ],
                )

    def segments(self, example: Example) -> list[Segment]:
        """A row as pieces of known origin.

        Raises:
            DataError: naming the row.
        """
        (texts,) = self._texts([example])
        if isinstance(texts, DataError):
            raise texts
        (text,) = texts
        return _cut(text.text, text.data, text.trained)

    # --- ids ---

    def encode(self, examples: list[Example]) -> list[TokenizedExample]:
        """Ids and masks of many rows (the tokenizer works on them in parallel), in their order.

        Raises:
            DataError: naming the first row that cannot be rendered.
        """
        rows, bad = self.encode_each(examples)
        if bad:
            raise bad[0]
        return rows

    def encode_each(
        self, examples: Sequence[Example]
    ) -> tuple[list[TokenizedExample], list[DataError]]:
        """Ids and masks of the rows that can be rendered, and an error for each other.

        Raises:
            TemplateStopped: the template does not end.
        """
        return self.finish(self.tokenize(examples))

    def tokenize(self, examples: Sequence[Example]) -> list[Tokenized]:
        """What the tokenizer makes of each row, or of each answer of one; the first half of
        `encode_each`, which waits for the template's process and the tokenizer's threads."""
        texts = iter(self._texts([e for e in examples if e.input_ids is None]))
        rows = [_ready(e) if e.input_ids is not None else next(texts) for e in examples]
        tokens = iter(
            self._encoder.tokenize([t for row in rows if isinstance(row, list) for t in row])
        )
        return [[next(tokens) for _ in row] if isinstance(row, list) else [row] for row in rows]

    def finish(
        self, tokenized: Iterable[Tokenized]
    ) -> tuple[list[TokenizedExample], list[DataError]]:
        """Ids and masks of rows (the second half)."""
        good: list[TokenizedExample] = []
        bad: list[DataError] = []
        for row in tokenized:
            parts = [self._encoder.row(p) if isinstance(p, Tokens) else p for p in row]
            wrong = [part for part in parts if isinstance(part, DataError)]
            bad += wrong[:1]
            if not wrong:
                good += [part for part in parts if isinstance(part, TokenizedExample)]
        return good, bad

    def prompt_ids(
        self,
        prompt: str | list[dict[str, Any]],
        tools: list[Any] | None = None,
        begun: str = "",
    ) -> list[int]:
        """What generation starts from: ids of a conversation that asks for the assistant's turn, or
        of a plain text that is ``begun`` to go on in such a way, control tokens and all."""
        if isinstance(prompt, str):
            return self._encoder.prompt_ids(prompt, begun)
        text = self._asking(prompt, tools)
        return self._encoder.ids(text.text, text.data)

    def dialogue_ids(self, turns: list[dict[str, Any]], begun: str = "") -> list[int]:
        """As `prompt_ids`, of a conversation whose answers the model gave: the control tokens it
        wrote are control tokens again, as those of an answer that is ``begun`` are."""
        text = self._asking(turns, None, answers_are_own=True)
        return self._encoder.ids(text.text + begun, text.data)

    def _asking(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        answers_are_own: bool = False,
    ) -> Text:
        """The text that asks for the next answer."""
        example = Example("the prompt", messages, tools=tools)
        rendering = self._render(messages, tools, True)
        if answers_are_own:  # as if the template had written them
            said = variants(messages)[rendering.variant]
            own = {
                number
                for number, (path, _) in enumerate(places(said, tools))
                if path[0] == "messages" and said[path[1]]["role"] == "assistant"
            }
            origins = [(n, TEMPLATE if at in own else at, i) for n, at, i in rendering.origins]
            rendering = replace(rendering, origins=origins)
        text = written(example, rendering, [], None)
        self._refuse_unfollowed(example, [text])
        return text

    def unsent(self, messages: list[dict[str, Any]]) -> list[int]:
        """Which messages, not the assistant's, the template leaves out in whole or in part where
        it asks for an answer."""
        text = self._asking(messages, None)
        example = replace(text.example, messages=variants(messages)[text.variant])
        lost = {path[1] for path, _, _ in unread(example, [text]) if path[2:] == ("content",)}
        return [i for i, each in enumerate(messages) if i in lost and each["role"] != "assistant"]

    def opens_answers(self) -> bool:
        """Whether a conversation that asks for an answer ends where one begins. Where the template
        writes no such prompt, what it writes before an answer is left to the model."""
        asked = [{"role": "user", "content": "question"}]
        said = [*asked, {"role": "assistant", "content": "answer"}]
        try:
            prompt = self.render(asked, add_generation_prompt=True)
            plain, whole = self.render(asked), self.render(said)
        except DataError:  # it wants a system message, or tools
            return True
        before, found, _ = whole[len(prompt) :].partition("answer")
        return prompt != plain or not found or not before.strip()

    def question_and_answer(self, example: Example) -> tuple[list[int], str] | None:
        """The ids that ask for a row's last answer, and that answer as it was trained; None where
        there is no question (plain text) or the answer is a call."""
        if example.messages is not None:
            last = trained_turns(example)[-1]
            asked = any(message["role"] in ASKING for message in example.messages[:last])
            if not asked or example.messages[last].get("tool_calls"):
                return None
            asking = self._asking(example.messages[:last], example.tools)
            ids = self._encoder.ids(asking.text, asking.data)
            return ids, self._wanted(example, last, asking.text)
        if not example.prompt:
            return None
        return self.prompt_ids(example.prompt), self._encoder.as_said(example.completion)

    def without_control_tokens(self, text: str) -> str:
        """A text of the template's as it is read."""
        return self._special_pattern.sub("", text)

    def _wanted(self, example: Example, turn: int, asking: str) -> str:
        """The answer of a turn as it was trained, without control tokens of the template; as it
        stands in the row where everything was trained."""
        (texts,) = self._texts([example])
        if isinstance(texts, DataError):
            raise texts
        text = texts[-1]
        if text.answer is None:
            return self._encoder.as_said((example.messages or [])[turn]["content"]).strip()
        start, stop = text.answer
        if text.text.startswith(asking):  # marks may begin before what is asked
            start = max(start, len(asking))
        pieces = _cut(text.text[:stop], text.data, [(start, stop)])
        wanted = "".join(
            piece.text if piece.from_data else self.without_control_tokens(piece.text)
            for piece in pieces
            if piece.supervised
        )
        return self._encoder.as_said(wanted.strip()).strip()

    def pieces(self, row: TokenizedExample) -> list[tuple[str, str]]:
        """A row as (text, kind) for people, kind one of "read", "trained", "end" (a trained control
        token)."""
        ends = {*self.special.values(), *self.stop_ids()}
        kinds = [
            "read" if not flag else "end" if index in ends else "trained"
            for index, flag in zip(row.input_ids, row.loss_mask, strict=True)
        ]
        result, start, shown = [], 0, ""
        for kind, group in itertools.groupby(kinds):
            stop = start + len(list(group))
            whole = self.tokenizer.decode(row.input_ids[:stop], clean_up_tokenization_spaces=False)
            piece = (
                whole[len(shown) :]
                if whole.startswith(shown)
                else self.tokenizer.decode(row.input_ids[start:stop])
            )
            result.append((piece, kind))
            start, shown = stop, whole
        return result

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the tokenizer's end token, the control tokens the template trains
        after it, and what the model's own files declare."""
        return sorted({self.tokenizer.eos_token_id, *self._declared, *self._template_ends})

    @functools.cached_property
    def _template_ends(self) -> set[int]:
        turns = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "answer"},
        ]
        noticed = Counter(self.noticed)
        try:
            (row,) = self.encode([Example("the template's own example", turns)])
        # texts are trained without a template: one that cannot be used then ends nothing
        except DataError:
            return set()
        finally:  # it is no row of theirs
            self.noticed.clear()
            self.noticed.update(noticed)
        return self._ends_of(row)

    def learn_ends(self, rows: Iterable[TokenizedExample]) -> None:
        """Take what ends the answers of rows for the template's ends, where it refuses our own
        example (it wants a system message, or tools)."""
        if not self._template_ends:
            conversations = (row for row in rows if row.example and row.example.messages)
            self._template_ends = set[int]().union(
                *(self._ends_of(row) for row in itertools.islice(conversations, ASKED_FOR_ENDS))
            )

    def _ends_of(self, row: TokenizedExample) -> set[int]:
        """The control tokens behind a row's last trained answer."""
        stops, control = set[int](), set(self.tokenizer.added_tokens_decoder)
        for index, flag in zip(reversed(row.input_ids), reversed(row.loss_mask), strict=True):
            if index in control and flag:
                stops.add(index)
            elif self.tokenizer.decode([index]).strip():
                break
        return stops


ASKED_FOR_ENDS = 64
"""Rows."""


EMPTY_REASONING = (
    "rows train an empty thinking block, which the template writes into answers without reasoning: "
    "the model learns to think nothing where it is not told so "
    "(--chat_template_kwargs '{\"enable_thinking\": false}', where the template reads that, asks "
    "without thinking and leaves the block untrained)"
)
_EMPTY_BLOCK = re.compile(r"<(?P<name>(?:seed:)?think(?:ing)?)>\s*</(?P=name)>")


def _trains_empty_reasoning(text: Text) -> bool:
    """Whether a thinking block with nothing in it is trained that the row does not hold."""
    return any(
        not any(start < match.end() and match.start() < stop for start, stop in text.data)
        for begin, end in text.trained
        for match in _EMPTY_BLOCK.finditer(text.text, begin, end)
    )


SPLIT = "conversations became"
PARTS = "rows, one for each answer: the template writes earlier turns anew (--turns last|each)"


def _ready(example: Example) -> TokenizedExample:
    """A row that came as ids; without a mask of its own everything is trained."""
    ids = example.input_ids or []
    return TokenizedExample(example.where, ids, example.loss_mask or [True] * len(ids), example)


def _cut(text: str, data: list[tuple[int, int]], trained: list[tuple[int, int]]) -> list[Segment]:
    """The text cut where its origin or its training changes."""
    edges = sorted(
        {0, len(text), *(e for span in data for e in span), *(e for span in trained for e in span)}
    )

    def inside(spans: list[tuple[int, int]], start: int) -> bool:
        return any(low <= start < high for low, high in spans)

    return [
        Segment(text[start:stop], inside(data, start), inside(trained, start))
        for start, stop in itertools.pairwise(edges)
        if stop > start
    ]

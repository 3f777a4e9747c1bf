"""The one renderer: a conversation to text, token ids and a mask. Training, chat and export all use
it.

The text of a row comes from two sources, and mixing them up is how models are broken: the
*template* writes control tokens, the *data* must not (a user's ``<|im_end|>`` is text). And some
characters are trained, the others only read. So a row is rendered to `Segment`s, each from the
template or from data, trained or not; then the whole text is tokenized once (so the ids are those
any other tool gets from the same conversation) and the mask is read off the character positions. It
is never read off token ids: where pad equals eos, that masks the end.

Where does a segment come from? Contents are wrapped in markers (two private-use characters),
rendered, and the markers removed; if that gives the unmarked rendering, the markers tell which
characters are data. Templates that inspect or rewrite contents fail that test; then the row is
taken only if no content holds the text of a control token.

What is trained? Where the template marks it with ``{% generation %}``, that. Else, turn by turn,
the text by which the rendering grows from "up to the question, asking for an answer" to "up to the
answer", after checking that these are prefixes of the whole. Templates that rewrite earlier turns
fail that test and are refused by name.

One file because text, ids and loss mask of a row are three views of the same characters, and are
only right together.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..errors import DataError
from .formats import Example, other_strings
from .template import TemplateProcess

BUILTIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' -%}\
{{ '### Assistant:\\n' + message.content + eos_token + '\\n' }}
{%- else -%}{{ '### User:\\n' + message.content + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Assistant:\\n' }}{%- endif -%}
"""
"""For tokenizers without a template: needs no new tokens."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_OPEN, _CLOSE = "\ue0a0", "\ue0a1"
_STAND_IN = 0xF0000
"""First of the private-use characters that stand for control tokens while a text is tokenized."""


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered row."""

    text: str
    from_data: bool
    supervised: bool


@dataclass(frozen=True)
class TokenizedExample:
    """A tokenized row: ids, and for each whether the model is trained to predict it."""

    where: str
    input_ids: list[int]
    loss_mask: list[bool]


class Renderer:
    """Conversations to ids for one tokenizer and template.

    Args:
        tokenizer: a fast transformers tokenizer.
        template: Jinja text used instead of the tokenizer's own.
        assistant_only: train the assistant's turns only.
        completion_only: train the completion only.
        clock: the time a template that asks for it sees; now, if not given.

    Raises:
        DataError: no template, none can be built (no end token), or the template cannot be used.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str | None = None,
        *,
        assistant_only: bool = True,
        completion_only: bool = True,
        clock: datetime | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.assistant_only, self.completion_only = assistant_only, completion_only
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end token (eos_token), so a model trained with it could "
                "never stop",
                ways_out=["set eos_token in tokenizer_config.json"],
            )
        self.template = template or _template_of(tokenizer) or _builtin(tokenizer)
        # as Jinja reads it, and as it comes back from a file
        self.template = self.template.replace("\r\n", "\n").replace("\r", "\n")
        self.special: dict[str, int] = {
            token.content: index
            for index, token in tokenizer.added_tokens_decoder.items()
            if token.special
        }
        self.clock = clock or datetime.now()
        self._process = TemplateProcess(self.template, tokenizer.special_tokens_map, self.clock)
        self._stand_in = {text: chr(_STAND_IN + n) for n, text in enumerate(self.special)}
        self._special_pattern = re.compile(
            "|".join(re.escape(t) for t in sorted(self.special, key=len, reverse=True))
        )
        self._backend = self._tokenizer_without_control_words()
        self._original_id: dict[int, int] = {}
        for text, character in self._stand_in.items():
            index = self._backend.token_to_id(character)
            assert index is not None
            self._original_id[index] = self.special[text]

    def rest(self) -> None:
        """End the process that templates run in; the next conversation starts another."""
        self._process.close()

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256(self.template.encode()).hexdigest()

    def _tokenizer_without_control_words(self) -> Tokenizer:
        """A copy that reads control tokens as plain text, and stand-in characters as control
        tokens."""
        backend = Tokenizer.from_str(_untrimmed(self.tokenizer.backend_tokenizer.to_str()))
        backend.no_padding()
        backend.no_truncation()
        for _index, token in self.tokenizer.added_tokens_decoder.items():
            if token.special:
                stand_in = AddedToken(
                    self._stand_in[token.content],
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    single_word=token.single_word,
                    normalized=False,
                    special=False,
                )
                if backend.add_tokens([stand_in]) != 1:
                    raise DataError(
                        "the tokenizer uses the private character "
                        f"U+{ord(self._stand_in[token.content]):X}"
                    )
        backend.encode_special_tokens = True
        return backend

    # --- text ---

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
        return self._render(messages, tools, add_generation_prompt, False)[0]

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None,
        add_generation_prompt: bool,
        want_spans: bool,
    ) -> tuple[str, list[tuple[int, int]]]:
        return self._process.render(messages, tools, add_generation_prompt, want_spans)

    def segments(self, example: Example) -> list[Segment]:
        """A row as pieces of known origin.

        Raises:
            DataError: naming the row: the template raised, rewrites earlier turns, or writes no end
                token.
        """
        if example.messages is None:
            return [
                Segment(example.prompt, True, not self.completion_only),
                Segment(example.completion, True, True),
            ]
        try:
            text = self.render(example.messages, example.tools)
            _refuse_left_out(example, text)
            spans = self._trained_spans(example, text)
            return _cut(text, self._data_spans(example, text), spans)
        except DataError as error:
            error.where = error.where or example.where
            raise

    def _trained_spans(self, example: Example, text: str) -> list[tuple[int, int]]:
        """Character spans of what is trained: the assistant's turns, each up to and with its end
        token, or all."""
        messages, tools, first = example.messages or [], example.tools, example.supervised_from
        if not (self.completion_only if first else self.assistant_only):
            return [(0, len(text))]
        if _GENERATION.search(self.template):
            spans = self._render(messages, tools, False, True)[1]
            if first:
                read = self.render(messages[:first], tools, add_generation_prompt=True)
                if not text.startswith(read):
                    raise self._rewrites(first)
                spans = [span for span in spans if span[1] > len(read)]
            if not spans:
                raise DataError(
                    "the template's {% generation %} marks nothing in this conversation"
                )
            return spans
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < first:
                continue
            before = self.render(messages[:index], tools, add_generation_prompt=True)
            after = self.render(messages[: index + 1], tools)
            if not after.startswith(before):
                raise self._rewrites(index)
            end = self._end_of_turn(after, len(before), text)
            if end is None:
                raise self._rewrites(index)
            spans.append((len(before), end))
        return spans

    @staticmethod
    def _rewrites(index: int) -> DataError:
        return DataError(
            f"the chat template rewrites turn {index} when the conversation goes on, "
            "so what to train cannot be told from its output",
            ways_out=[
                "use a template with {% generation %} around the assistant's text "
                "(--chat_template)",
                "or split such rows into conversations that end with the assistant's turn",
            ],
        )

    def _end_of_turn(self, after: str, start: int, text: str) -> int | None:
        """Where a turn that begins at start ends: after the last control token that closes it in
        the whole text.

        Args:
            after: the conversation up to this turn.
            text: all of it. A template may close a *conversation* with more control tokens than a
                turn (Phi's end of text); those are given back where it goes on.

        Returns:
            None if the whole text does not go on from this turn.
        """
        tail = len(after)
        for match in reversed(list(self._special_pattern.finditer(after, start))):
            if after[match.end() : tail].strip():
                break
            if text.startswith(after[: match.end()]):
                return match.end()
            tail = match.start()
        if text.startswith(after):
            raise DataError(
                "the chat template writes no end token after the assistant's turn, so the model "
                "would never learn to stop",
                found=repr(after[start:][-40:]),
                ways_out=[
                    "give a template that ends the turn with the end token (--chat_template)"
                ],
            )
        return None

    def _data_spans(
        self, example: Example, text: str, *, asking: bool = False
    ) -> list[tuple[int, int]]:
        """Character spans of the rendered text that come from the contents."""
        messages, where = example.messages or [], example.where
        contents = [message["content"] for message in messages]
        if culprit := next(
            (m.group() for c in other_strings(example) for m in self._special_pattern.finditer(c)),
            None,
        ):
            raise DataError(
                f"the text {culprit!r} in a tool or tool call of this row would become a control "
                "token",
                where=where,
                ways_out=["change that text in the row"],
            )
        if any(_OPEN in content or _CLOSE in content for content in contents):
            marked_text = None
        else:
            marked = [{**m, "content": _mark(m["content"])} for m in messages]
            marked_text = self.render(marked, example.tools, add_generation_prompt=asking)
        if marked_text is None or marked_text.replace(_OPEN, "").replace(_CLOSE, "") != text:
            if culprit := next(
                (m.group() for c in contents for m in self._special_pattern.finditer(c)), None
            ):
                raise DataError(
                    f"the text {culprit!r} in this row would become a control token: the chat "
                    "template rewrites contents, so its own tokens cannot be told from the row's",
                    where=where,
                    ways_out=[
                        "change that text in the row",
                        "or give another template with --chat_template",
                    ],
                )
            return []
        spans, removed, opened = [], 0, 0
        for position, character in enumerate(marked_text):
            if character == _OPEN:
                opened = position - removed
                removed += 1
            elif character == _CLOSE:
                spans.append((opened, position - removed))
                removed += 1
        return spans

    # --- ids ---

    def encode(self, examples: list[Example]) -> list[TokenizedExample]:
        """Ids and masks of many rows (the tokenizer works on them in parallel)."""
        encoded = {
            i: _ready(example)
            for i, example in enumerate(examples)
            if example.input_ids is not None
        }
        chosen = [i for i in range(len(examples)) if i not in encoded]
        encoded.update(zip(chosen, self._encode([examples[i] for i in chosen]), strict=True))
        return [encoded[i] for i in range(len(examples))]

    def _encode(self, examples: list[Example]) -> list[TokenizedExample]:
        pieces = [self.segments(example) for example in examples]
        texts, spans = [], []
        for row in pieces:
            text, trained = "", []
            for segment in row:
                shown = self._shown(segment)
                if segment.supervised:
                    trained.append((len(text), len(text) + len(shown)))
                text += shown
            texts.append(text)
            spans.append(trained)
        plain = [example.messages is None for example in examples]
        try:
            results = self._encode_batch(texts, plain)
        except DataError as error:  # a panic, of one of them
            if len(examples) > 1:
                for example in examples:
                    self._encode([example])
            error.where = examples[0].where
            raise
        return [
            self._mask(example.where, result, trained, ended)
            for example, result, trained, ended in zip(examples, results, spans, plain, strict=True)
        ]

    def _encode_batch(self, texts: list[str], add_special_tokens: list[bool]) -> list[Any]:
        results: list[Any] = [None] * len(texts)
        for flag in (False, True):
            chosen = [i for i, value in enumerate(add_special_tokens) if value is flag]
            with _panics_named():
                batch = self._backend.encode_batch(
                    [texts[i] for i in chosen], add_special_tokens=flag
                )
            for i, result in zip(chosen, batch, strict=True):
                results[i] = result
        return results

    def _shown(self, segment: Segment) -> str:
        """What the tokenizer sees: control tokens of the template as stand-ins, the data as it
        is."""
        if segment.from_data or not self.special:
            return segment.text
        return self._special_pattern.sub(lambda match: self._stand_in[match.group()], segment.text)

    def _original_ids(self, ids: list[int]) -> list[int]:
        return [self._original_id.get(index, index) for index in ids]

    def _mask(
        self, where: str, result: Any, spans: list[tuple[int, int]], append_end: bool
    ) -> TokenizedExample:
        ids = self._original_ids(result.ids)
        trained, span = [], 0
        for start, stop in result.offsets:
            while span < len(spans) and spans[span][1] <= start:
                span += 1
            trained.append(span < len(spans) and stop > spans[span][0] and stop > start)
        if append_end:
            if not ids or ids[-1] != self.tokenizer.eos_token_id:
                ids.append(self.tokenizer.eos_token_id)
                trained.append(True)
            trained[-1] = True
        return TokenizedExample(where, ids, trained)

    def prompt_ids(
        self, prompt: str | list[dict[str, Any]], tools: list[Any] | None = None
    ) -> list[int]:
        """What generation starts from: ids of a conversation that asks for the assistant's turn, or
        of a plain text."""
        if isinstance(prompt, str):
            (result,) = self._encode_batch([prompt], [True])
            ids = self._original_ids(result.ids)
            return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids
        text = self.render(prompt, tools, add_generation_prompt=True)
        row = _cut(
            text,
            self._data_spans(Example("the prompt", prompt, tools=tools), text, asking=True),
            [],
        )
        (result,) = self._encode_batch(["".join(map(self._shown, row))], [False])
        return self._original_ids(result.ids)

    def question_and_answer(self, example: Example) -> tuple[list[int], str] | None:
        """The ids that ask for a row's last answer, and that answer; None where there is no
        question (plain text)."""
        if example.messages is not None:
            last = max(
                i for i, message in enumerate(example.messages) if message["role"] == "assistant"
            )
            asked = any(message["role"] in ("user", "tool") for message in example.messages[:last])
            if not asked or example.messages[last].get("tool_calls"):
                return None
            return self.prompt_ids(example.messages[:last], example.tools), example.messages[last][
                "content"
            ]
        if not example.prompt:
            return None
        return self.prompt_ids(example.prompt), example.completion

    def pieces(self, row: TokenizedExample) -> list[tuple[str, str]]:
        """A row as (text, kind) for people, kind one of "read", "trained", "end" (a trained control
        token)."""
        kinds = [
            "read" if not flag else "end" if index in self.special.values() else "trained"
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
        """Ids that end an answer: the tokenizer's end token, and the control tokens the template
        trains after it."""
        return list(self._stop_ids)

    @functools.cached_property
    def _stop_ids(self) -> list[int]:
        turns = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": "answer"},
        ]
        stops, control = {self.tokenizer.eos_token_id}, set(self.special.values())
        try:
            (row,) = self.encode([Example("the template's own example", turns)])
        # texts are trained without a template: one that cannot be used then ends nothing
        except DataError:
            return sorted(stops)
        for index, flag in zip(reversed(row.input_ids), reversed(row.loss_mask), strict=True):
            if index in control and flag:
                stops.add(index)
            elif self.tokenizer.decode([index]).strip():
                break
        return sorted(stops)


@contextlib.contextmanager
def _panics_named() -> Iterator[None]:
    """Within this block a panic of the tokenizer's library (which is no Exception) is a DataError:
    its pattern blew up over a text."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(
            "the tokenizer gave up on a text",
            found=str(error).splitlines()[0][:300] if str(error) else "a panic",
            ways_out=["look at the longest rows", "or take the model's newest tokenizer.json"],
        ) from error


def _refuse_left_out(example: Example, text: str) -> None:
    """Raise DataError where the template leaves tools or tool calls out: an empty answer would be
    trained instead."""
    calls = [call for turn in example.messages or [] for call in turn.get("tool_calls") or []]
    for kind, items in (("tool call", calls), ("tool", example.tools or [])):
        for item in items:
            inner = item.get("function", item) if isinstance(item, dict) else {}
            name = inner.get("name") if isinstance(inner, dict) else None
            if isinstance(name, str) and name not in text:
                raise DataError(
                    f"the chat template leaves the {kind} {name!r} out",
                    where=example.where,
                    ways_out=[
                        "give a template that writes tools (--chat_template)",
                        "or remove them from the rows",
                    ],
                )


def _untrimmed(serialized: str) -> str:
    """A serialized tokenizer whose offsets hold every character: some trim white space, which then
    looks untrained."""

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                key: False if key == "trim_offsets" else walk(item) for key, item in value.items()
            }
        return [walk(item) for item in value] if isinstance(value, list) else value

    data = json.loads(serialized)
    return json.dumps({**data, "post_processor": walk(data.get("post_processor"))})


def _ready(example: Example) -> TokenizedExample:
    """A row that came as ids; without a mask of its own everything is trained."""
    ids = example.input_ids or []
    return TokenizedExample(example.where, ids, example.loss_mask or [True] * len(ids))


def _template_of(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None


def _builtin(tokenizer: Any) -> str:
    """The built-in template, with the beginning token where this tokenizer itself writes one."""
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{- bos_token -}}\n" if starts else "") + BUILTIN_TEMPLATE


def read_template(path: str) -> str:
    """A template file given by the user.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the chat template {path}", found=str(error)) from error


def _mark(content: str) -> str:
    """The content between markers, white space at its ends left outside, where a template may trim
    it."""
    core = content.strip()
    if not core:
        return content
    start = content.index(core)
    return f"{content[:start]}{_OPEN}{core}{_CLOSE}{content[start + len(core) :]}"


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

"""Texts of known origin to token ids and a mask of what is trained.

The whole text is tokenized once (so the ids are those any other tool gets from the same
conversation) and the mask is read off the character positions. It is never read off token ids:
where pad equals eos, that masks the end. Where a token would hold the end of a prompt and the
beginning of an answer, the text is cut there: a model is asked with the very ids it was trained on.
"""

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy

from ..errors import DataError
from .formats import Example
from .stand_ins import Shown, StandIns
from .turns import Span, Text

Places = numpy.ndarray[Any, Any]
"""Of characters: int64 [tokens]."""
_BOUNDARY = "\n"
"""Begins the second of two texts that are tokenized apart, and is taken off its ids."""

SHARED = (
    "rows would share a token between a prompt and its answer: they are tokenized apart, as a "
    "model is asked"
)


@dataclass(frozen=True)
class TokenizedExample:
    """A tokenized row: ids, and for each whether the model is trained to predict it.

    example: what it was made of (one turn of it, where a template makes each turn a row of its
    own).
    """

    where: str
    input_ids: list[int]
    loss_mask: list[bool]
    example: Example | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Tokens:
    """A text, as it was shown to the tokenizer, and what that made of it."""

    text: Text
    shown: Shown
    result: Any


class Encoder:
    """Texts to ids with one tokenizer.

    Args:
        tokenizer: a fast transformers tokenizer.
        special: its flagged control tokens, and their ids.
        completion_only: of a plain text the completion is trained.
        parse_control_tokens: control tokens in a plain prompt are control tokens.
        noticed: takes what people should be told of the rows.
    """

    def __init__(
        self,
        tokenizer: Any,
        special: dict[str, int],
        *,
        completion_only: bool,
        parse_control_tokens: bool,
        noticed: Counter[str],
    ) -> None:
        self._tokenizer, self._noticed = tokenizer, noticed
        self._completion_only, self._parse = completion_only, parse_control_tokens
        self._stand_ins = StandIns(tokenizer, special)

    def tokenize(self, texts: list[Text]) -> list[Tokens | DataError]:
        """What the tokenizer makes of texts, in parallel."""
        shown = [self._stand_ins.show(text.text, text.data) for text in texts]
        plain = [text.example.messages is None for text in texts]
        try:
            results = self._encode_batch(shown, plain)
        except DataError as error:  # a panic, of one of them
            if len(texts) > 1:
                return [tokens for text in texts for tokens in self.tokenize([text])]
            error.where = texts[0].example.where
            return [error]
        return list(map(Tokens, texts, shown, results))

    def row(self, tokens: Tokens) -> TokenizedExample | DataError:
        """Ids and mask of a text."""
        try:
            return self._row(tokens.text, tokens.shown, tokens.result)
        except DataError as error:
            error.where = tokens.text.example.where
            return error

    def _encode_batch(self, shown: list[Shown], add_special_tokens: list[bool]) -> list[Any]:
        results: list[Any] = [None] * len(shown)
        kinds = {(each.base, flag) for each, flag in zip(shown, add_special_tokens, strict=True)}
        for base, flag in sorted(kinds):
            chosen = [
                i
                for i, each in enumerate(shown)
                if each.base == base and add_special_tokens[i] is flag
            ]
            with _panics_named():
                batch = self._stand_ins.backend(base).encode_batch(
                    [shown[i].text for i in chosen], add_special_tokens=flag
                )
            for i, result in zip(chosen, batch, strict=True):
                results[i] = result
        return results

    def _row(self, text: Text, shown: Shown, result: Any) -> TokenizedExample:
        """Ids and mask of a text, the mask by position."""
        spans = [(shown.at(start), shown.at(stop)) for start, stop in text.trained]
        plain = text.example.messages is None
        ids, offsets = self._stand_ins.ids(shown, result), result.offsets
        starts, stops = _ends(offsets)
        self._refuse_dropped(shown, starts, stops)
        cuts = _within_tokens(starts, stops, [place for place, _ in spans])
        if plain and text.example.prompt and self._completion_only and not cuts:
            asked = self.prompt_ids(text.example.prompt)
            cuts = [spans[0][0]] if ids[: len(asked)] != asked else []
        if cuts:
            self._noticed[SHARED] += 1
            if apart := self._apart(shown, cuts, plain):
                ids, offsets = apart
                starts, stops = _ends(offsets)
        trained = _within(starts, stops, spans)
        if plain:
            if not ids or ids[-1] != self._tokenizer.eos_token_id:
                ids.append(self._tokenizer.eos_token_id)
                trained.append(True)
            trained[-1] = True
        return TokenizedExample(text.example.where, ids, trained, text.example)

    def _refuse_dropped(self, shown: Shown, starts: Places, stops: Places) -> None:
        """Raise DataError for characters that the tokenizer drops: positions after them are not
        those of the text."""
        gapless = (starts[1:] <= stops[:-1]).all()
        if gapless and len(starts) and not starts[0] and stops[-1] == len(shown.text):
            return
        covered = numpy.concatenate(([0], numpy.maximum.accumulate(stops)))
        following = numpy.concatenate((starts, [len(shown.text)]))
        gaps = numpy.flatnonzero(following > covered).tolist()
        if not any(shown.text[covered[i] : following[i]].strip() for i in gaps):
            return

        def ids(text: str) -> list[int]:
            return self._stand_ins.backend(shown.base).encode(text, add_special_tokens=False).ids

        dropped = [
            character
            for character in sorted(set(shown.text))
            if not character.isspace() and ids("a" + character) == ids("a")
        ]
        if dropped:
            raise DataError(
                f"the model's vocabulary has no token for {len(dropped)} of this row's characters, "
                "and its tokenizer drops them",
                found=" ".join(f"{c} (U+{ord(c):04X})" for c in dropped[:8]),
                ways_out=["write them otherwise", "--skip_bad N leaves such rows out"],
            )

    def _apart(
        self, shown: Shown, cuts: list[int], add_special_tokens: bool
    ) -> tuple[list[int], list[Span]] | None:
        """Ids and offsets of a text whose parts are tokenized each by itself; None where the
        tokenizer cannot begin in the middle of a text."""
        backend = self._stand_ins.backend(shown.base)
        ids: list[int] = []
        offsets: list[Span] = []
        for start, stop in itertools.pairwise([0, *cuts, len(shown.text)]):
            part = shown.text[start:stop]
            if start == 0:
                result = backend.encode(part, add_special_tokens=add_special_tokens)
                ids, offsets = self._stand_ins.ids(shown, result), list(result.offsets)
                if add_special_tokens and len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id:
                    del ids[-1], offsets[-1]
                continue
            result = backend.encode(_BOUNDARY + part, add_special_tokens=False)
            first = next((i for i, (begin, _) in enumerate(result.offsets) if begin >= 1), 0)
            if not first or any(end > 1 for _, end in result.offsets[:first]):
                return None
            ids += self._stand_ins.ids(shown, result)[first:]
            offsets += [(a - 1 + start, b - 1 + start) for a, b in result.offsets[first:]]
        return ids, offsets

    def ids(self, text: str, data: list[Span], *, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text. data: where in it no control token is one."""
        shown = self._stand_ins.show(text, data)
        (result,) = self._encode_batch([shown], [add_special_tokens])
        return self._stand_ins.ids(shown, result)

    def prompt_ids(self, prompt: str, begun: str = "") -> list[int]:
        """What a plain text goes on from: with the tokenizer's beginning, without its end. begun:
        what follows the prompt, control tokens and all."""
        data = [] if self._parse else [(0, len(prompt))]
        ids = self.ids(prompt + begun, data, add_special_tokens=True)
        return ids[:-1] if len(ids) > 1 and ids[-1] == self._tokenizer.eos_token_id else ids

    def as_said(self, text: str | None) -> str:
        """A text as the tokenizer gives it back: one that normalizes can say it in no other way."""
        text = text or ""
        ids = self.ids(text, [] if self._parse else [(0, len(text))])
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _ends(offsets: list[Span]) -> tuple[Places, Places]:
    """Where each token begins and ends."""
    flat = numpy.fromiter(itertools.chain.from_iterable(offsets), numpy.int64, 2 * len(offsets))
    return flat[::2], flat[1::2]


def _within_tokens(starts: Places, stops: Places, places: list[int]) -> list[int]:
    """Those of some places that have a token on both sides, the same one."""
    at = numpy.array(places, numpy.int64)[:, None]
    inside: Any = (starts < at) & (at < stops)
    return [places[i] for i in numpy.flatnonzero(inside.any(1)).tolist()]


def _within(starts: Places, stops: Places, spans: list[Span]) -> list[bool]:
    """Whether each token begins in one of the spans, which are in order: one that begins in a
    prompt was read before anything was to be said."""
    if not spans:
        return [False] * len(starts)
    begin, end = numpy.array(spans, numpy.int64).T
    span = end.searchsorted(starts, "right")  # the first that ends behind it
    inside = (span < len(spans)) & (starts >= begin[numpy.minimum(span, len(spans) - 1)])
    return (inside & (stops > starts)).tolist()


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

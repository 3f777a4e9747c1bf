"""Characters that stand for control tokens while a text is tokenized: the text of a row never
becomes one.

A copy of the tokenizer reads control tokens as plain text and a few private characters as control
tokens; the template's control tokens are shown to it as those characters. Of several ranges the one
is taken that no character of the row is in.
"""

import bisect
import json
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..errors import DataError, ModelError, first_line
from .turns import Span, pattern_of

BASES = (0xF0000, 0x100000, 0x40000, 0x50000, 0x60000, 0x70000, 0x80000, 0x90000)
"""Firsts of the ranges: private use, then unassigned planes."""


@dataclass(frozen=True)
class Shown:
    """A text as the tokenizer sees it. base: of its stand-ins. moved: (place in the text, place
    here) after each stand-in."""

    text: str
    base: int
    moved: list[tuple[int, int]]

    def at(self, place: int) -> int:
        """A place of the text, here."""
        before, here = self.moved[bisect.bisect_right(self.moved, (place, 1 << 62)) - 1]
        return here + place - before


class StandIns:
    """Texts as a tokenizer shall see them.

    Args:
        tokenizer: a fast transformers tokenizer.
        special: its flagged control tokens, and their ids.
    """

    def __init__(self, tokenizer: Any, special: dict[str, int]) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._pattern = pattern_of(list(special))
        self._numbers = {text: n for n, text in enumerate(special)}
        self._made: dict[int, tuple[Tokenizer, list[int]]] = {}
        self.backend(BASES[0])

    def show(self, text: str, data: list[Span]) -> Shown:
        """Control tokens of the template as stand-ins, the data as it is."""
        base = self._free(text)
        parts: list[str] = []
        moved: list[tuple[int, int]] = [(0, 0)]
        at = size = 0
        for start, stop in [*data, (len(text), len(text))]:
            for match in self._pattern.finditer(text, at, start):
                parts += (text[at : match.start()], chr(base + self._numbers[match.group()]))
                size += match.start() - at + 1
                at = match.end()
                moved.append((at, size))
            parts.append(text[at:stop])
            size += stop - at
            at = stop
        return Shown("".join(parts), base, moved)

    def ids(self, shown: Shown, result: Any) -> list[int]:
        """Of what the tokenizer made of it, stand-ins taken back."""
        return list(map(self._made[shown.base][1].__getitem__, result.ids))

    def backend(self, base: int) -> Tokenizer:
        """The tokenizer of a range."""
        if base not in self._made:
            self._made[base] = self._make(base)
        return self._made[base][0]

    def _free(self, text: str) -> int:
        if text.isascii():
            return BASES[0]
        highest = max(text)
        held = {ord(c) for c in text if ord(c) >= BASES[2]} if ord(highest) >= BASES[2] else ()
        for base in BASES:
            if not any(base <= code < base + len(self._special) for code in held):
                self.backend(base)
                return base
        raise DataError("the row holds characters of all private and unassigned planes")

    def _make(self, base: int) -> tuple[Tokenizer, list[int]]:
        """A tokenizer, and for each of its ids the model's."""
        written = self._tokenizer.backend_tokenizer.to_str()
        try:
            backend = Tokenizer.from_str(_untrimmed(written))
        except Exception as error:  # the library raises nothing else
            raise ModelError(
                f"the tokenizer in {self._tokenizer.name_or_path} is damaged",
                found=first_line(error)[:300],
            ) from error
        backend.no_padding()
        backend.no_truncation()
        original: dict[int, int] = {}
        for _index, token in self._tokenizer.added_tokens_decoder.items():
            if not token.special:
                continue
            character = chr(base + self._numbers[token.content])
            stand_in = AddedToken(
                character,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                single_word=token.single_word,
                normalized=False,
                special=False,
            )
            if backend.add_tokens([stand_in]) != 1:
                raise DataError(f"the tokenizer uses the private character U+{ord(character):X}")
            index = backend.token_to_id(character)
            assert index is not None
            original[index] = self._special[token.content]
        backend.encode_special_tokens = True
        count = 1 + max(backend.get_vocab().values())
        return backend, [original.get(index, index) for index in range(count)]


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

"""A row's text never becomes a control token, whatever characters it holds."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from halfbyte.data.formats import Example
from halfbyte.data.renderer import Renderer
from halfbyte.data.stand_ins import BASES, StandIns
from halfbyte.errors import DataError, ModelError
from halfbyte.files import hub

from ..helpers import A


def test_characters_that_would_be_stand_ins_are_text(stories: Path):
    renderer = Renderer(hub.load_tokenizer(stories))
    plain = renderer.encode([Example("x", [{"role": "user", "content": "?"}, A])])[0]
    controls = [i for i in plain.input_ids if i in renderer.special.values()]
    for base in BASES:
        content = "".join(chr(base + n) for n in range(len(renderer.special) + 1))
        (row,) = renderer.encode([Example("x", [{"role": "user", "content": content}, A])])
        assert [i for i in row.input_ids if i in renderer.special.values()] == controls, hex(base)
        assert content in renderer.tokenizer.decode(row.input_ids)


def test_places_are_found_again_in_what_is_shown(stories: Path):
    tokenizer = hub.load_tokenizer(stories)
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    stand_ins, pick = StandIns(tokenizer, special), random.Random(0)
    for _ in range(200):
        parts = [
            (pick.choice([*special, "word", "é", " "]), pick.random() < 0.5) for _ in range(12)
        ]
        text, data, at = "", [], 0
        for part, of_row in parts:
            if of_row:
                data.append((at, at + len(part)))
            text += part
            at += len(part)
        shown = stand_ins.show(text, data)
        at = 0
        for part, of_row in parts:
            start, stop = shown.at(at), shown.at(at + len(part))
            here = shown.text[start:stop]
            assert here == part if of_row or part not in special else len(here) == 1
            at += len(part)


def test_a_row_of_all_planes_is_refused(stories: Path):
    tokenizer = hub.load_tokenizer(stories)
    special = {t.content: i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    stand_ins = StandIns(tokenizer, special)
    with pytest.raises(DataError, match="all private"):
        stand_ins.show("".join(chr(base) for base in BASES), [])


def test_a_tokenizer_that_cannot_be_read_again_is_damaged(stories: Path):
    tokenizer = hub.load_tokenizer(stories)
    whole = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = whole["model"]["vocab"]
    whole["model"]["merges"] = [["q", "qqqq"]] if isinstance(vocabulary, dict) else None
    broken = SimpleNamespace(
        backend_tokenizer=SimpleNamespace(to_str=lambda: json.dumps(whole)),
        name_or_path="here",
        added_tokens_decoder={},
    )
    with pytest.raises(ModelError, match="the tokenizer in here is damaged"):
        StandIns(broken, {})

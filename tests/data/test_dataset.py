"""Tests of `data.dataset`."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config.options import DataOptions
from halfbyte.data.dataset import encode, hold_out, read_data
from halfbyte.data.formats import Example
from halfbyte.data.renderer import Renderer, TokenizedExample
from halfbyte.errors import DataError
from halfbyte.files import hub

from ..helpers import A, Q


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_held_out_rows_are_a_function_of_the_rows_and_never_trained(tmp_path: Path, stories: Path):
    rows = [{"prompt": f"question {i % 40} ", "completion": "x"} for i in range(60)]
    source = write(tmp_path / "r.jsonl", rows)
    data = read_data(source, DataOptions(eval_split=0.2), stories)
    assert 12 <= len(data.held_out) <= 13
    held, trained = (
        {tuple(r.input_ids) for r in side} for side in (data.held_out, data.train.rows)
    )
    assert not held & trained, "copies of a held-out row are held out, too"
    shuffled = write(tmp_path / "s.jsonl", rows[::-1])
    again = read_data(shuffled, DataOptions(eval_split=0.2), stories)
    assert {tuple(r.input_ids) for r in again.held_out} == held
    assert {
        tuple(r.input_ids)
        for r in read_data(source, DataOptions(eval_split=9, seed=1), stories).held_out
    } != held
    assert data.duplicates == 20
    with pytest.raises(DataError, match="nothing is left to train"):
        hold_out(data.train.rows, 10**6, 0, None)


def test_a_row_that_never_trains_its_end_is_refused(tmp_path: Path, stories: Path):
    source = write(tmp_path / "r.jsonl", [{"prompt": "a", "completion": "long " * 50}] * 3)
    with pytest.raises(DataError, match="never learn to stop") as caught:
        read_data(source, DataOptions(max_length=16), stories)
    assert "3 rows lose their end" in caught.value.found


def test_ids_past_the_embeddings_are_refused_with_the_way_out(tmp_path: Path, stories: Path):
    source = write(tmp_path / "r.jsonl", [{"input_ids": [5, 6, 100_000]}])
    with pytest.raises(DataError, match="id 100000, but the model has 512 embeddings") as caught:
        read_data(source, DataOptions(), stories)
    assert any("resize_token_embeddings" in way for way in caught.value.ways_out)


def test_a_template_that_raises_names_the_row(tmp_path: Path, stories: Path):
    source = write(tmp_path / "r.jsonl", [{"messages": [Q, A]}] * 3)
    (tmp_path / "t.jinja").write_text("{{ 1 // 0 }}")
    with pytest.raises(DataError, match="template refused") as caught:
        read_data(source, DataOptions(chat_template=str(tmp_path / "t.jinja")), stories)
    assert caught.value.where == f"{source}:1" and "zero" in caught.value.found


def test_rows_the_template_refuses_can_be_skipped(stories: Path):
    template = (
        "{{ raise_exception('no bees') if 'bee' in messages[0].content }}{{ messages[0].content }}"
        + (
            "{% if messages | length > 1 %}{% generation %}{{ messages[1].content }}</s>{% "
            "endgeneration %}{% endif %}"
        )
    )
    renderer = Renderer(hub.load_tokenizer(stories), template)
    examples = [
        Example(f"r{i}", [{"role": "user", "content": c}, A])
        for i, c in enumerate(("a", "bee", "c"))
    ]
    rows, bad = encode(examples, renderer, skip_bad=1)
    assert [r.where for r in rows] == ["r0", "r2"] and bad[0].where == "r1"
    with pytest.raises(DataError, match="template refused"):
        encode(examples, renderer)


def test_rows_that_are_equal_when_they_are_cut_stay_on_one_side():
    rows = [
        TokenizedExample(f"{start}.{end}", [start] * 6 + [end] * 4, [True] * 10)
        for start in range(10, 20)
        for end in range(30, 34)
    ]
    kept, out = hold_out(rows, 0.25, 0, 6)
    assert {row.input_ids[0] for row in kept}.isdisjoint(row.input_ids[0] for row in out)
    kept, out = hold_out(rows, 0.25, 0, None)
    assert not {row.input_ids[0] for row in kept}.isdisjoint(row.input_ids[0] for row in out)

"""Tests of `data.dataset`."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config.options import DataOptions
from halfbyte.data.dataset import (
    data_lines,
    examples_of,
    read_data,
)
from halfbyte.data.formats import Example
from halfbyte.data.held_out import hold_out, row_digests
from halfbyte.data.renderer import Renderer
from halfbyte.data.tokenizing import encode
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
        hold_out(data.train.rows, 10**6, row_digests(data.train.rows, "", None))


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
    rows, bad = encode(examples, renderer)
    assert [r.where for r in rows] == ["r0", "r2"] and bad[0].where == "r1"


def test_answers_of_one_conversation_are_held_out_together(tmp_path: Path, stories: Path):
    talk = [Q, A, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "so"}]
    rows = [{"messages": [{**Q, "content": f"hi {i}"}, *talk[1:]]} for i in range(40)]
    source = write(tmp_path / "r.jsonl", rows)
    data = read_data(source, DataOptions(eval_split=0.3, turns="each"), stories)
    sides = [
        {row.where.partition(" turn")[0] for row in side}
        for side in (data.train.rows, data.held_out)
    ]
    assert not sides[0] & sides[1] and len(data.held_out) % 2 == 0
    assert len(data.train.rows) + len(data.held_out) == 80
    assert data.question(data.held_out[0]) is not None


def test_long_texts_are_rows_of_their_parts(tmp_path: Path, stories: Path):
    source = write(tmp_path / "r.jsonl", [{"text": "once upon a time " * 60}, {"text": "short"}])
    data = read_data(source, DataOptions(max_length=64), stories)
    whole = data.train.texts_split, data.train.parts
    assert whole[0] == 1 and len(data.train.rows) == whole[1] + 1 and data.train.truncated == 0
    assert data.ends == 2, "the last part has the end"
    ids = [i for row in data.train.rows[:-1] for i in row.input_ids]
    (row,) = data.renderer.encode(list(examples_of(source, DataOptions()))[:1])
    assert ids == row.input_ids
    assert any("became" in line for line in data_lines(data))
    dropped = read_data(source, DataOptions(max_length=64, over_length="drop"), stories)
    assert len(dropped.train.rows) == 1


def test_what_is_not_read_is_said(tmp_path: Path, stories: Path):
    row = {"messages": [Q, {**A, "reasoning_content": "hm"}], "context": "c"}
    data = read_data(write(tmp_path / "r.jsonl", [row] * 3), DataOptions(), stories)
    said = "\n".join(data_lines(data))
    assert "3 rows hold a column that nothing reads: context" in said
    assert "3 rows hold what the template does not write: reasoning" in said
    text = [{"text": "<s>hello</s>"}]
    source = write(tmp_path / "t.jsonl", text)
    letters = read_data(source, DataOptions(), stories)
    assert "are read as letters" in "\n".join(data_lines(letters))
    parsed = read_data(source, DataOptions(parse_control_tokens=True), stories)
    assert len(parsed.train.rows[0].input_ids) < len(letters.train.rows[0].input_ids)
    assert not parsed.noticed


def test_bad_rows_of_file_and_template_are_told_together(tmp_path: Path, stories: Path):
    rows = [{"messages": [Q, A]}, {"messages": [Q]}, {"messages": [{**Q, "content": "bee"}, A]}]
    (tmp_path / "t.jinja").write_text(
        "{{ raise_exception('no bees') if 'bee' in messages[0].content }}"
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    )
    options = DataOptions(chat_template=str(tmp_path / "t.jinja"))
    source = write(tmp_path / "r.jsonl", rows)
    with pytest.raises(DataError, match="2 of 3 rows cannot be used") as caught:
        read_data(source, options, stories)
    assert "no bees" in caught.value.found and "no assistant's turn" in caught.value.found
    options.skip_bad = 2
    assert len(read_data(source, options, stories).train.rows) == 1


def test_a_template_that_never_ends_is_asked_once(
    tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
):
    from halfbyte.data import template

    monkeypatch.setattr(template, "SECONDS", 2.0)
    starts: list[object] = []
    start = template.TemplateProcess._start
    monkeypatch.setattr(
        template.TemplateProcess, "_start", lambda self: (starts.append(self), start(self))[1]
    )
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (tmp_path / "t.jinja").write_text(loop)
    source = write(tmp_path / "r.jsonl", [{"messages": [Q, A]}] * 50)
    with pytest.raises(DataError, match="refused"):
        read_data(source, DataOptions(chat_template=str(tmp_path / "t.jinja")), stories)
    assert len(starts) == 1, "not once a row"

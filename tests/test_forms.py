"""Data of every kind: which form a row has, what it becomes, and what is said about a row that is
none."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.config.options import DataOptions
from halfbyte.data.dataset import encode, hold_out, read_data
from halfbyte.data.formats import Example, read_examples
from halfbyte.data.renderer import Renderer
from halfbyte.errors import DataError
from halfbyte.files import hub

Q, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


def one(tmp_path: Path, row: dict[str, Any], name: str = "rows.jsonl") -> Example:
    path = tmp_path / name
    path.write_text(json.dumps(row) + "\n")
    (example,) = read_examples(path).rows
    return example


def refused(tmp_path: Path, row: Any, message: str) -> DataError:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_examples(path)
    assert caught.value.exit_code == 4 and caught.value.where.startswith(f"{path}:1")
    return caught.value


# --- forms ----------------------------------------------------------------------------------------


def test_alpaca_with_everything(tmp_path: Path):
    row = {
        "instruction": "do",
        "input": "this",
        "output": "done",
        "system": "be kind",
        "history": [["a", "b"]],
    }
    turns = one(tmp_path, row).messages or []
    assert [t["role"] for t in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[3]["content"] == "do\n\nthis" and turns[4]["content"] == "done"


def test_questions_and_answers(tmp_path: Path):
    assert one(tmp_path, {"question": "hi", "answer": "yo"}).messages == [Q, A]


def test_real_files_of_every_kind_are_taken():
    from conftest import shared

    for path, format, count in (
        ("data/gsm8k/test.jsonl", "qa", 1319),
        ("data/rasbt-instruction/instruction-data.json", "alpaca", 1100),
        ("data/sharegpt/dummy_conversation.json", "sharegpt", 500),
        ("data/oasst1-chat/oasst1_val_en.jsonl", "messages", 419),
    ):
        found = read_examples(shared(path))
        assert (found.format, len(found.rows)) == (format, count)


def test_sharegpt(tmp_path: Path):
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    assert one(tmp_path, {"conversations": turns}).messages == [Q, A]
    with_system = one(tmp_path, {"conversations": turns, "system": "s"}).messages or []
    assert with_system[0] == {"role": "system", "content": "s"}
    error = refused(
        tmp_path, {"conversations": [{"from": "alien", "value": "x"}, *turns]}, "unknown role"
    )
    assert "'alien'" in error.found


def test_tools_and_tool_calls_reach_the_template(tmp_path: Path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        Q,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        A,
    ]
    example = one(tmp_path, {"messages": turns, "tools": json.dumps([{"name": "add"}])})
    assert example.tools == [{"name": "add"}]
    assert (example.messages or [])[1] == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_content_in_parts_is_joined_and_images_refused(tmp_path: Path):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert one(tmp_path, {"messages": [{"role": "user", "content": parts}, A]}).messages == [Q, A]
    picture = {"role": "user", "content": [{"type": "image", "url": "x"}]}
    assert (
        "'image'" in refused(tmp_path, {"messages": [picture, A]}, "something else than text").found
    )


def test_columns_that_a_table_filled_with_nulls(tmp_path: Path):
    """datasets and parquet give every message every key; a null is no value."""
    row = {
        "messages": [{**Q, "tool_calls": None, "name": None}, A],
        "chosen": None,
        "rejected": None,
    }
    assert one(tmp_path, row).messages == [Q, A]


def test_prompt_and_completion_as_messages_train_the_completion_only(tmp_path: Path, stories: Path):
    example = one(
        tmp_path,
        {"prompt": [Q, {"role": "assistant", "content": "read this"}, Q], "completion": [A]},
    )
    renderer = Renderer(hub.load_tokenizer(stories))
    assert [s.text for s in renderer.segments(example) if s.supervised] == ["yo", "</s>"]
    everything = Renderer(hub.load_tokenizer(stories), completion_only=False)
    assert all(s.supervised for s in everything.segments(example))
    refused(tmp_path, {"prompt": [Q], "completion": [Q]}, "assistant's turn")


def test_text_and_ids(tmp_path: Path, stories: Path):
    renderer = Renderer(hub.load_tokenizer(stories))
    (row,) = renderer.encode([one(tmp_path, {"text": "once upon a time"})])
    assert all(row.loss_mask[1:]) and row.input_ids[-1] == renderer.tokenizer.eos_token_id
    (row,) = renderer.encode([one(tmp_path, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})])
    assert (row.input_ids, row.loss_mask) == ([5, 6, 7], [False, True, True])
    refused(tmp_path, {"input_ids": [5, 6], "labels": [5]}, "2 input_ids but 1 labels")
    refused(tmp_path, {"input_ids": [5, 6], "labels": [6, 5]}, "neither the id there nor -100")
    refused(tmp_path, {"input_ids": [5, -6]}, "negative")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [Q, Q, A]}, "out of order"),
        ({"messages": [Q, {"role": "system", "content": "s"}, A]}, "system message stands after"),
        ({"messages": [Q, {"role": "assistant", "content": " "}]}, "turn is empty"),
        ({"text": "  "}, "text is empty"),
        ({"text": "a\0b"}, "NUL character at character 1"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "pairs"),
        ({"messages": [Q, A], "tools": "{"}, "not valid JSON"),
    ],
)
def test_rows_that_are_wrong(tmp_path: Path, row: dict[str, Any], message: str):
    refused(tmp_path, row, message)


# --- files ----------------------------------------------------------------------------------------


def test_csv_tsv_parquet_and_gzip_give_the_same_rows(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": 'say "a, b"\nnow', "completion": "c"}, {"prompt": "d", "completion": "é"}]
    (tmp_path / "r.csv").write_text('prompt,completion\n"say ""a, b""\nnow",c\nd,é\n')
    (tmp_path / "r.tsv").write_text('prompt\tcompletion\n"say ""a, b""\nnow"\tc\nd\té\n')
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines[:20]) + gzip.compress(lines[20:]))
    (tmp_path / "r.json").write_text(json.dumps(rows))
    for name in ("r.csv", "r.tsv", "r.parquet", "r.jsonl.gz", "r.json"):
        found = read_examples(tmp_path / name)
        assert [{"prompt": r.prompt, "completion": r.completion} for r in found.rows] == rows, name
    assert read_examples(tmp_path / "r.csv").rows[1].where == f"{tmp_path / 'r.csv'}:4", (
        "the second row's first line"
    )


def test_nested_columns_of_parquet_and_json_cells_of_csv(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([{"messages": [Q, A]}]), tmp_path / "m.parquet")
    assert read_examples(tmp_path / "m.parquet").rows[0].messages == [Q, A]
    cell = json.dumps([Q, A]).replace('"', '""')
    (tmp_path / "m.csv").write_text(f'messages\n"{cell}"\n')
    assert read_examples(tmp_path / "m.csv").rows[0].messages == [Q, A]


def test_parquet_with_odd_types_names_the_row(tmp_path: Path):
    import datetime

    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "odd.parquet"
    parquet.write_table(
        pa.Table.from_pylist([{"prompt": "a", "completion": datetime.datetime(2020, 1, 1)}]), path
    )
    with pytest.raises(DataError, match="'completion' must be a string") as caught:
        read_examples(path)
    assert caught.value.where == f"{path} row 1" and caught.value.found == "a datetime"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match="cannot read the parquet file"):
        read_examples(path)


@pytest.mark.parametrize(
    ("name", "content", "message", "line"),
    [
        ("r.csv", b"prompt,completion\na,b,c\n", "3 cells under a header of 2", ":2"),
        ("r.csv", b"prompt,prompt\na,b\n", "occurs twice", ":1"),
        ("r.csv", b'prompt,completion\na,"b\n', "not valid CSV", ":2"),
        ("r.jsonl.gz", gzip.compress(b"{}" * 100)[:-9], "cut off", ""),
        ("r.jsonl", b'{"text": "a"}\n\xff\n', "not UTF-8", ":2"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str, line: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_examples(tmp_path / name)
    assert caught.value.where.startswith(f"{tmp_path / name}{line}" if line else "")


def test_bombs_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from halfbyte.data import readers as rows

    monkeypatch.setattr(rows, "UNPACKED_LIMIT", 1 << 20)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b" " * (3 << 20)))
    with pytest.raises(DataError, match="unpacks to more than"):
        read_examples(tmp_path / "b.jsonl.gz")


def test_names_that_are_neither_file_nor_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    def load_dataset(*arguments: Any, **more: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="neither a file nor a Hub data set"):
        read_examples("no-such-owner/no-such-data")


def test_a_hub_data_set_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The network is not here: the library's loader is given a local table instead."""
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"messages": [Q, A]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_examples("owner/name", config="c", split="test")
    assert asked == [("owner/name", "c", "test")] and found.rows[0].messages == [Q, A]
    assert found.rows[0].where == "owner/name[test] row 1"


def test_skip_bad_counts_and_has_a_limit(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "a"}\n{nope\n{"text": 3}\n[1]\n{"text": "b"}\n')
    found = read_examples(path, skip_bad=3)
    assert [r.completion for r in found.rows] == ["a", "b"]
    assert [error.where.rsplit(":")[1] for error in found.bad] == ["2", "3", "4"]
    with pytest.raises(DataError, match="JSON object, not a list"):
        read_examples(path, skip_bad=2)


def test_rows_of_an_array_on_one_line_are_told_apart(tmp_path: Path):
    (tmp_path / "r.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}, {"text": "c"}]))
    places = [row.where for row in read_examples(tmp_path / "r.json").rows]
    path = tmp_path / "r.json"
    assert places == [f"{path}:1", f"{path}:1 item 2", f"{path}:1 item 3"]


def test_strings_that_look_like_lists_are_strings(tmp_path: Path):
    example = one(tmp_path, {"prompt": "[3, 1]", "completion": "[1, 3]"})
    assert (example.prompt, example.completion, example.messages) == ("[3, 1]", "[1, 3]", None)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"name": "x\ud800"}], "lone surrogate"),
        ([{"a\0": 1}], "NUL"),
        (json.loads('{"a":' * 90 + "1" + "}" * 90), "list of JSON schemas"),
        ([json.loads('{"a":' * 90 + "1" + "}" * 90)], "nested more than 64"),
    ],
)
def test_tools_are_checked_like_messages(tmp_path: Path, tools: Any, message: str):
    refused(tmp_path, {"messages": [Q, A], "tools": tools}, message)


def test_white_space_inside_an_answer_is_trained_whatever_the_tokenizer_trims(stories: Path):
    """GPT-2-like tokenizers leave leading spaces out of a token's offsets: an indented line must
    not lose them."""
    from tokenizers import processors

    tokenizer = hub.load_tokenizer(hub.resolve("demo"))
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    renderer = Renderer(tokenizer)
    code = "if x:\n        return    y"
    (row,) = renderer.encode([Example("x", [Q, {"role": "assistant", "content": code}])])
    trained = [i for i, flag in zip(row.input_ids, row.loss_mask, strict=True) if flag]
    assert tokenizer.decode(trained) == code + "<|end|>"


# --- what is decided ------------------------------------------------------------------------------


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
        hold_out(data.train.rows, 10**6, 0)


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


def test_pieces_show_the_whole_row_once(stories: Path):
    renderer = Renderer(hub.load_tokenizer(stories))
    (row,) = renderer.encode([Example("x", [Q, A])])
    pieces = renderer.pieces(row)
    assert "".join(text for text, _ in pieces) == renderer.tokenizer.decode(row.input_ids)
    assert [(t, k) for t, k in pieces if k != "read"] == [("yo", "trained"), ("</s>", "end")]

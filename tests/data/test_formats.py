"""Data of every kind: which form a row has, what it becomes, and what is said about a row that is
none."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.formats import Example, format_of, read_examples
from halfbyte.data.renderer import Renderer
from halfbyte.errors import DataError
from halfbyte.files import hub

from ..helpers import A, Q


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"frage": "a", "antwort": "b"}, "fit no known form"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference pairs"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant's turn"),
        ({"messages": [{"role": "user", "content": None}]}, "must be a string"),
        ({"messages": []}, "non-empty list"),
        (
            {"prompt": [{"role": "assistant", "content": "x"}], "completion": []},
            "completion has no assistant",
        ),
        ({"prompt": "a\ud800", "completion": "b"}, "lone surrogate U\\+D800 at character 1"),
    ],
)
def test_wrong_rows_are_explained(tmp_path: Path, row: dict, message: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message) as caught:
        read_examples(path)
    assert caught.value.where.startswith(f"{path}:1") and caught.value.exit_code == 4


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
    from ..helpers import shared

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


def test_what_a_form_does_not_read_is_counted(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    row = {"question": "a", "answer": "b", "context": "c", "id": None, "tags": []}
    path.write_text((json.dumps(row) + "\n") * 3)
    assert read_examples(path).unread == {"context": 3}


def test_a_system_column_is_a_system_message_in_every_conversation(tmp_path: Path):
    for row in (
        {"question": "hi", "answer": "yo", "system_prompt": "s"},
        {"messages": [Q, A], "system": "s"},
        {"prompt": [Q], "completion": [A], "system": "s"},
    ):
        example = one(tmp_path, row)
        assert (example.messages or [])[0] == {"role": "system", "content": "s"}
    assert example.supervised_from == 2
    refused(
        tmp_path, {"prompt": "a", "completion": "b", "system": "s"}, "belongs to a conversation"
    )


def test_nulls_and_labels_and_masks(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"question": "a", "answer": null}\n{"question": "a", "answer": "b"}\n')
    found = read_examples(path, skip_bad=1)
    assert found.format == "qa" and found.bad[0].found == "null"
    path.write_text('{"instruction": "a", "input": NaN, "output": "b"}\n')
    assert (read_examples(path).rows[0].messages or [])[0]["content"] == "a"
    refused(tmp_path, {"prompt": "a", "completion": "b", "label": False}, "not wanted")
    assert one(tmp_path, {"prompt": "a", "completion": "b", "label": True}).completion == "b"
    json_text = {"prompt": '[{"id": 1}]', "completion": '[{"id": 2}]'}
    assert one(tmp_path, json_text).prompt == '[{"id": 1}]'
    example = one(
        tmp_path,
        {
            "input_ids": [5, 6, 7, 0],
            "completion_mask": [0, 1, 1, 1],
            "attention_mask": [1, 1, 1, 0],
        },
    )
    assert (example.input_ids, example.loss_mask) == ([5, 6, 7], [False, True, True])
    assert one(tmp_path, {"input_ids": [5, 6], "assistant_masks": [False, True]}).loss_mask == [
        False,
        True,
    ]


def test_an_attention_mask_leaves_out_padding_alone(tmp_path: Path):
    """Ids between others, and answers, were left out without a word."""
    padded = {"input_ids": [0, 0, 5, 6, 0], "attention_mask": [0, 0, 1, 1, 0]}
    assert one(tmp_path, padded).input_ids == [5, 6]
    assert one(tmp_path, {**padded, "labels": padded["input_ids"]}).loss_mask == [True, True]
    between = {"input_ids": [5, 6, 7, 8], "attention_mask": [1, 0, 1, 1]}
    refused(tmp_path, between, "leaves out position 1, between others")
    answer = {"input_ids": [5, 6, 7, 8], "attention_mask": [1, 1, 0, 0]}
    refused(tmp_path, {**answer, "labels": [-100, -100, 7, 8]}, "label at position 2 trains an id")
    assert one(tmp_path, {**answer, "labels": [-100, 6, -100, -100]}).input_ids == [5, 6]


def test_positions_of_rows_that_were_packed_are_refused(tmp_path: Path):
    """They were not read: what was kept apart saw each other."""
    ids = [5, 6, 7, 8]
    assert one(tmp_path, {"input_ids": ids, "position_ids": [0, 1, 2, 3]}).input_ids == ids
    padded = {"input_ids": ids, "attention_mask": [0, 1, 1, 1], "position_ids": [1, 0, 1, 2]}
    assert one(tmp_path, padded).input_ids == ids[1:]
    for positions in ([0, 1, 0, 1], [4, 5, 6, 7], [0, 1, 2]):
        refused(tmp_path, {"input_ids": ids, "position_ids": positions}, "do not count the ids")
    refused(
        tmp_path, {"input_ids": ids, "seq_lengths": [2, 2]}, "seq_lengths says that the row is 2"
    )
    assert one(tmp_path, {"input_ids": ids, "seq_lengths": [4]}).input_ids == ids


def test_all_bad_rows_are_told_at_once(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    empty, wrong = {"question": "a", "answer": " "}, {"question": 3, "answer": "x"}
    rows = [{"question": "a", "answer": "b"}, empty, wrong, *[empty] * 9]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="11 of 12 rows cannot be used") as caught:
        read_examples(path)
    lines = caught.value.found.splitlines()
    assert lines[0].startswith("10 x an assistant's turn is empty") and f"{path}:2" in lines[0]
    assert "must be a string" in lines[1]
    assert "--skip_bad 11 leaves out exactly these" in caught.value.ways_out
    assert len(read_examples(path, skip_bad=11).rows) == 1


def test_rows_of_several_forms_are_each_taken_for_what_they_are(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    rows = [
        {"prompt": "a", "completion": "b"},
        {"messages": [Q, A]},
        {"text": "c"},
        {"prompt": "d"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_examples(path, skip_bad=1)
    assert found.format == "mixed" and found.rows[1].messages == [Q, A]
    assert [row.completion for row in found.rows[::2]] == ["b", "c"]
    assert "'completion' must be a string" in found.bad[0].what, "the form of the first"


@pytest.mark.parametrize("row", [{"role": "user", "content": "hi"}, {"from": "gpt", "value": "ho"}])
def test_a_message_is_no_row(row: dict[str, str]):
    with pytest.raises(DataError, match="this is a message") as caught:
        format_of(row, "file:1")
    assert "a list of its own" in str(caught.value)


def test_a_row_without_the_column_of_those_before_it_says_which_it_has(tmp_path: Path):
    (tmp_path / "r.jsonl").write_text(
        json.dumps({"messages": [Q, A]}) + "\n" + json.dumps({"question": "a", "truth": "b"}) + "\n"
    )
    with pytest.raises(DataError, match="a row without 'messages'") as caught:
        read_examples(tmp_path / "r.jsonl")
    assert "question, truth" in caught.value.found

"""Messages as other tools write them."""

import json
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data.formats import read_examples
from halfbyte.data.messages import read_messages, read_tools
from halfbyte.errors import DataError

from ..helpers import A, Q


def read(*turns: Any, drop: frozenset[str] = frozenset()) -> tuple[list[dict[str, Any]], set[int]]:
    found, untrained = read_messages(list(turns), "f:1", "messages", drop)
    return found, set(untrained)


def test_roles_of_other_tools():
    for theirs, ours in (("human", "user"), ("gpt", "assistant"), ("ipython", "tool")):
        turns = [Q, {"from": theirs, "value": "x"}, A] if ours == "tool" else None
        turns = turns or [{"from": theirs, "value": "x"}, *([] if ours == "assistant" else [A])]
        assert ours in [turn["role"] for turn in read(*turns)[0]]
    with pytest.raises(DataError, match="unknown role") as caught:
        read(Q, {"content": "x"})
    assert "no role among content" in caught.value.found


def test_function_calls_of_every_age_are_tool_calls():
    arguments = {"leaf": "green"}
    wanted = [{"type": "function", "function": {"name": "brew", "arguments": arguments}}]
    as_text = {"name": "brew", "arguments": json.dumps(arguments)}
    for turn in (
        {"from": "function_call", "value": json.dumps({"name": "brew", "arguments": arguments})},
        {"role": "assistant", "content": None, "function_call": as_text},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": as_text}]},
        {"role": "assistant", "tool_calls": json.dumps(wanted)},
    ):
        assert read(Q, turn)[0][1]["tool_calls"] == wanted, turn
    with pytest.raises(DataError, match="arguments is not valid JSON"):
        read(Q, {"role": "assistant", "function_call": {"name": "a", "arguments": "{leaf"}})
    with pytest.raises(DataError, match="has no name"):
        read(Q, {"role": "assistant", "tool_calls": [{"function": {}}]})


def test_calls_in_turns_of_their_own_are_one_turn():
    one, two = (
        {"role": "tool_call", "content": json.dumps({"name": "w", "arguments": {"city": city}})}
        for city in "xy"
    )
    results = [{"role": "tool_response", "content": str(number)} for number in (1, 2)]
    turns, _ = read(Q, one, two, *results, A)
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [call["function"]["arguments"]["city"] for call in turns[1]["tool_calls"]] == ["x", "y"]


def test_messages_say_whether_they_are_trained():
    for key, no, yes in (
        ("weight", 0, 1),
        ("train", False, True),
        ("loss", "false", "true"),
        ("loss_weight", 0.0, 1.0),
    ):
        turns, untrained = read(Q, {**A, key: no}, Q, {**A, key: yes})
        assert untrained == {1} and key not in turns[1]
    with pytest.raises(DataError, match="other than 0 and 1"):
        read(Q, {**A, "weight": 0.5})
    with pytest.raises(DataError, match="says both"):
        read(Q, {**A, "weight": 0, "train": True})
    with pytest.raises(DataError, match="every answer"):
        read(Q, {**A, "train": False})


def test_parts_are_text_or_refused():
    for part in ({"type": "text", "text": "hi"}, {"type": "text", "value": "hi"}, "hi"):
        assert read({"role": "user", "content": [part]}, A)[0][0]["content"] == "hi"
    with pytest.raises(DataError, match="something else than text"):
        read({"role": "user", "content": [{"type": "image_url"}]}, A)
    with pytest.raises(DataError, match="part of a message has no text"):
        read({"role": "user", "content": [{"type": "text", "txt": "hi"}]}, A)
    with pytest.raises(DataError, match="'images' holds something else"):
        read({**Q, "images": ["a.png"]}, A)


def test_completions_of_other_roles(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    done = [{"from": "tool", "value": "2"}, {"from": "gpt", "value": "yo"}]
    path.write_text(json.dumps({"prompt": [Q], "completion": done}) + "\n")
    assert read_examples(path).rows[0].supervised_from == 1
    assert read_examples(path, drop_roles="tool").rows[0].supervised_from == 1


def test_roles_can_be_left_out():
    turns, _ = read({"role": "system", "content": "s"}, Q, A, drop=frozenset({"system"}))
    assert turns == [Q, A]


def test_functions_are_tools():
    schema = {"name": "brew", "parameters": {}}
    assert read_tools({"functions": [schema]}, "f:1") == [{"type": "function", "function": schema}]
    assert read_tools({"tools": json.dumps([schema])}, "f:1") == [schema]
    assert read_tools({"tools": None, "functions": []}, "f:1") is None

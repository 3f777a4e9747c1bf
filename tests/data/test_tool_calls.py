"""Calls in answers, as models write them."""

import json

import pytest

from halfbyte.data.tool_calls import read_calls

CALL = {"name": "weather", "arguments": {"city": "Rome", "days": 2}}


@pytest.mark.parametrize(
    "text",
    [
        f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>",
        f"[TOOL_CALLS] [{json.dumps(CALL)}]",
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome", "days": 2}}',
    ],
)
def test_a_call_is_read_back_as_a_turn_has_it(text: str):
    assert read_calls(text) == ([{"type": "function", "function": CALL}], "")


def test_several_calls_and_text_beside_them():
    one = f"<tool_call>{json.dumps(CALL)}</tool_call>"
    calls, left = read_calls(f"I will look. {one}\n{one}")
    assert [call["function"] for call in calls] == [CALL, CALL] and left == "I will look."
    calls, _ = read_calls('[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abc"}]')
    assert calls[0]["id"] == "abc"


@pytest.mark.parametrize(
    "text", ["<tool_call>{broken</tool_call>", "<tool_call>[1]</tool_call>", "plain", ""]
)
def test_what_does_not_parse_stays_in_the_text(text: str):
    assert read_calls(text) == ([], text)

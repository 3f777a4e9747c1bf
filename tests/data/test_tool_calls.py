"""Calls in answers, as models write them."""

import json
from importlib import resources
from typing import Any

import pytest
from trl.chat_template_utils import add_response_schema

from halfbyte.data.tool_calls import read_answer, read_calls
from halfbyte.files import hub


@pytest.fixture
def demo_tokenizer() -> Any:
    return hub.load_tokenizer(hub.resolve("demo"))


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


def test_a_tokenizer_that_can_read_its_answers_reads_them(demo_tokenizer: Any):
    """TRL's reading of Qwen 3's template, as a model's own files have it."""
    pieces = (resources.files("trl") / "chat_templates" / "qwen3.jinja").read_text()
    demo_tokenizer.chat_template = pieces
    assert "tool_calls" not in read_answer(demo_tokenizer, "<think>a</think>b", "")
    add_response_schema(demo_tokenizer)
    asked = "<|im_start|>assistant\n"
    call = json.dumps(CALL)
    turn = read_answer(
        demo_tokenizer, f"<think>\na\n</think>\n\n<tool_call>\n{call}\n</tool_call>", asked
    )
    assert turn["role"] == "assistant" and turn["content"] == ""
    assert [each["function"] for each in turn["tool_calls"]] == [CALL]
    assert "a" in (turn.get("reasoning_content") or turn.get("thinking") or "")
    # one that begins in the prompt
    turn = read_answer(demo_tokenizer, "a\n</think>\n\nb", asked + "<think>\n")
    assert turn["content"].strip() == "b"


def test_a_reading_that_fails_leaves_the_text(demo_tokenizer: Any):
    demo_tokenizer.response_template = {"nonsense": 1}
    assert read_answer(demo_tokenizer, "plain", "") == {"role": "assistant", "content": "plain"}

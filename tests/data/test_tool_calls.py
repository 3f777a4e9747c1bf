"""Calls in answers, as models write them."""

import contextlib
import json
from importlib import resources
from typing import Any

import jinja2
import pytest
from transformers.utils.chat_template_utils import render_jinja_template
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
        f"[TOOL_CALLS]weather[ARGS]{json.dumps(CALL['arguments'])}",
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome", "days": 2}}',
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\", \\"days\\": 2}"}'
        "</tool_call>",
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
        f"{json.dumps(CALL['arguments'])}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Rome", '
        '"days": 2}<|call|>',
        '<|START_ACTION|>[{"tool_call_id": "0", "tool_name": "weather", "parameters": '
        '{"city": "Rome", "days": 2}}]<|END_ACTION|>',
    ],
)
def test_a_call_is_read_back_as_a_turn_has_it(text: str):
    (call,), left = read_calls(text)
    assert (call["type"], call["function"], left) == ("function", CALL, "")


ARGUMENTS = {
    "city": "Rome } <b>",
    "days": 2,
    "zip": "00184",
    "deep": {"a": [1, "x: {y}"], "b": {}},
    "flag": True,
    "lines": "one\ntwo",
}
WRITE_NO_CALLS = (
    "cohere cohere2 deepseek_r1_distill gemma gemma3 idefics3 lfm2 llama3 llava_next phi3 phi3_5 "
    "qwen2_5_vl smolvlm"
)


def _answer_with(template: str, arguments: Any, content: str | None) -> str:
    """What a template writes for an answer that is a call, without what asks for it."""
    function = {"name": "weather_at", "arguments": arguments}
    call = {"type": "function", "id": "abc123def", "function": function}
    said = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
    ]
    (whole,), _ = render_jinja_template(
        [said], chat_template=template, bos_token="<s>", eos_token="</s>"
    )
    answer = whole.rpartition("assistant")[2]
    return answer.removeprefix("<|end_header_id|>").removesuffix("<|eot_id|>")


def test_what_known_templates_write_is_read_back():
    """The original templates that TRL installs."""
    silent, read = [], []
    for path in sorted((resources.files("trl") / "chat_templates").iterdir(), key=lambda p: p.name):
        name, dot, kind = path.name.partition(".")
        if dot + kind != ".jinja" or name.endswith("_training"):
            continue
        template = path.read_text()
        text = "name" in template and _try(template)
        if not text or "weather_at" not in text:
            silent.append(name)
            continue
        calls, left = read_calls(text, template)
        assert calls, (name, text)
        (call,) = calls
        assert call["function"] == {"name": "weather_at", "arguments": ARGUMENTS}, name
        assert "call" not in left and "Rome" not in left, (name, left)
        read.append(name)
    assert silent == WRITE_NO_CALLS.split() and len(read) >= 24


def _try(template: str) -> str | None:
    """As `_answer_with`; some want the arguments as a text and no content, and some want parts,
    which are for models that see."""
    for arguments, content in ((ARGUMENTS, ""), (json.dumps(ARGUMENTS), None)):
        with contextlib.suppress(TypeError, jinja2.TemplateError):
            return _answer_with(template, arguments, content)
    return None


def test_an_object_is_no_call_unless_the_template_writes_calls_so():
    text = '{"name": "weather", "parameters": {"city": "Rome"}}'
    assert read_calls(text) == ([], text)
    assert read_calls(text, "{{ message.content }}") == ([], text)
    folder = resources.files("trl") / "chat_templates"
    hermes, bare = ((folder / f"{n}.jinja").read_text() for n in ("qwen2_5", "llama3_1"))
    assert read_calls(text, hermes) == ([], text), "its calls have marks"
    assert read_calls(text, bare)[0]
    for other in ('{"name": "Ann", "age": 3}', '{"name": "Ann"}', '{"name": 1, "parameters": {}}'):
        for template in (hermes, bare):
            assert read_calls(other, template) == ([], other)


def test_several_calls_and_text_beside_them():
    one = f"<tool_call>{json.dumps(CALL)}</tool_call>"
    calls, left = read_calls(f"I will look. {one}\n{one}")
    assert [call["function"] for call in calls] == [CALL, CALL] and left == "I will look."
    calls, _ = read_calls('[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abc"}]')
    assert calls[0]["id"] == "abc"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>{broken</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
        "<tool_call>weather</tool_call>",
        "<tool_call><function=f>text beside</function></tool_call>",
        "<|tool_call_start|>[open('x')]<|tool_call_end|>",
        "<|tool_call_start|>f(a=open)<|tool_call_end|>",
        "<|tool_call>call:f{a:}<tool_call|>",
        "[TOOL_CALLS]f[ARGS]{broken}",
        "plain",
        "",
    ],
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

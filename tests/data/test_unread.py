"""What a template leaves out of a row is refused or named."""

from typing import Any

import pytest

from halfbyte.data.formats import Example
from halfbyte.errors import DataError

from ..helpers import A, Q
from .test_turns import CHATML, TALK, renderer_of

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "one"}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
ONLY_TWO = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m.role in ('user', 'assistant') %}"
)
CALLED = [Q, {"role": "assistant", "content": "", "tool_calls": [CALL]}, A]


@pytest.mark.parametrize(
    ("messages", "tools", "template", "message"),
    [
        ([{"role": "system", "content": "be kind"}, Q, A], None, ONLY_TWO, "system's message 'be"),
        ([{"role": "developer", "content": "x y"}, Q, A], None, ONLY_TWO, "developer's message"),
        ([Q, A, {"role": "tool", "content": "2"}, A], None, ONLY_TWO, "tool's message '2'"),
        (CALLED, None, CHATML, "tool call 'add'"),
        ([Q, A], [TOOL], CHATML, "tool 'add'"),
        (CALLED, [TOOL], "{{ tools | tojson }}" + CHATML, "tool call 'add'"),
        (
            [Q, A],
            None,
            CHATML.replace("{{ m.content }}", "{{ m.content[:1] }}"),
            "only a part of the user's message",
        ),
    ],
)
def test_instructions_answers_and_calls_are_not_lost(
    messages: list[dict[str, Any]], tools: Any, template: str, message: str
):
    with pytest.raises(DataError, match=message) as caught:
        renderer_of(template).encode([Example("f:1", messages, tools=tools)])
    assert caught.value.where == "f:1" and caught.value.ways_out


def test_what_models_are_asked_without_is_named_with_its_count():
    renderer = renderer_of(CHATML)
    thought = {**A, "reasoning_content": "hm", "name": "Ann", "tool_call_id": "7"}
    renderer.encode([Example(f"f:{i}", [Q, thought]) for i in range(3)])
    assert {what.rpartition(": ")[2]: n for what, n in renderer.noticed.items()} == {
        "reasoning": 3,
        "name of messages": 3,
    }
    whole = renderer_of(CHATML)
    whole.encode([Example("f:1", TALK)])
    assert not whole.noticed
    described = renderer_of("{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + CHATML)
    described.encode([Example("f:1", [Q, A], tools=[TOOL])])
    assert [what.rpartition(": ")[2] for what in described.noticed] == ["description of tools"]

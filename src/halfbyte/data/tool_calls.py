"""Tool calls in the text of an answer, as models write them, read back as the calls of a turn."""

import contextlib
import json
import re
from typing import Any

_FORMS = (
    # Hermes, Qwen 2.5 and 3, and many fine-tunes
    re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL),
    # Mistral, a list of calls
    re.compile(r"\[TOOL_CALLS\]\s*(\[.*?\])\s*$", re.DOTALL),
    # Llama 3.1
    re.compile(r"<\|python_tag\|>\s*(\{.*\})\s*$", re.DOTALL),
)


def read_calls(text: str) -> tuple[list[dict[str, Any]], str]:
    """(the calls in an answer, what is left of its text); what does not parse stays in the text.

    Args:
        text: with its control tokens.
    """
    calls: list[dict[str, Any]] = []

    def take(match: re.Match[str]) -> str:
        found = _calls_of(match.group(1))
        if found is None:
            return match.group(0)
        calls.extend(found)
        return ""

    for form in _FORMS:
        text = form.sub(take, text)
    return calls, text.strip() if calls else text


def read_answer(tokenizer: Any, text: str, asked: str) -> dict[str, Any]:
    """An answer as the turn of a conversation: by the tokenizer's own ``response_template`` where
    it has one that can read it, else by `read_calls`.

    Args:
        text: with its control tokens, without its end.
        asked: the text it was asked by, which may have begun it.
    """
    turn = {"role": "assistant", "content": text}
    if getattr(tokenizer, "response_template", None) is not None:
        # a template is a program that came with somebody's model: it may raise anything
        with contextlib.suppress(Exception):
            parsed = tokenizer.parse_response(text, prefix=asked)
            if isinstance(parsed, dict):
                return {**turn, **parsed, "content": parsed.get("content") or ""}
    calls, left = read_calls(text)
    return {**turn, "content": left, "tool_calls": calls} if calls else turn


def _calls_of(text: str) -> list[dict[str, Any]] | None:
    try:
        values = json.loads(text)
    except ValueError:
        return None
    found = []
    for value in values if isinstance(values, list) else [values]:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            return None
        arguments = value.get("arguments", value.get("parameters", {}))
        call = {"name": value["name"], "arguments": arguments}
        named = {"id": value["id"]} if isinstance(value.get("id"), str) else {}
        found.append({"type": "function", **named, "function": call})
    return found or None

"""Tool calls in the text of an answer, as models write them, read back as the calls of a turn."""

import ast
import contextlib
import json
import re
from collections.abc import Callable
from typing import Any

Call = dict[str, Any]


def read_calls(text: str, template: str = "") -> tuple[list[Call], str]:
    """(the calls in an answer, what is left of its text); what does not parse stays in the text.

    Args:
        text: with its control tokens.
        template: the chat template that asked for it. Some write a call without a mark, as any
            other object; answers to others are not taken for one.
    """
    calls: list[Call] = []

    def take(match: re.Match[str], read: Callable[[re.Match[str]], list[Call]]) -> str:
        try:
            found = read(match)
        except (ValueError, SyntaxError, RecursionError):
            return match.group(0)
        calls.extend(found)
        return "" if found else match.group(0)

    for form, read in _FORMS:
        text = form.sub(lambda match, read=read: take(match, read), text)
    if not calls and '"parameters": ' in template and "<tool_call>" not in template:
        text = _BARE.sub(lambda match: take(match, _bare_call), text)
    return calls, _WRAPPERS.sub("", text).strip() if calls else text


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
    calls, left = read_calls(text, str(tokenizer.chat_template or ""))
    return {**turn, "content": left, "tool_calls": calls} if calls else turn


def _call(name: str, arguments: Any, identity: Any = None) -> Call:
    """A call as a turn has it.

    Raises:
        ValueError: its arguments are no object.
    """
    if isinstance(arguments, str):  # an object in a text, as OpenAI's
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError
    named = {"id": identity} if isinstance(identity, str) else {}
    return {"type": "function", **named, "function": {"name": name, "arguments": arguments}}


def _json_calls(match: re.Match[str]) -> list[Call]:
    """One object or a list of objects with a name and arguments."""
    values = json.loads(match.group(1))
    found = []
    for value in values if isinstance(values, list) else [values]:
        if not isinstance(value, dict):
            raise ValueError
        name = value.get("name", value.get("tool_name"))
        if not isinstance(name, str):
            raise ValueError
        arguments = value.get("arguments", value.get("parameters", {}))
        found.append(_call(name, arguments, value.get("id", value.get("tool_call_id"))))
    return found


def _bare_call(match: re.Match[str]) -> list[Call]:
    """An object of a name and parameters, and of nothing else: answers are objects, too."""
    value = json.loads(match.group(1))
    if value.keys() != {"name", "parameters"} or not isinstance(value["name"], str):
        raise ValueError
    return [_call(value["name"], value["parameters"])]


def _value(text: str) -> Any:
    """An argument that stands in marks instead of quotes: JSON or Python's words where it is one
    of them, else a text. A number in a text reads as a number; both are written the same."""
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return text if isinstance(value, str) else value


def _marked(argument: str) -> Callable[[re.Match[str]], list[Call]]:
    """Reads a name and arguments that ``argument`` finds, each with its key and its value."""
    pattern = re.compile(argument, re.DOTALL)

    def read(match: re.Match[str]) -> list[Call]:
        name, body = match.group(1), match.group(2)
        if pattern.sub("", body).strip():
            raise ValueError  # something beside the arguments
        return [_call(name, {key: _value(value) for key, value in pattern.findall(body)})]

    return read


def _named_object(match: re.Match[str]) -> list[Call]:
    """A name, and its arguments as JSON."""
    return [_call(match.group(1), json.loads(match.group(2)))]


def _python_calls(match: re.Match[str]) -> list[Call]:
    """A list of calls as Python writes them; its templates write JSON's words too, and lines that
    end inside of a text."""
    words = {"true": True, "false": False, "null": None}

    class Words(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.Constant(words[node.id]) if node.id in words else node

    text = match.group(1).strip()
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        tree = ast.parse(text.replace("\n", "\\n"), mode="eval").body
    found = []
    for node in tree.elts if isinstance(tree, ast.List) else [tree]:
        if not isinstance(node, ast.Call) or node.args or not all(k.arg for k in node.keywords):
            raise ValueError
        arguments = {
            str(each.arg): ast.literal_eval(Words().visit(each.value)) for each in node.keywords
        }
        found.append(_call(ast.unparse(node.func), arguments))
    return found


def _gemma_call(match: re.Match[str]) -> list[Call]:
    """An object whose keys have no quotes and whose texts stand between ``<|"|>``."""
    pieces = match.group(2).split('<|"|>')
    pieces[1::2] = [json.dumps(text) for text in pieces[1::2]]
    pieces[::2] = [
        re.sub(r"([{,]\s*)([^{}\[\],:\s]+)\s*:", r'\1"\2":', text) for text in pieces[::2]
    ]
    return [_call(match.group(1), json.loads("".join(pieces)))]


_FORMS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], list[Call]]], ...] = tuple(
    (re.compile(pattern, re.DOTALL), read)
    for pattern, read in (
        # Hermes, Qwen 2.5 and 3, and many fine-tunes
        (r"<tool_call>\s*([{\[].*?)\s*</tool_call>", _json_calls),
        # Qwen 3 Coder and 3.5, Nemotron 3
        (
            r"<tool_call>\s*<function=([^>\n]+)>(.*?)</function>\s*</tool_call>",
            _marked(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>"),
        ),
        # GLM 4.5
        (
            r"<tool_call>\s*([^\s<{\[]+)\n\s*((?:<arg_key>.*?)?)</tool_call>",
            _marked(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>"),
        ),
        # Mistral: a list of calls; since its tokenizer's version 11 a name and its arguments
        (r"\[TOOL_CALLS\]\s*(\[.*?\])\s*(?=\[TOOL_CALLS\]|$)", _json_calls),
        (
            r"\[TOOL_CALLS\]\s*([\w.-]+)(?:\[CALL_ID\](\w+))?\[ARGS\]\s*(\{.*?\})\s*"
            r"(?=\[TOOL_CALLS\]|$)",
            lambda match: [_call(match[1], json.loads(match[3]), match[2])],
        ),
        # Llama 3.1 where it runs Python
        (r"<\|python_tag\|>\s*(\{.*\})\s*$", _json_calls),
        # LFM 2
        (r"<\|tool_call_start\|>(.*?)<\|tool_call_end\|>", _python_calls),
        # Gemma 4
        (r"<\|tool_call>call:([^\s{]+)(\{.*?\})<tool_call\|>", _gemma_call),
        # gpt-oss: the channel stands before or behind the name
        (
            r"(?:<\|channel\|>commentary)?\s*to=functions\.([\w.-]+)(?:(?!<\|message\|>).)*"
            r"<\|message\|>(\{.*?\})\s*(?:<\|call\|>|$)",
            _named_object,
        ),
        # DeepSeek R1 and V3, then V3.1
        (
            r"<｜tool▁call▁begin｜>function<｜tool▁sep｜>([^\n]+)\n```json\n(.*?)\n```"
            r"<｜tool▁call▁end｜>",
            _named_object,
        ),
        (
            r"<｜tool▁call▁begin｜>([^<\n]+)<｜tool▁sep｜>(\{.*?\})<｜tool▁call▁end｜>",
            _named_object,
        ),
        # Muse
        (
            r"<atem:invoke name=\"([^\"]+)\">(.*?)</atem:invoke>",
            _marked(r"<atem:parameter name=\"([^\"]+)\">(.*?)</atem:parameter>"),
        ),
        # Command R
        (r"<\|START_ACTION\|>\s*(\[.*?\])\s*<\|END_ACTION\|>", _json_calls),
    )
)
"""Of each form its pattern, and what reads a match of it."""

_WRAPPERS = re.compile(
    r"<｜tool▁calls▁(?:begin|end)｜>|(?: *to=[\w.-]+<\|message\|>)?</?atem:function_calls>"
)
"""What stands around calls."""

_BARE = re.compile(r"^\s*(\{.*\})\s*$", re.DOTALL)
"""Llama 3.1: nothing but the object."""

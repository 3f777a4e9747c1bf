"""What a template leaves out of a conversation, found by origin (`data.origins`): refused where an
answer, an instruction or a call is lost, named and counted where it is not."""

from collections.abc import Sequence
from typing import Any

from ..errors import DataError
from .formats import Example, trained_turns
from .origins import KEY, Path, places
from .turns import Text, as_taken

REASONING = ("reasoning_content", "thinking", "reasoning")


def unread(example: Example, texts: Sequence[Text]) -> list[tuple[Path, str, bool]]:
    """Strings of a conversation of which nothing, or (True) not all, is in its texts."""
    found = []
    for number, (path, value) in enumerate(places(example.messages, example.tools)):
        most = max(text.read[number] for text in texts)
        if most >= len(value.strip()) or (path[-1] == KEY and path[0] == "tools"):
            continue
        if most >= sum(not character.isspace() for character in value):
            continue
        if any(text.lost and value.strip() in text.text for text in texts):
            continue
        if most and path[-1] != "content":
            continue
        found.append((path, value, most > 0))
    return found


STRUCTURE = frozenset(("id", "type", "tool_call_id", "index", "call_id"))
"""Keys of a message or a call that say how it hangs together; templates write few of them."""


def named_unread(example: Example, texts: Sequence[Text]) -> set[str]:
    """What is in no token and may be, as it is named to people.

    Raises:
        DataError: an answer, an instruction or a call is in no token.
    """
    example, found = as_taken(example, texts[0].variant), set[str]()
    left_out = unread(example, texts)
    if not left_out:
        return found
    messages = example.messages or []
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    trained = {turn for text in texts for turn in trained_turns(text.example)}
    for path, value, partly in left_out:
        keys = [key for key in path if isinstance(key, str)]
        if path[0] == "tools":
            if path[2:] in (("function", "name"), ("name",)):
                _left_out(f"tool {value!r}", ["or remove the tools from the rows"])
            if keys[-1] not in STRUCTURE:
                found.add(f"{keys[-1]} of tools")
            continue
        turn = path[1]
        if turn > last and all(len(text.example.messages or []) <= turn for text in texts):
            continue  # what follows the last answer is in no text that ends with it
        role = messages[turn]["role"]
        if path[2] == "content":
            if role == "assistant" and turn not in trained:
                found.add("earlier answers")
                continue
            if _may_be_unread(messages[turn], value):
                found.add("reasoning" if "</think>" in value else "text beside tool calls")
                continue
            begun = " ".join(value.split())[:60]
            if partly:
                raise DataError(
                    f"the chat template writes only a part of the {role}'s message {turn}",
                    found=repr(begun),
                    ways_out=[
                        "change that text in the row",
                        "or give another template with --chat_template",
                    ],
                )
            ways = (
                [f"--drop_roles {role} leaves such messages out"]
                if role not in ("user", "assistant")
                else []
            )
            _left_out(f"{role}'s message {begun!r}", ways)
        elif path[2] == "tool_calls":
            if path[-1] == KEY and path[-2] in ("name", "arguments", "function"):
                continue
            if {"name", "arguments"} & set(path[4:]):
                call = messages[turn]["tool_calls"][path[3]]
                name = call.get("function", call).get("name")
                _left_out(f"tool call {name!r}", ["or remove the calls from the rows"])
        elif path[2] in REASONING:
            found.add("reasoning")
        elif path[-1] != KEY and keys[-1] not in STRUCTURE:
            found.add(f"{keys[1]} of messages")
    return found


def _may_be_unread(message: dict[str, Any], content: str) -> bool:
    """Whether models are asked without this text: reasoning of earlier answers, words beside a
    call."""
    return message["role"] == "assistant" and bool(
        "</think>" in content or message.get("tool_calls")
    )


def _left_out(what: str, ways: list[str]) -> None:
    raise DataError(
        f"the chat template leaves the {what} out",
        ways_out=["give a template that writes it (--chat_template)", *ways],
    )

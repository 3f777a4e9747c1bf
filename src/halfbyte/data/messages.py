"""The messages of a conversation as the tools that write them mean them, in one form: ``role``,
``content`` (a string), ``tool_calls`` with their arguments as an object, whatever else there is."""

import json
from typing import Any

from ..errors import DataError
from .cells import encodable, is_missing, leaves, loaded, plain

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}
"""What the roles of other tools are called here."""
CALLS = ("function_call", "tool_call")
"""Roles whose whole content is a call; several in a row are one turn's."""
TRAINED = frozenset(("weight", "train", "training", "trainable", "loss", "loss_weight"))
"""Keys by which messages say whether they are trained."""
MEDIA = frozenset(("images", "image", "videos", "video", "audios", "audio"))


def role_of(message: Any) -> str | None:
    """A message's role in our words; None where it has none that is known."""
    said = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return ROLES.get(said) if isinstance(said, str) else None


def refuse_media(value: dict[str, Any], where: str) -> None:
    """Raise DataError for a row or message with pictures or sound."""
    for key in sorted(MEDIA & value.keys()):
        if not is_missing(value.get(key)) and value[key] not in ([], "", {}):
            raise DataError(
                f"{key!r} holds something else than text, and the model is one of text",
                where=where,
                ways_out=["leave such rows out (--skip_bad N), or remove the column"],
            )


def read_messages(
    value: Any, where: str, column: str, drop_roles: frozenset[str] = frozenset()
) -> tuple[list[dict[str, Any]], frozenset[int]]:
    """Checked turns, and the numbers of the assistant's that are only read.

    Raises:
        DataError: unknown roles, contents that are no text, roles out of order, nothing to train.
    """
    value = loaded(value, dict)
    if not isinstance(value, list) or not value:
        raise DataError(f"column {column!r} must be a non-empty list of messages", where=where)
    read = [_message(message, f"{where} message {number}") for number, message in enumerate(value)]
    read = _joined_calls(value, read)
    read = [pair for pair in read if pair[0]["role"] not in drop_roles]
    turns = [turn for turn, _ in read]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise DataError(
            "the conversation has no assistant's turn: there is nothing to train", where=where
        )
    untrained = frozenset(i for i in answers if not read[i][1])
    if len(untrained) == len(answers):
        raise DataError(
            "every answer of the conversation is marked as not to be trained",
            where=where,
            ways_out=["--skip_bad N leaves such rows out"],
        )
    for number, (turn, before) in enumerate(zip(turns[1:], turns, strict=False), 1):
        if turn["role"] == "system":
            raise DataError(
                "a system message stands after the first turn",
                where=f"{where} message {number}",
                ways_out=["put it first", "--drop_roles system leaves such messages out"],
            )
        if turn["role"] == before["role"] == "user":
            raise DataError(
                "two user's turns follow each other: roles are out of order",
                where=f"{where} message {number}",
                ways_out=["join them", "--skip_bad N"],
            )
    return turns, untrained


def _joined_calls(
    messages: list[Any], read: list[tuple[dict[str, Any], bool]]
) -> list[tuple[dict[str, Any], bool]]:
    """Calls that follow each other as turns of their own, as the one turn they are."""
    found: list[tuple[dict[str, Any], bool]] = []
    calling = False
    for message, (turn, trained) in zip(messages, read, strict=True):
        was, calling = calling, message.get("role", message.get("from")) in CALLS
        if was and calling:
            before, trained_too = found[-1]
            together = before["tool_calls"] + turn["tool_calls"]
            found[-1] = ({**before, "tool_calls": together}, trained and trained_too)
        else:
            found.append((turn, trained))
    return found


def _message(message: Any, where: str) -> tuple[dict[str, Any], bool]:
    """A message in our form, and whether it is trained where it is an answer."""
    if not isinstance(message, dict):
        raise DataError("a message must be an object with role and content", where=where)
    turn = {key: item for key, item in message.items() if not is_missing(item)}
    named = "role" if "role" in turn else "from"
    theirs = turn.pop(named, None)
    if named == "from":
        turn = {"content": turn.pop("value", None), **turn}
    role = role_of(message)
    if role is None:
        found = (
            repr(theirs) if theirs is not None else f"no role among {', '.join(turn) or 'nothing'}"
        )
        raise DataError("unknown role", where=where, found=found, expected=", ".join(ROLES))
    refuse_media(turn, where)
    trained = _is_trained(turn, where)
    turn = {"role": role, **turn}
    if theirs in CALLS:
        turn["tool_calls"] = _calls_of_text(turn.pop("content", None), where)
    elif call := turn.pop("function_call", None):
        turn["tool_calls"] = [*turn.get("tool_calls", []), {"type": "function", "function": call}]
    calls = turn.get("tool_calls")
    if calls:
        turn["tool_calls"] = [
            _call(call, f"{where} tool call {n}") for n, call in enumerate(_list(calls, where))
        ]
    content = turn.get("content")
    if isinstance(content, list):
        content = _joined_parts(content, where)
    if content is None and role == "assistant" and calls:
        content = ""
    if not isinstance(content, str):
        found = f"a {type(content).__name__}" if content is not None else "none"
        raise DataError("a message's content must be a string", where=where, found=found)
    turn["content"] = content
    for key, item in turn.items():
        if type(item) is not str:
            turn[key] = item = plain(item)
        for text in (key, *leaves(item, where)):
            encodable(text, where)
    if role == "assistant" and not content.strip() and not calls:
        raise DataError("an assistant's turn is empty: there is nothing to train", where=where)
    return turn, trained


def _is_trained(turn: dict[str, Any], where: str) -> bool:
    """What a message says of itself; its keys for that are taken out."""
    if not TRAINED & turn.keys():
        return True
    said = {key: turn.pop(key) for key in sorted(TRAINED & turn.keys())}
    values = {
        value.strip().lower() in ("true", "1", "1.0") if isinstance(value, str) else bool(value)
        for value in said.values()
    }
    if any(isinstance(value, int | float) and value not in (0, 1) for value in said.values()):
        raise DataError(
            "a message has a weight other than 0 and 1",
            where=where,
            found=", ".join(f"{key}={value}" for key, value in said.items()),
            ways_out=["0 leaves it untrained, 1 trains it"],
        )
    if len(values) > 1:
        raise DataError(
            "a message says both that it is trained and that it is not",
            where=where,
            found=", ".join(f"{key}={value}" for key, value in said.items()),
        )
    return values != {False}


def _list(value: Any, where: str) -> list[Any]:
    if isinstance(value, str):
        value = _json(value, where, "tool_calls")
    if not isinstance(value, list):
        raise DataError("tool_calls must be a list", where=where, found=type(value).__name__)
    return value


def _json(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is not valid JSON", where=where, found=str(error)[:200]) from error


def _call(call: Any, where: str) -> dict[str, Any]:
    """A call whose arguments are an object: a string that holds one is read, once."""
    if not isinstance(call, dict):
        raise DataError("a tool call must be an object", where=where, found=type(call).__name__)
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise DataError("a tool call has no name", where=where)
    arguments = inner.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, where, "a tool call's arguments") if arguments.strip() else {}
    inner = {**inner, "arguments": {} if arguments is None else arguments}
    return {**call, "function": inner} if "function" in call else inner


def _calls_of_text(value: Any, where: str) -> list[dict[str, Any]]:
    """ShareGPT's turn of a ``function_call``: a call, or several, as JSON."""
    found = _json(value, where, "the function call") if isinstance(value, str) else value
    calls = found if isinstance(found, list) else [found]
    return [
        call
        if isinstance(call, dict) and "function" in call
        else {"type": "function", "function": call}
        for call in calls
    ]


def _joined_parts(parts: list[Any], where: str) -> str:
    texts = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise DataError(
                "a message holds something else than text",
                where=where,
                found=repr(kind),
                expected="text",
                ways_out=["--skip_bad N leaves such rows out"],
            )
        text = next((part[key] for key in ("text", "value", "content") if key in part), None)
        if not isinstance(text, str):
            keys = ", ".join(map(str, part))
            raise DataError(
                "a part of a message has no text", where=where, found=keys, expected="the key text"
            )
        texts.append(text)
    return "".join(texts)


def read_tools(row: dict[str, Any], where: str) -> list[Any] | None:
    """The schemas a row offers its model (``tools``, or ``functions`` as they were called)."""
    column = "tools" if not is_missing(row.get("tools")) else "functions"
    value = row.get(column)
    if isinstance(value, str):
        value = _json(value, where, f"column {column!r}") if value.strip() else None
    if is_missing(value) or value == []:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"column {column!r} must be a list of JSON schemas", where=where)
    for text in leaves(value, where):
        encodable(text, where)
    if column == "functions":
        return [
            tool if "function" in tool else {"type": "function", "function": tool} for tool in value
        ]
    return value

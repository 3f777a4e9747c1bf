"""``halfbyte chat RUN``."""

from typing import Any

from ..config import ChatConfig, ModelOptions
from ..run import is_run
from . import console
from .options import Verb


def chat(record: ChatConfig) -> dict[str, Any]:
    """Talk to MODEL: a run directory, a Hub id or a local directory. --prompt for one answer."""
    from ..chat import Renderer
    from ..load import load

    given = {key: getattr(record, key) for key in ModelOptions.model_fields if key in record.model_fields_set}
    model, tokenizer = load(record.model, progress=console.progress, **given)
    renderer = Renderer(tokenizer)
    opening = [{"role": "system", "content": record.system}] if record.system else []
    if record.prompt is not None:
        text, stopped = _turn(record, model, renderer, [*opening, {"role": "user", "content": record.prompt}])
        if is_run(record.model):
            console.say(f"next: halfbyte merge {record.model} --onto trained -o merged")
        else:
            console.say(f"next: halfbyte train {record.model} --data my.jsonl")
        return {"prompt": record.prompt, "answer": text, "stopped": stopped}
    turns = list(opening)
    console.say("an empty line ends the conversation")
    while line := _read_line():
        turns.append({"role": "user", "content": line})
        text, _ = _turn(record, model, renderer, turns)
        turns.append({"role": "assistant", "content": text})
    return {"messages": turns}


def _read_line() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _turn(record: ChatConfig, model: Any, renderer: Any, messages: list[dict[str, Any]]) -> tuple[str, bool]:
    from ..generate import answer

    text, stopped = answer(
        model,
        renderer,
        messages,
        max_new_tokens=record.max_new_tokens,
        temperature=record.temperature,
        top_p=record.top_p,
        seed=record.seed,
        emit=console.piece,
    )
    console.piece("\n")
    if not stopped:
        console.say(f"(cut off after {record.max_new_tokens} tokens; --max_new_tokens raises the limit)")
    return text, stopped


command = Verb("chat", ChatConfig, chat, positional=("model",))

"""``halfbyte chat RUN``."""

from typing import Any

from ..config.options import ModelOptions
from ..config.verbs import ChatConfig
from ..errors import UsageError
from . import console
from .options import Verb


def chat(record: ChatConfig) -> dict[str, Any]:
    """Talk to MODEL: a run directory, a Hub id or a local directory. --prompt for one answer."""
    from ..data.renderer import Renderer
    from ..run.load import load, run_renderer
    from ..run.source import held_in, run_at

    given = {
        key: getattr(record, key)
        for key in ModelOptions.model_fields
        if key in record.model_fields_set
    }
    run = run_at(record.model)
    model, tokenizer = load(record.model, progress=console.progress, **given)
    console.say(f"{record.model} is held in {held_in(model)}")
    renderer = run_renderer(run, run.config()) if run else Renderer(tokenizer)
    # a run trained on texts continues texts: a chat template is a form it never saw
    plain = run is not None and run.info()["data"]["form"] in ("prompt", "text")
    if plain:
        console.say(
            "this run was trained on plain texts: what you type is continued, without a chat "
            "template"
        )
        if record.system:
            raise UsageError(
                "a system message needs a chat template, which this run was not trained with"
            )
    opening = [{"role": "system", "content": record.system}] if record.system else []
    if record.prompt is not None:
        question = (
            record.prompt if plain else [*opening, {"role": "user", "content": record.prompt}]
        )
        said = _turn(record, model, renderer, question)
        if run is not None and run.config().full:
            console.following("eval", record.model, raw="--data held_out.jsonl")
        elif run is not None:
            console.following("merge", record.model, raw="--onto trained -o merged")
        else:
            console.following("train", record.model, raw="--data my.jsonl")
        return {"prompt": record.prompt, "answer": said.text, "stopped": said.stopped}
    turns = list(opening)
    console.say("an empty line ends the conversation")
    while line := _read_line():
        turns.append({"role": "user", "content": line})
        said = _turn(record, model, renderer, line if plain else turns)
        turns.append({"role": "assistant", "content": said.text})
    if run:
        console.following("merge", record.model, raw="--onto trained -o merged")
    else:
        console.following("explain", "nf4")
    return {"messages": turns}


def _read_line() -> str:
    try:
        console.piece("> ")
        return input().strip()
    except EOFError:
        return ""


def _turn(record: ChatConfig, model: Any, renderer: Any, prompt: str | list[dict[str, Any]]) -> Any:
    from ..engine.generate import answer

    said = answer(
        model,
        renderer,
        prompt,
        max_new_tokens=record.max_new_tokens,
        temperature=record.temperature,
        top_p=record.top_p,
        seed=record.seed,
        emit=console.piece,
    )
    console.piece("\n")
    if not said.stopped:
        console.say(
            f"(cut off after {record.max_new_tokens} tokens; --max_new_tokens raises the limit)"
        )
    return said


command = Verb("chat", ChatConfig, chat, positional=("model",))

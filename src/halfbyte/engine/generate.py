"""Answers from a model: transformers' own generation with its key-value cache, our renderer before
it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..data.renderer import Renderer
from ..model.rope import PassKind, pass_kind

SAMPLE_TOKENS, SAMPLE_SECONDS = 96, 60.0
"""Longest sample answer of a training, and the time after which sampling is cut off."""


class _Stream:
    """transformers' streamer protocol: token ids to pieces of text, whole characters only."""

    def __init__(self, tokenizer: Any, emit: Callable[[str], None]) -> None:
        self.tokenizer, self.emit = tokenizer, emit
        self.ids: list[int] = []
        self.shown = ""
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.reshape(-1).tolist()
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd") and text.startswith(self.shown):
            self.emit(text[len(self.shown) :])
            self.shown = text

    def end(self) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if text.startswith(self.shown):
            self.emit(text[len(self.shown) :])


@dataclass(frozen=True)
class Answer:
    """What a model said, and whether it stopped by itself."""

    text: str
    stopped: bool


def answer(
    model: Any,
    renderer: Renderer,
    prompt: str | list[dict[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 42,
    emit: Callable[[str], None] | None = None,
) -> Answer:
    """The model's next turn.

    Args:
        prompt: the conversation so far, ending with the user's turn, or a text to go on from.
        temperature: 0 takes the likeliest token.
        emit: called with each piece of text as it comes.
    """
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p}
        if temperature > 0
        else {"do_sample": False}
    )
    torch.manual_seed(seed)
    streamer = _Stream(renderer.tokenizer, emit) if emit else None
    (result,) = _generate(
        model,
        renderer,
        [renderer.prompt_ids(prompt)],
        max_new_tokens,
        streamer=streamer,
        **sampling,
    )
    return result


def answers(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    max_time: float | None = None,
    at_once: int = 0,
) -> list[Answer]:
    """The likeliest answers to several prompts (ids), generated together.

    Args:
        max_time: seconds after which all answers are cut off.
        at_once: so many tokens of prompts go through the model together, at least one prompt; 0:
            all of them.
    """
    found: list[Answer] = []
    began = time.monotonic()
    kind = pass_kind(model.config)
    for group in prompts_at_once(prompts, at_once, lambda length: kind(length + max_new_tokens)):
        limits: dict[str, Any] = {}
        if max_time is not None:
            limits["max_time"] = max(max_time - (time.monotonic() - began), 0.0)
        found += _generate(model, renderer, group, max_new_tokens, do_sample=False, **limits)
    return found


def prompts_at_once(
    prompts: Sequence[list[int]], at_once: int, kind: PassKind = lambda length: 0
) -> Iterator[list[list[int]]]:
    """Groups of prompts that go through a model together: padded, so many tokens; all where
    ``at_once`` is 0. One that grows to lengths of another ``kind`` than the shortest goes alone."""
    group: list[list[int]] = []
    for prompt in prompts:
        width = max(map(len, [*group, prompt]))
        alone = kind(width) != kind(0)
        if group and (alone or (at_once and width * (len(group) + 1) > at_once)):
            yield group
            group = []
        group.append(prompt)
    if group:
        yield group


@torch.inference_mode()
def _generate(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    streamer: _Stream | None = None,
    **settings: Any,
) -> list[Answer]:
    """Prompts are padded on the left, where nothing attends to them; a model in training is left as
    it was."""
    from transformers import GenerationConfig

    device = model.device
    stops = renderer.stop_ids()
    width = max(map(len, prompts))
    ids = torch.tensor([[stops[0]] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    was_training, cached, own = model.training, model.config.use_cache, model.generation_config
    model.eval()
    # in place of the base's, which fills what is not set: it may hold penalties, beams and switches
    # nobody asked for here
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
        use_cache=True,
        **settings,
    )
    try:
        out = model.generate(ids, attention_mask=mask, streamer=streamer)
    finally:
        model.train(was_training)
        model.config.use_cache, model.generation_config = cached, own
    results = []
    for row in out[:, width:].tolist():
        end = next((place for place, token in enumerate(row) if token in stops), None)
        text = renderer.tokenizer.decode(
            row if end is None else row[:end], skip_special_tokens=True
        )
        results.append(Answer(text, end is not None))
    return results

"""Answers from a model: transformers' own generation with its key-value cache, our renderer before it."""

from collections.abc import Callable
from typing import Any

import torch

from .chat import Renderer


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


@torch.inference_mode()
def answer(
    model: Any,
    renderer: Renderer,
    messages: list[dict[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 42,
    emit: Callable[[str], None] | None = None,
) -> tuple[str, bool]:
    """The model's next turn, and whether it stopped by itself.

    Args:
        messages: the conversation so far, ending with the user's turn. temperature: 0 takes the likeliest token.
        emit: called with each piece of text as it comes.
    """
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([renderer.prompt_ids(messages)], device=device)
    stops = renderer.stop_ids()
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    torch.manual_seed(seed)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
        streamer=_Stream(renderer.tokenizer, emit) if emit else None,
        use_cache=True,
        **sampling,
    )
    new = out[0, ids.shape[1] :].tolist()
    stopped = bool(new) and new[-1] in stops
    return renderer.tokenizer.decode(new, skip_special_tokens=True), stopped

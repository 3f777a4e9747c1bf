"""Answers from a model: transformers' own generation with its key-value cache, our renderer before
it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..data.renderer import Renderer
from ..errors import ModelError, UsageError
from ..files.model_config import context_of
from ..model.rope import PassKind, pass_kind

SAMPLE_TOKENS, SAMPLE_SECONDS = 96, 60.0
"""Longest sample answer of a training, and the time after which sampling is cut off."""
COLDEST = 1e-3
"""Temperatures below take the likeliest token: divided by them, logits leave fp32."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen. Whatever else transformers could do to them (beams,
    penalties, cut-offs, tokens that are forced or suppressed) is off, whatever the base's own file
    says.

    Attributes:
        temperature: 0 takes the likeliest token. top_p, top_k, min_p: what is drawn from; 1, 0 and
            0: every token.
        repetition_penalty: 1: none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def settings(self) -> dict[str, Any]:
        """For transformers: every field that changes an answer, since it fills what is not set from
        the base's file and then from defaults of its own (top_k 50)."""
        found: dict[str, Any] = {**_OFF, "repetition_penalty": self.repetition_penalty}
        if self.temperature < COLDEST:
            return {**found, "do_sample": False}
        chosen = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {**found, **chosen, "do_sample": True, "min_p": self.min_p or None}


_OFF: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "renormalize_logits": False,
    "remove_invalid_values": False,
    "min_length": 0,
    "token_healing": False,
}
_UNSET = object()
GREEDY = Sampling()
TAKEN_FROM_MODEL = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields of a base's generation_config.json that an answer may be asked to take."""


def sampling_of(model: Any) -> dict[str, float]:
    """What a base's own file says of sampling, as fields of `Sampling`."""
    own = model.generation_config
    found = {name: getattr(own, name, None) for name in TAKEN_FROM_MODEL}
    if not own.do_sample:
        found["temperature"] = 0.0
    elif found["temperature"] is None:
        found["temperature"] = 1.0
    return {name: value for name, value in found.items() if value is not None}


class AnswerText:
    """Text of an answer that grows by tokens.

    Args:
        before: ids that stand before it and are no part of it: the first token's space belongs to
            the text where something stands before it.
        marks: control tokens are shown.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = (), *, marks: bool = False) -> None:
        self.tokenizer, self.marks = tokenizer, marks
        self.before = list(before)
        self._unseen = set() if marks else set(tokenizer.all_special_ids)
        self._start = self._decode(self.before) if self.before else ""

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=not self.marks)

    def of(self, ids: Sequence[int]) -> str:
        """The text of an answer's ids."""
        whole = self._decode([*self.before, *ids])
        return whole[len(self._start) :] if whole.startswith(self._start) else self._decode([*ids])

    def settled(self, ids: Sequence[int]) -> str:
        """As much of it as no further token changes: bytes of a character that is not whole yet may
        become another, with all the bytes beside them."""
        last = len(ids)
        # bytes with a control token between them that is not shown are beside each other, too
        while last and (self._is_byte(ids[last - 1]) or ids[last - 1] in self._unseen):
            last -= 1
        return self.of(ids[:last]).rstrip("\ufffd")

    def _is_byte(self, index: int) -> bool:
        token = self.tokenizer.convert_ids_to_tokens(index) or ""
        return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


class _Stream:
    """transformers' streamer protocol: token ids to pieces of text, what is settled at once."""

    def __init__(
        self, text: AnswerText, emit: Callable[[str], None], ends: set[int], stops: Sequence[str]
    ) -> None:
        self.text, self.emit, self.ends, self.stops = text, emit, ends, stops
        self.ids: list[int] = []
        self.shown = ""
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += [index for index in value.reshape(-1).tolist() if index not in self.ends]
        settled = self.text.settled(self.ids)
        held = max((_overlap(settled, stop) for stop in self.stops), default=0)
        self._show(_before_stop(settled, self.stops)[: len(settled) - held or None])

    def end(self) -> None:
        self._show(_before_stop(self.text.of(self.ids), self.stops))

    def _show(self, text: str) -> None:
        """Emit what is new; of text that became another, from there on."""
        same = next(
            (i for i, (a, b) in enumerate(zip(self.shown, text, strict=False)) if a != b),
            min(len(self.shown), len(text)),
        )
        if len(text) > same:
            self.emit(text[same:])
            self.shown = text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop."""
    return next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)


def _before_stop(text: str, stops: Sequence[str]) -> str:
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


class _AtText:
    """Ends answers at texts, for transformers' list of stopping criteria."""

    def __init__(self, text: AnswerText, width: int, stops: Sequence[str]) -> None:
        self.text, self.width, self.stops = text, width, stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **ignored: Any) -> torch.Tensor:
        texts = [self.text.of(row[self.width :].tolist()) for row in input_ids]
        found = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(found, device=input_ids.device)


class _OtherThanWanted:
    """Ends each answer that cannot become the one that is wanted any more, for transformers' list
    of stopping criteria."""

    def __init__(self, text: AnswerText, width: int, wanted: Sequence[str]) -> None:
        self.text, self.width = text, width
        self.open = {row: answer.strip() for row, answer in enumerate(wanted)}

    def __call__(self, input_ids: torch.Tensor, scores: Any, **ignored: Any) -> torch.Tensor:
        for row, answer in list(self.open.items()):
            begun = self.text.settled(input_ids[row, self.width :].tolist()).strip()
            if not answer.startswith(begun[:-_UNSETTLED]):
                del self.open[row]
        ended = [row not in self.open for row in range(len(input_ids))]
        return torch.tensor(ended, device=input_ids.device)


_UNSETTLED = 8
"""Characters at the end of a text that tokenizers may still change when more follows (spaces before
marks)."""


@dataclass(frozen=True)
class Answer:
    """What a model said, and whether it stopped by itself.

    Attributes:
        text: without control tokens. marked: with them, but the end.
        cut: "tokens", "context" or "interrupted", why it did not stop; "" where it did.
    """

    text: str
    stopped: bool
    marked: str = ""
    cut: str = ""


def answer(
    model: Any,
    renderer: Renderer,
    prompt: str | list[dict[str, Any]],
    *,
    max_new_tokens: int = 256,
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    begun: str = "",
    seed: int = 42,
    emit: Callable[[str], None] | None = None,
) -> Answer:
    """The model's next turn.

    Args:
        prompt: the conversation so far, ending with the user's turn, or a text to go on from.
        stop: texts that end it, no part of it.
        begun: how it begins; part of it.
        emit: called with each piece of text as it comes, control tokens included.

    Raises:
        UsageError: nothing to go on from, or more than the model's context.
    """
    ids = (
        renderer.prompt_ids(prompt, begun=begun)
        if isinstance(prompt, str)
        else renderer.dialogue_ids(prompt, begun)
    )
    limit = room_for(model, ids, max_new_tokens)
    torch.manual_seed(seed)
    before = ids[-4:] if begun or isinstance(prompt, str) else []
    if begun and emit:
        emit(begun)
    (result,) = _generate(
        model,
        renderer,
        [ids],
        limit,
        sampling=sampling,
        stop=stop,
        emit=emit,
        before=before,
    )
    cut = result.cut
    if not result.stopped and not cut:
        cut = "tokens" if limit == max_new_tokens else "context"
    text = renderer.without_control_tokens(begun) + result.text
    return Answer(text, result.stopped, begun + result.marked, cut)


def room_for(model: Any, ids: Sequence[int], wanted: int) -> int:
    """How many tokens of an answer fit into the model's context behind a prompt.

    Raises:
        UsageError: the prompt is empty, or fills the context.
        ModelError: it holds a token that the model has no embedding of.
    """
    if not ids:
        raise UsageError(
            "there is nothing to answer: the prompt is empty, and the tokenizer writes no beginning"
        )
    embeddings = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= embeddings:
        raise ModelError(
            f"the prompt holds the token {max(ids)}, and the model has {embeddings:,} embeddings: "
            "the tokenizer has tokens that this base does not know",
            ways_out=[
                "name the base that they were added to (resize_token_embeddings and "
                "save_pretrained in transformers make it): --base"
            ],
        )
    context = context_of(model.config)
    if context is None:
        return wanted
    if len(ids) >= context:
        raise UsageError(
            f"the prompt has {len(ids):,} tokens, and the model's context is {context:,}",
            ways_out=["shorten it", "or take a model with a longer context"],
        )
    return min(wanted, context - len(ids))


def answers(
    model: Any,
    renderer: Renderer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    max_time: float | None = None,
    at_once: int = 0,
    wanted: Sequence[str] | None = None,
) -> list[Answer]:
    """The likeliest answers to several prompts (ids), generated together.

    Args:
        max_time: seconds after which all answers are cut off.
        wanted: the text that each is held against: it is cut off where it is another one, and what
            is left of it then says no more than that.
        at_once: so many tokens of prompts go through the model together, at least one prompt; 0:
            all of them.
    """
    found: list[Answer] = []
    began = time.monotonic()
    kind = pass_kind(model.config)
    for group in prompts_at_once(prompts, at_once, lambda length: kind(length + max_new_tokens)):
        limits: dict[str, Any] = {}
        if wanted is not None:
            limits["wanted"] = wanted[len(found) : len(found) + len(group)]
        if max_time is not None:
            limits["max_time"] = max(max_time - (time.monotonic() - began), 0.0)
        found += _generate(model, renderer, group, max_new_tokens, **limits)
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
    sampling: Sampling = GREEDY,
    stop: Sequence[str] = (),
    emit: Callable[[str], None] | None = None,
    before: Sequence[int] = (),
    wanted: Sequence[str] | None = None,
    **settings: Any,
) -> list[Answer]:
    """Prompts are padded on the left, where nothing attends to them; a model in training is left as
    it was."""
    from transformers import GenerationConfig

    device, ends = model.device, ends_of(model, renderer)
    width = max(map(len, prompts))
    ids = torch.tensor([[ends[0]] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    was_training, own = model.training, model.generation_config
    cached = vars(model.config).get("use_cache", _UNSET)  # composite configurations have none
    marked = AnswerText(renderer.tokenizer, before, marks=True)
    stream = _Stream(marked, emit, set(ends), stop) if emit else None
    plain = AnswerText(renderer.tokenizer, before)
    criteria: list[Any] = [_AtText(marked, width, stop)] if stop else []
    if wanted is not None:
        criteria.append(_OtherThanWanted(plain, width, wanted))
    model.eval()
    head = model.get_output_embeddings().register_forward_pre_hook(_as_rows)
    # in place of the base's, which fills what is not set
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
        use_cache=True,
        **sampling.settings(),
        **settings,
    )
    try:
        out = model.generate(
            ids, attention_mask=mask, streamer=stream, stopping_criteria=criteria or None
        )
        rows = out[:, width:].tolist()
    except KeyboardInterrupt:  # of a dialogue: the answer ends, as far as it came
        if stream is None:
            raise
        stream.end()
        return [Answer(plain.of(stream.ids), False, marked.of(stream.ids), "interrupted")]
    finally:
        head.remove()
        model.train(was_training)
        model.generation_config = own
        if cached is not _UNSET:
            model.config.use_cache = cached
    return [_answer_of(row, set(ends), stop, plain, marked) for row in rows]


def _as_rows(head: Any, given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What an output head is called with, its first tensor laid out anew: of the last positions of
    longer rows, as they lie, PyTorch's product on a CPU copies the whole head for each row."""
    return (given[0].clone(memory_format=torch.contiguous_format), *given[1:]) if given else given


def _answer_of(
    row: list[int], ends: set[int], stop: Sequence[str], plain: AnswerText, marked: AnswerText
) -> Answer:
    end = next((place for place, token in enumerate(row) if token in ends), None)
    ids = row if end is None else row[:end]
    text, shown = plain.of(ids), marked.of(ids)
    stopped = end is not None or any(each in shown for each in stop)
    return Answer(_before_stop(text, stop), stopped, _before_stop(shown, stop))


def ends_of(model: Any, renderer: Renderer) -> list[int]:
    """Every id that ends an answer: those of the template and the rows, and those the base
    declares."""
    declared = model.generation_config.eos_token_id
    own = declared if isinstance(declared, list) else [] if declared is None else [declared]
    return list(dict.fromkeys([*renderer.stop_ids(), *own]))

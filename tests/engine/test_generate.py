"""Answers: what is asked decides, ends are found, streams show all of the text."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import halfbyte
from halfbyte.data.renderer import Renderer
from halfbyte.engine.generate import (
    AnswerText,
    Sampling,
    _Stream,
    answer,
    answers,
    ends_of,
    room_for,
    sampling_of,
)
from halfbyte.errors import ModelError, UsageError
from halfbyte.files import hub

from ..helpers import SHARED

TURNS = [{"role": "user", "content": "Say it three times: tea tea tea"}]


@pytest.fixture(scope="module")
def demo() -> tuple[Any, Renderer]:
    model, tokenizer = halfbyte.load("demo", load_in_4bit=False, dtype="float32")
    return model, Renderer(tokenizer)


def test_nothing_of_the_bases_file_changes_an_answer_that_did_not_ask_for_it(
    demo: tuple[Any, Renderer],
):
    model, renderer = demo
    own = model.generation_config
    plain = answer(model, renderer, TURNS, max_new_tokens=12)
    drawn = answer(model, renderer, TURNS, max_new_tokens=12, sampling=Sampling(5.0))
    model.generation_config = GenerationConfig(
        repetition_penalty=5.0,
        top_k=1,
        no_repeat_ngram_size=1,
        num_beams=3,
        suppress_tokens=list(range(200, 260)),
        do_sample=True,
        temperature=3.0,
        eos_token_id=own.eos_token_id,
    )
    try:
        assert sampling_of(model) == {"temperature": 3.0, "top_k": 1, "repetition_penalty": 5.0}
        assert answer(model, renderer, TURNS, max_new_tokens=12) == plain
        again = answer(model, renderer, TURNS, max_new_tokens=12, sampling=Sampling(5.0))
        assert again == drawn != plain
    finally:
        model.generation_config = own


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(1e-30),
        Sampling(0.7),
        Sampling(3.0),
        Sampling(1.3, top_k=5),
        Sampling(1.0, top_p=0.6, min_p=0.05),
        Sampling(0.0, repetition_penalty=1.4),
    ],
)
def test_answers_are_transformers(demo: tuple[Any, Renderer], sampling: Sampling):
    """Equal text for what is asked for, with the same seed."""
    model, renderer = demo
    theirs = AutoModelForCausalLM.from_pretrained(hub.resolve("demo"), dtype=torch.float32)
    ids = torch.tensor([renderer.prompt_ids(TURNS)])
    asked: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 1e-3:
        asked = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        asked |= {"top_k": sampling.top_k, "min_p": sampling.min_p or None}
    torch.manual_seed(42)
    row = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=16,
        eos_token_id=ends_of(model, renderer),
        pad_token_id=0,
        repetition_penalty=sampling.repetition_penalty,
        **asked,
    )[0, ids.shape[1] :]
    expected = renderer.tokenizer.decode(row, skip_special_tokens=True)
    found = answer(model, renderer, TURNS, max_new_tokens=16, sampling=sampling)
    assert found.text == expected


def test_a_text_that_stops_is_no_part_of_the_answer(demo: tuple[Any, Renderer]):
    model, renderer = demo
    whole = answer(model, renderer, TURNS, max_new_tokens=24).marked
    stop = whole[4:7]
    pieces: list[str] = []
    found = answer(
        model, renderer, TURNS, max_new_tokens=24, stop=[stop, "never"], emit=pieces.append
    )
    assert found.stopped and found.marked == whole[: whole.index(stop)] == "".join(pieces)


def test_ends_that_the_base_declares_end_answers(demo: tuple[Any, Renderer]):
    model, renderer = demo
    own, ids = model.generation_config, renderer.prompt_ids(TURNS)
    row = model.generate(
        torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=1, pad_token_id=0
    )[0, len(ids) :].tolist()
    model.generation_config = GenerationConfig(eos_token_id=[1, row[3]])
    try:
        found = answer(model, renderer, TURNS, max_new_tokens=8)
        assert found.stopped
        assert found.marked == renderer.tokenizer.decode(row[: row.index(row[3])])
    finally:
        model.generation_config = own


def test_prompts_that_cannot_be_answered_are_refused_by_name(demo: tuple[Any, Renderer]):
    model, renderer = demo
    with pytest.raises(UsageError, match="tokens, and the model's context is 512"):
        answer(model, renderer, [{"role": "user", "content": "tea and bun " * 500}])
    full = answer(
        model, renderer, [{"role": "user", "content": "tea " * 240}], max_new_tokens=10_000
    )
    assert full.stopped or full.cut == "context"
    tokenizer = AutoTokenizer.from_pretrained(hub.resolve("demo"))
    bare = Renderer(tokenizer)
    if not bare.prompt_ids(""):
        with pytest.raises(UsageError, match="nothing to answer"):
            answer(model, bare, "")


TOKENIZERS = ["demo", "byte fallback", "stories260k", "mistral-tokenizer"]


def byte_fallback() -> Any:
    """A tokenizer like Llama 2's: words carry the space before them, other characters are bytes."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    words += ["\u2581Once", "\u2581upon", "\u2581a", "\u2581time", "ly"]
    core = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tokenizer_of(name: str) -> Any:
    if name == "byte fallback":
        return byte_fallback()
    place = hub.resolve("demo") if name == "demo" else SHARED / "models" / name
    if not Path(place).exists():
        pytest.skip(f"{place} is not here")
    return AutoTokenizer.from_pretrained(place)


def stream_all(tokenizer: Any, rows: int) -> None:
    pick = random.Random(0)
    whole_vocabulary = range(len(tokenizer))
    ends = {tokenizer.eos_token_id}
    for number in range(rows):
        ids = [i for i in pick.choices(whole_vocabulary, k=12) if i not in ends]
        for marks in (True, False):
            pieces: list[str] = []
            text = AnswerText(tokenizer, [5] if number % 2 else [], marks=marks)
            stream = _Stream(text, pieces.append, ends, [])
            stream.put(torch.tensor([[1]]))
            for index in ids:
                stream.put(torch.tensor([index]))
            stream.end()
            assert "".join(pieces) == text.of(ids), (number, ids)


def test_the_space_before_an_answers_first_word_belongs_to_it():
    """Where it goes on from a text; a turn of its own begins without."""
    tokenizer = byte_fallback()
    once, upon, a = tokenizer.convert_tokens_to_ids(["\u2581Once", "\u2581upon", "\u2581a"])
    assert tokenizer.decode([once]) + AnswerText(tokenizer, [once]).of([upon, a]) == "Once upon a"
    assert AnswerText(tokenizer).of([upon, a]) == "upon a"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_streams_show_what_is_decoded_at_once(name: str):
    stream_all(tokenizer_of(name), 400)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TOKENIZERS, "SmolLM2"])
def test_streams_of_ten_thousand_rows(name: str, request: pytest.FixtureRequest):
    if name == "SmolLM2":
        tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue("smollm2"))
    else:
        tokenizer = tokenizer_of(name)
    stream_all(tokenizer, 10_000)


def test_a_token_that_the_base_does_not_know_is_named(stories: Path):
    """The tokenizer of an adapter whose base had tokens added, beside the base of before."""
    model = AutoModelForCausalLM.from_pretrained(stories)
    count = model.get_input_embeddings().weight.shape[0]
    assert room_for(model, [1, count - 1], 8) == 8
    with pytest.raises(ModelError, match=f"the token {count}, and the model has {count:,} emb"):
        room_for(model, [1, count], 8)


def test_the_head_is_multiplied_by_rows_that_lie_side_by_side(
    demo: tuple[Any, Renderer], monkeypatch: pytest.MonkeyPatch
):
    """By the last positions of longer rows as they lie, PyTorch copied the head for each prompt:
    172 MiB instead of 18 for three short ones of SmolLM2, 12 to 17 % over the plan."""
    model, renderer = demo
    head = model.get_output_embeddings()
    strides: set[tuple[int, ...]] = set()
    forward = type(head).forward

    def seen(self: Any, x: torch.Tensor) -> torch.Tensor:
        if self is head:
            strides.add(x.stride())
        return forward(self, x)

    monkeypatch.setattr(type(head), "forward", seen)
    prompts = [renderer.prompt_ids([{"role": "user", "content": q}]) for q in ("tea", "a bun")]
    answers(model, renderer, prompts, 3)
    width = head.weight.shape[1]
    assert strides == {(width, width, 1)}
    assert not head._forward_pre_hooks

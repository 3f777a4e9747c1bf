"""Our ids and masks against TRL's own for its training templates, on real conversations in two
languages.

The templates come from TRL (a development dependency). Families with byte-level tokenizers are
tried with the built-in model's, given their control tokens; Mistral, of which TRL ships no
template, with Mistral's own and its public format. (A sentencepiece tokenizer writes a line end
after a control token as two tokens of one character, of which transformers' own mask takes the
first only; ours takes what the template marks.)
"""

import json
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AddedToken

from halfbyte.data.formats import Example, read_examples
from halfbyte.data.renderer import Renderer
from halfbyte.files import hub

from ..helpers import shared

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


FAMILIES = {
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"]),
    "qwen2_5": (None, "<|im_end|>", ["<|im_start|>"]),
    "qwen3": (None, "<|im_end|>", ["<|im_start|>"]),
    "gemma": ("<bos>", "<end_of_turn>", ["<start_of_turn>"]),
    "phi3": (None, "<|endoftext|>", ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]),
    "mistral": ("<s>", "</s>", []),
}


MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %}{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}{% "
    "endfor %}"
)


def tokenizer_of(family: str) -> Any:
    tokenizer = hub.load_tokenizer(
        shared("models/mistral-tokenizer") if family == "mistral" else hub.resolve("demo")
    )
    bos, eos, others = FAMILIES[family]
    tokens = [
        AddedToken(t, special=True, normalized=False)
        for t in [*others, eos, *([bos] if bos else [])]
    ]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.eos_token = eos
    if bos:
        tokenizer.bos_token = bos
    return tokenizer


def template_of(family: str, *, marked: bool) -> str:
    if family == "mistral":
        return (
            MISTRAL
            if marked
            else MISTRAL.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        )
    return (TEMPLATES / f"{family}{'_training' if marked else ''}.jinja").read_text()


def conversations(language: str, count: int | None) -> list[Example]:
    return read_examples(shared(f"data/oasst1-chat/oasst1_val_{language}.jsonl")).rows[:count]


def compare(family: str, language: str, count: int | None) -> int:
    tokenizer, template = tokenizer_of(family), template_of(family, marked=True)
    renderer, rows = Renderer(tokenizer, template), conversations(language, count)
    for example, row in zip(rows, renderer.encode(rows), strict=True):
        theirs = tokenizer.apply_chat_template(
            example.messages,
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        assert row.input_ids == theirs["input_ids"], example.where
        assert row.loss_mask == [bool(flag) for flag in theirs["assistant_masks"]], example.where
    return len(rows)


@pytest.mark.parametrize("language", ["en", "es"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_equal_trl(family: str, language: str):
    assert compare(family, language, 40) == 40


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "es"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_equal_trl_on_everything(family: str, language: str):
    assert compare(family, language, None) > 200


@pytest.mark.parametrize("family", ["llama3", "qwen2_5", "gemma", "phi3", "mistral"])
def test_without_marks_the_prefix_difference_trains_the_same_words(family: str):
    """Every answer and the control token that ends it; white space around them is the template's
    choice."""
    tokenizer = tokenizer_of(family)
    marked = Renderer(tokenizer, template_of(family, marked=True))
    plain = Renderer(tokenizer, template_of(family, marked=False))
    for example in conversations("es", 40):
        words = []
        for renderer in (marked, plain):
            text = "".join(s.text for s in renderer.segments(example) if s.supervised)
            words.append("".join(text.replace(tokenizer.eos_token, "<end>").split()))
        # its marked form also trains the tokenizer's end token after the last turn
        if family == "phi3":
            words = [text.removesuffix("<end>") for text in words]
        assert words[0] == words[1], example.where


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stops_at_what_it_was_trained_to_write(family: str):
    tokenizer = tokenizer_of(family)
    stops = tokenizer.convert_ids_to_tokens(
        Renderer(tokenizer, template_of(family, marked=True)).stop_ids()
    )
    assert tokenizer.eos_token in stops
    assert ("<|end|>" in stops) == (family == "phi3")
    assert not {"<|im_start|>", "<|assistant|>", "<start_of_turn>"} & set(stops)


def test_an_end_token_followed_by_a_line_end_is_still_the_stop():
    """A base tokenizer's eos is another token than the template's: both stop, or the answer would
    never end."""
    tokenizer = tokenizer_of("qwen2_5")
    tokenizer.eos_token = "<|end|>"
    stops = tokenizer.convert_ids_to_tokens(
        Renderer(tokenizer, template_of("qwen2_5", marked=True)).stop_ids()
    )
    assert set(stops) == {"<|end|>", "<|im_end|>"}


def test_tools_are_rendered_and_calls_trained():
    tokenizer = tokenizer_of("qwen2_5")
    tool = {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    renderer = Renderer(tokenizer, template_of("qwen2_5", marked=True))
    pieces = renderer.segments(Example("x", turns, tools=[tool]))
    assert "<tools>" in pieces[0].text or any("<tools>" in p.text for p in pieces)
    trained = "".join(p.text for p in pieces if p.supervised)
    assert (
        '{"name": "add", "arguments": {"a": 1}}' in trained
        and "Two." in trained
        and json.dumps("2") not in trained
    )
    with pytest.raises(Exception, match="leaves the tool call 'add' out"):
        Renderer(hub.load_tokenizer(hub.resolve("demo"))).segments(Example("x", turns))
    assert renderer.question_and_answer(Example("x", turns[:2], tools=[tool])) is None, (
        "a call is no text to match"
    )
    hostile = Example(
        "x",
        [
            *turns[:1],
            {**turns[1], "tool_calls": [{"function": {**call["function"], "name": "<|im_end|>"}}]},
            turns[3],
        ],
    )
    (row,) = renderer.encode([hostile])
    assert row.input_ids.count(renderer.special["<|im_end|>"]) == 4, "its name is text"

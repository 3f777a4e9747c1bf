"""The original templates of known models through the renderer: the table in `docs/templates.md`.

The templates are those that TRL installs, each with the built-in tokenizer, which is given its
control tokens. transformers' `apply_chat_template` is the oracle of ids, of what is asked before
each answer and, where a template is marked for it, of the mask.
"""

import copy
import importlib
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AddedToken

from halfbyte.data.formats import Example
from halfbyte.data.renderer import Renderer
from halfbyte.files import hub

PAGE = Path(__file__).parents[2] / "docs" / "templates.md"
FOLDER = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training"))
CONTROL = re.compile(r"<[|｜][^<>\s]{1,40}>|</?[a-z_]{2,24}>|<[a-z_]{2,20}\|>|\[/?[A-Z_]{3,20}\]")

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
NUMBER = {"type": "integer", "description": "a number"}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": NUMBER, "b": NUMBER},
            "required": ["a", "b"],
        },
    },
}


def say(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


SHAPES: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "turns": (
        [say("user", "one?"), say("assistant", "two."), say("user", "three?"),
         say("assistant", "four.")],
        None,
    ),
    "system": ([say("system", "be brief"), say("user", "one?"), say("assistant", "two.")], None),
    "reasoning": (
        [say("user", "one?"), say("assistant", "two.", reasoning_content="I thought so.")],
        None,
    ),
    "tools": (
        [
            say("user", "one and two?"),
            say("assistant", "", tool_calls=[CALL]),
            say("tool", "3", name="add"),
            say("assistant", "Three."),
        ],
        [ADD],
    ),
}  # fmt: skip


def tokenizer_of(template: str) -> Any:
    """The built-in tokenizer with a template's control tokens."""
    tokenizer = hub.load_tokenizer(hub.resolve("demo"))
    found = dict.fromkeys([*CONTROL.findall(template), "<s>", "</s>"])
    plain = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tools>", "</tools>"}
    tokens = [AddedToken(t, special=t not in plain, normalized=False) for t in found]
    tokenizer.add_tokens(tokens)
    tokenizer.bos_token = "<s>"
    ends = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|end|>", "<|return|>")
    tokenizer.eos_token = next((end for end in ends if end in found), "</s>")
    tokenizer.chat_template = template
    return tokenizer


def asked_as(tokenizer: Any, messages: list[Any], tools: Any, **more: Any) -> list[int]:
    return tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **more)


def outcome(name: str, shape: str) -> str:
    """A cell; raises where something differs."""
    template = (FOLDER / f"{name}.jinja").read_text()
    tokenizer = tokenizer_of(template)
    renderer = Renderer(tokenizer, template)
    messages, tools = SHAPES[shape]
    try:
        rows, bad = renderer.encode_each([Example("x", messages, tools=tools)])
        if bad:
            return "refused: " + re.sub(r"\s+", " ", bad[0].what)[:70]
        answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        trained = answers if len(rows) == 1 else [answers[i] for i in range(-len(rows), 0)]
        runs = 0
        for number, row in enumerate(rows):
            until = messages if len(rows) == 1 else messages[: trained[number] + 1]
            ids = asked_as(tokenizer, until, tools)
            # where the next role's token is an answer's end, the last answer has one as well
            more = row.input_ids[len(ids) :]
            assert row.input_ids[: len(ids)] == ids and len(more) <= 1, "ids"
            assert set(more) <= set(renderer.stop_ids()), "ids"
            runs += check_mask(tokenizer, renderer, row, until, tools)
        for k in trained:
            prompt = asked_as(tokenizer, messages[:k], tools, add_generation_prompt=True)
            assert renderer.prompt_ids(messages[:k], tools) == prompt, f"what asks for turn {k}"
        assert runs >= len(trained), f"{runs} answers trained of {len(trained)}"
    finally:
        renderer.rest()
    said = "same" if len(rows) == 1 else f"{len(rows)} rows"
    lost = left_out(renderer)
    return said + (f"; unwritten: {', '.join(lost)}" if lost else "")


def left_out(renderer: Renderer) -> list[str]:
    found = [line.rpartition(": ")[2] for line in renderer.noticed if "does not write" in line]
    return sorted(found)


def check_mask(tokenizer: Any, renderer: Renderer, row: Any, messages: Any, tools: Any) -> int:
    """That what is trained begins with an answer and ends with an end; how many answers."""
    place, runs = 0, 0
    for flag, group in itertools.groupby(row.loss_mask):
        count = len(list(group))
        ids, place = row.input_ids[place : place + count], place + count
        if not flag:
            continue
        runs += 1
        text = tokenizer.decode(ids)
        said = [m["content"] for m in messages if m["role"] == "assistant" and m["content"]]
        begins = (*said, "<", "[", "{", "I thought", "add", "to=", "commentary", "analysis")
        assert text.strip().startswith(begins), f"trained from {text[:40]!r}"
        assert any(i in renderer.stop_ids() for i in ids[-2:]) or place < len(row.input_ids), (
            f"trained to {text[-20:]!r}"
        )
        questions = [m["content"] for m in messages if m["role"] != "assistant"]
        assert not any(q in text for q in questions if len(q) > 1), f"trained: {text!r}"
    return runs


@pytest.mark.slow
def test_the_table_of_known_templates():
    lines, wrong = [], []
    for name in NAMES:
        cells = []
        for shape in SHAPES:
            try:
                cells.append(outcome(name, shape))
            except AssertionError as error:
                wrong.append(f"{name}, {shape}: {str(error).splitlines()[0]}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    assert not wrong, "\n".join(wrong)
    page = PAGE.read_text()
    absent = [line for line in lines if line not in page]
    assert not absent, f"{PAGE} lacks:\n" + "\n".join(absent)


KNOWN_THERE = {
    "qwen3": ("qwen3", "Qwen3Renderer"),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLRenderer"),
    "qwen3_5_think": ("qwen35", "Qwen35Renderer"),
    "qwen3_6": ("qwen36", "Qwen36Renderer"),
    "qwen3_8": ("qwen38", "Qwen38Renderer"),
    "deepseekv3": ("deepseek_v3", "DeepSeekV3Renderer"),
    "deepseek_r1_distill": ("deepseek_r1", "DeepSeekR1Renderer"),
    "glm4moe": ("glm45", "GLM45Renderer"),
    "llama3_1": ("llama_3", "Llama3Renderer"),
    "nemotron_3_nano": ("nemotron3", "Nemotron3Renderer"),
    "gemma4_v5": ("gemma4", "Gemma4Renderer"),
}
"""What the package `renderers` has, written by hand and without a template: module and class."""
FIRST_AND_LAST = {
    "llama3_1": ("<|begin_of_text|>", None),
    "gemma4_v5": ("<bos>", None),
    "deepseekv3": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
    "deepseek_r1_distill": ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"),
}


@pytest.fixture(scope="module")
def renderers_package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    place = tmp_path_factory.mktemp("renderers")
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(place)]
    done = subprocess.run([*command, "renderers==0.1.12", "httpx"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package renderers cannot be installed here: {done.stderr[-200:]}")
    sys.path.append(str(place))  # behind our own
    yield
    sys.path.remove(str(place))


def theirs_of(name: str, tokenizer: Any) -> Any:
    """Their renderer; the tokenizer is given its control tokens one by one, as it asks for them."""
    module, kind = KNOWN_THERE[name]
    made = getattr(importlib.import_module(f"renderers.{module}"), kind)
    while True:
        try:
            return made(tokenizer)
        except AssertionError as error:
            (token, *_) = re.findall(r"'([^']+)'", str(error))
            assert tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)])


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN_THERE)
def test_renderers_without_templates_agree(name: str, renderers_package: None):
    """Ids as theirs; what is trained of an answer begins where the prompt for it ends, and ends
    with the last token that a model would say, by their account."""
    template = (FOLDER / f"{name}.jinja").read_text()
    tokenizer = tokenizer_of(template)
    for what, token in zip(("bos_token", "eos_token"), FIRST_AND_LAST.get(name, ()), strict=False):
        if token:
            tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)])
            setattr(tokenizer, what, token)
    them, renderer, compared = theirs_of(name, tokenizer), Renderer(tokenizer, template), 0
    for messages, tools in SHAPES.values():
        rows, bad = renderer.encode_each([Example("x", messages, tools=tools)])
        if bad:
            continue
        answers = [i for i, each in enumerate(messages) if each["role"] == "assistant"]
        for number, row in enumerate(rows):
            chosen = answers if len(rows) == 1 else [answers[number - len(rows)]]
            until = messages if len(rows) == 1 else messages[: chosen[0] + 1]
            made = them.render(copy.deepcopy(until), tools=tools)
            assert list(made.token_ids) == row.input_ids[: len(made.token_ids)]
            expected = [False] * len(row.input_ids)
            for turn in chosen:
                prompt = renderer.prompt_ids(until[:turn], tools)
                start = len(os.path.commonprefix([prompt, row.input_ids]))  # noqa: RUF071 (ids)
                said = [
                    place
                    for place, (sampled, index) in enumerate(
                        zip(made.sampled_mask, made.message_indices, strict=True)
                    )
                    if sampled and index == turn
                ]
                expected[start : said[-1] + 1] = [True] * (said[-1] + 1 - start)
            # an end by the next role's token behind the last answer, which they leave out
            ours = row.loss_mask[: len(made.token_ids)]
            assert ours == expected[: len(made.token_ids)]
            compared += 1
    renderer.rest()
    assert compared >= 3

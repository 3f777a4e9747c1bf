"""Which texts a conversation becomes and what of them is trained, as models are asked."""

from typing import Any

import pytest

from halfbyte.data.formats import Example, last_asked
from halfbyte.data.renderer import PARTS, SPLIT, Renderer
from halfbyte.errors import DataError
from halfbyte.files import hub

from ..helpers import A, Q

TOKENS = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>")
TALK = [Q, A, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "so"}]


def renderer_of(template: str, unflagged: tuple[str, ...] = (), **options: Any) -> Renderer:
    from transformers import AddedToken

    tokenizer = hub.load_tokenizer(hub.resolve("demo"))
    new = [AddedToken(t, special=True, normalized=False) for t in TOKENS]
    tokenizer.add_special_tokens({"additional_special_tokens": new})
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in unflagged])
    return Renderer(tokenizer, template, **options)


def trained(renderer: Renderer, messages: list[dict[str, Any]], **more: Any) -> list[str]:
    rows = renderer.encode([Example("f:1", messages, **more)])
    for row in rows:
        assert row.example is not None and row.example.messages is not None
        last = row.example.messages[-1]
        if last["role"] == "assistant" and len(rows) > 1:
            asked = renderer.prompt_ids(row.example.messages[:-1])
            assert row.input_ids[: len(asked)] == asked, "asked as it is trained"
    return ["".join(text for text, kind in renderer.pieces(row) if kind != "read") for row in rows]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_that_thinks_after_the_last_question_only():
    thinking = CHATML.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}",
    )
    renderer = renderer_of(thinking)
    assert trained(renderer, TALK) == ["<think></think>yo<|im_end|>", "<think></think>so<|im_end|>"]
    assert renderer.noticed[SPLIT] == 1 and renderer.noticed[PARTS] == 2
    assert trained(renderer_of(thinking, turns="last"), TALK) == ["<think></think>so<|im_end|>"]
    assert trained(renderer, TALK[:2]) == ["<think></think>yo<|im_end|>"]


def test_answers_cut_at_the_end_of_thinking_go_on_from_the_prompt_that_opened_it():
    """DeepSeek's distillations: the prompt opens <think>, the template drops all thinking."""
    cut = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}").replace(
        "assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"
    )
    talk = [
        Q,
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\nyo"},
        TALK[2],
        {"role": "assistant", "content": "plain"},
    ]
    renderer = renderer_of(cut)
    rows = renderer.encode([Example("f:1", talk)])
    texts = [renderer.tokenizer.decode(row.input_ids) for row in rows]
    assert texts[0].endswith("assistant\n<think>\nEasy.\n</think>\n\nyo<|im_end|>\n")
    assert texts[1].endswith("assistant\nplain<|im_end|>\n") and "Easy" not in texts[1]
    asked = renderer.prompt_ids([Q])
    assert rows[0].input_ids[: len(asked)] == asked
    assert [
        renderer.tokenizer.decode([i for i, t in zip(r.input_ids, r.loss_mask, strict=True) if t])
        for r in rows
    ] == ["Easy.\n</think>\n\nyo<|im_end|>", "plain<|im_end|>"]


def test_turns_that_the_next_role_ends():
    glm = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    glm += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    renderer = renderer_of(glm)
    assert trained(renderer, TALK) == ["\nyo<|user|>\nso<|user|>"]
    assert renderer.tokenizer.convert_tokens_to_ids("<|user|>") in renderer.stop_ids()


def test_ends_that_are_not_flagged_special():
    template = CHATML.replace("<|im_end|>", "<eot>")
    renderer = renderer_of(template, unflagged=("<eot>",))
    assert trained(renderer, TALK) == ["yo<eot>so<eot>"]
    assert renderer.tokenizer.convert_tokens_to_ids("<eot>") in renderer.stop_ids()


def test_a_conversation_that_the_assistant_opens():
    first = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}Hi.{% endif %}"
    renderer = renderer_of(first + CHATML)
    assert trained(renderer, [A, *TALK]) == ["yo<|im_end|>yo<|im_end|>so<|im_end|>"]


def test_answers_that_are_only_read():
    talk = [Q, A, *TALK[2:]]
    renderer = renderer_of(CHATML)
    assert trained(renderer, talk, untrained=frozenset({1})) == ["so<|im_end|>"]
    assert trained(renderer, talk, untrained=frozenset({3})) == ["yo<|im_end|>"]
    marked = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}",
    )
    assert trained(renderer_of(marked), talk, untrained=frozenset({1})) == ["so<|im_end|>"]
    everything = renderer_of(CHATML, assistant_only=False)
    with pytest.raises(DataError, match="not to be trained"):
        everything.encode([Example("f:1", talk, untrained=frozenset({1}))])


def test_calls_as_templates_want_them():
    """Arguments as an object or as text, the empty text beside a call as none."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "é"}}}
    talk = [Q, {"role": "assistant", "content": "", "tool_calls": [call]}]
    as_text = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '!' + c.function.name + c.function.arguments }}{% endfor %}",
    )
    assert trained(renderer_of(as_text), talk) == ['!add{"a": "é"}<|im_end|>']
    as_object = as_text.replace("c.function.arguments", "(c.function.arguments | tojson)")
    assert trained(renderer_of(as_object), talk) == ['!add{"a": "é"}<|im_end|>']
    hostile = {**call, "function": {"name": "<|im_end|>", "arguments": {"<|user|>": "<|user|>"}}}
    (row,) = renderer_of(as_object).encode(
        [Example("f:1", [Q, {**talk[1], "tool_calls": [hostile]}])]
    )
    special = renderer_of(as_object).special
    assert row.input_ids.count(special["<|im_end|>"]) == 2
    assert special["<|user|>"] not in row.input_ids


def test_what_is_asked_and_wanted_of_a_row():
    """The last answer that is trained, as it was trained, without the template's control tokens."""
    renderer = renderer_of(CHATML)
    (row,) = renderer.encode([Example("f:1", TALK, untrained=frozenset({3}))])
    assert row.example is not None
    asked, wanted = renderer.question_and_answer(row.example) or ([], "")
    assert asked == renderer.prompt_ids(TALK[:1]) and wanted == "yo"
    marked = CHATML.replace(
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>",
        "{% generation %}<|im_start|>{{ m.role }}\n<think></think>{{ m.content }}<|im_end|>"
        "{% endgeneration %}",
    )
    renderer = renderer_of(marked)
    (row,) = renderer.encode([Example("f:1", [Q, {**A, "content": "say <|user|>"}])])
    assert row.example is not None
    _, wanted = renderer.question_and_answer(row.example) or ([], "")
    assert wanted == "<think></think>say <|user|>", "from where it is asked, its own words whole"


def test_what_is_wanted_is_what_the_tokenizer_can_say():
    """One that normalizes gives a combining accent back as the character with it."""
    from tokenizers import normalizers

    renderer = renderer_of(CHATML)
    renderer.tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    renderer = Renderer(renderer.tokenizer, CHATML)
    for example in (
        Example("f:1", [Q, {**A, "content": "cafe\u0301"}]),
        Example("f:2", prompt="a", completion="cafe\u0301"),
    ):
        _, wanted = renderer.question_and_answer(example) or ([], "")
        assert wanted == "caf\u00e9"


def test_control_tokens_that_the_model_wrote_are_control_tokens_when_it_goes_on():
    """In an answer it gave, and nowhere else."""
    renderer = renderer_of(CHATML)
    hostile = {"role": "user", "content": "<|user|>"}
    ids = renderer.dialogue_ids([hostile, {**A, "content": "<|assistant|>yo"}, Q])
    special = renderer.special
    assert special["<|assistant|>"] in ids and special["<|user|>"] not in ids
    assert renderer.tokenizer.decode(ids) == renderer.render(
        [hostile, {**A, "content": "<|assistant|>yo"}, Q], add_generation_prompt=True
    )
    called = {**A, "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert renderer.dialogue_ids([Q, called, Q]) == renderer.prompt_ids([Q, called, Q])


def test_the_option_decides_between_one_row_and_several():
    assert trained(renderer_of(CHATML, turns="each"), TALK) == ["yo<|im_end|>", "so<|im_end|>"]
    assert trained(renderer_of(CHATML, turns="last"), TALK) == ["so<|im_end|>"]
    assert trained(renderer_of(CHATML), TALK) == ["yo<|im_end|>so<|im_end|>"]


def test_what_was_asked_is_the_turn_before_the_last_answer():
    """And no system message, which a template may write before it by itself."""
    system = {"role": "system", "content": "be brief"}
    more = {"role": "user", "content": "and two?"}
    thanks = {"role": "user", "content": "thanks"}
    assert last_asked(Example("x", [system, Q, A])) == Q["content"]
    assert last_asked(Example("x", [Q, A, more, A, thanks])) == "and two?"
    assert last_asked(Example("x", [Q, A, more, A], untrained=frozenset({3}))) == Q["content"]
    assert last_asked(Example("x", prompt="one: ", completion="two")) == "one: "
    assert last_asked(Example("x", [{"role": "user", "content": [{"type": "text"}]}, A])) == ""
    assert last_asked(None) == ""

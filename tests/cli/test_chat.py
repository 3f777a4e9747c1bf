"""``halfbyte chat``: one answer, a pipe, a dialogue; what was asked decides."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.cli import run
from halfbyte.engine import generate
from halfbyte.engine.generate import Answer
from halfbyte.files import hub
from halfbyte.run.load import run_renderer

EXACT = ["--load_in_4bit", "false", "--dtype", "float32", "--max_new_tokens", "6"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the model was asked, without asking it."""
    found: list[Any] = []

    def answer(model: Any, renderer: Any, prompt: Any, *, emit: Any, **settings: Any) -> Answer:
        generate.room_for(model, renderer.prompt_ids(prompt), 1)
        settings["renderer"] = renderer
        found.append((prompt if isinstance(prompt, str) else [dict(t) for t in prompt], settings))
        emit("yes")
        return Answer("yes", True, "yes")

    monkeypatch.setattr(generate, "answer", answer)
    return found


def says(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[dict[str, Any], str]:
    """(the JSON of a chat, what it said beside it)."""
    capsys.readouterr()
    assert run(["chat", *words, "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_of_one_answer_stdout_takes_that_alone(capsys: pytest.CaptureFixture[str]):
    found, _ = says(capsys, "demo", "--prompt", "Tea?", *EXACT)
    assert run(["chat", "demo", "--prompt", "Tea?", *EXACT]) == 0
    captured = capsys.readouterr()
    assert captured.out == found["answer"] + "\n"
    assert "is held in float32" in captured.err and "next: halfbyte" in captured.err
    assert found["sampling"]["top_k"] == 0 and found["sampling"]["max_new_tokens"] == 6


def test_a_pipe_is_one_prompt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, asked: list[Any]
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("first line\n\n  second line\n"))
    found, _ = says(capsys, "demo", *EXACT)
    assert found["prompt"] == asked[0][0][0]["content"] == "first line\n\n  second line"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffa list:\n\n"))
    assert says(capsys, "demo", *EXACT)[0]["prompt"] == "a list:\n"
    for pipe in (io.StringIO(""), io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8")):
        monkeypatch.setattr(sys, "stdin", pipe)
        assert run(["chat", "demo", *EXACT]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--prompt", "caf\udce9"], "no text in UTF-8"),
        (["--prompt", "a", "--system", "caf\udce9"], "no text in UTF-8"),
        (["--prompt", "a", "--stop", ""], "an empty text"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    capsys: pytest.CaptureFixture[str], asked: list[Any], words: list[str], said: str
):
    assert run(["chat", "demo", *words, *EXACT]) == 2 and not asked
    assert said in capsys.readouterr().err


def test_a_template_that_opens_no_answer_is_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, asked: list[Any]
):
    shutil.copytree(hub.resolve("demo"), tmp_path / "model")
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text(template.read_text().partition("{%- if add_generation_prompt")[0])
    _, said = says(capsys, str(tmp_path / "model"), "--prompt", "a", *EXACT)
    assert "no prompt for an answer" in said
    template.write_text(  # a question's own end opens the answer
        "{% for m in messages %}{{ '[Q] ' + m.content + ' [/Q]' if m.role == 'user' else "
        "m.content + '<|end|>' }}{% endfor %}"
    )
    _, said = says(capsys, str(tmp_path / "model"), "--prompt", "a", *EXACT)
    assert "prompt for an answer" not in said


def test_what_the_template_leaves_out_is_not_lost_in_silence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, asked: list[Any], typed: Any
):
    """A system message is refused; earlier questions are said to be gone, once."""
    shutil.copytree(hub.resolve("demo"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "<|user|>{{ messages[-1].content }}<|end|>\n<|assistant|>"
    )
    model = str(tmp_path / "model")
    assert run(["chat", model, "--prompt", "a", "--system", "Be brief", *EXACT]) == 2 and not asked
    assert "leaves the system message out" in capsys.readouterr().err
    typed("first", "second", "third", "")
    _, said = says(capsys, model, *EXACT)
    assert len(asked) == 3 and said.count("leaves earlier questions out") == 1


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def type_lines(*lines: str) -> None:
        monkeypatch.setattr(sys, "stdin", Terminal("".join(line + "\n" for line in lines)))

    yield type_lines


def test_a_dialogue_keeps_what_is_typed(
    capsys: pytest.CaptureFixture[str], asked: list[Any], typed: Any
):
    typed("  spaces  ", "two \\", "lines", "")
    found, _ = says(capsys, "demo", "--system", "", *EXACT)
    turns = [(turn["role"], turn["content"]) for turn in found["messages"]]
    assert turns == [
        ("system", ""),
        ("user", "  spaces  "),
        ("assistant", "yes"),
        ("user", "two \nlines"),
        ("assistant", "yes"),
    ]
    assert asked[0][0][0] == {"role": "system", "content": ""}


def test_the_oldest_turns_go_where_the_context_is_full(
    capsys: pytest.CaptureFixture[str], asked: list[Any], typed: Any
):
    typed("tea " * 200, "bun " * 200, "egg", "")
    found, said = says(capsys, "demo", *EXACT)
    assert found["turns_dropped"] == 2 and "left out" in said
    assert [turn["content"][:3] for turn in asked[-1][0]] == ["bun", "yes", "egg"]
    assert run(["chat", "demo", "--prompt", "tea " * 600, *EXACT]) == 2


def test_options_of_sampling_reach_the_answer(
    capsys: pytest.CaptureFixture[str], asked: list[Any], tmp_path: Path
):
    words = [
        "--temperature",
        "0.5",
        "--top_k",
        "7",
        "--min_p",
        "0.1",
        "--repetition_penalty",
        "1.2",
    ]
    found, _ = says(capsys, "demo", "--prompt", "a", *words, "--stop", "x", "--stop", "\\n", *EXACT)
    assert asked[-1][1]["sampling"] == generate.Sampling(0.5, 1.0, 7, 0.1, 1.2)
    assert asked[-1][1]["stop"] == ["x", "\n"] == found["sampling"]["stop"]
    shutil.copytree(hub.resolve("demo"), tmp_path / "model")
    file = tmp_path / "model" / "generation_config.json"
    own = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    model = str(tmp_path / "model")
    says(capsys, model, "--prompt", "a", *EXACT)
    assert asked[-1][1]["sampling"] == generate.Sampling()
    words = ["--generation_config", "model", "--top_k", "3"]
    _, said = says(capsys, model, "--prompt", "a", *words, *EXACT)
    assert asked[-1][1]["sampling"] == generate.Sampling(0.6, 0.9, 3)
    assert "sampling as the base says" in said


def test_control_tokens_that_nobody_read_stay_in_the_answer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A mark that opens a call tells it from an ordinary answer."""
    said = Answer('{"city": "Rome"}', True, '<|system|>{"city": "Rome"}')
    monkeypatch.setattr(generate, "answer", lambda *a, **k: said)
    assert says(capsys, "demo", "--prompt", "a", *EXACT)[0]["answer"] == said.marked


STRICT = {
    "ids": "{% for m in messages %}{% for c in m.tool_calls or [] %}{% if c.id | length != 9 %}"
    "{{ raise_exception('ids have length 9') }}{% endif %}{{ c.function.name }}{% endfor %}"
    "{{ m.content }}{{ eos_token }}{% endfor %}",
    "alternate": "{% for m in messages %}{% if loop.index0 and m.role == 'user' and "
    "messages[loop.index0 - 1].tool_calls %}{{ raise_exception('a result first') }}{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    "{{ eos_token }}{% endfor %}",
}


@pytest.mark.parametrize("kind", STRICT)
def test_after_a_call_a_dialogue_goes_on(
    kind: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    typed: Any,
):
    """Some templates want an id of each call, some a tool's result before the next question
    (llama.cpp 10572)."""
    shutil.copytree(hub.resolve("demo"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(STRICT[kind])
    marked = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    asked: list[Any] = []

    def answer(model: Any, renderer: Any, prompt: Any, **settings: Any) -> Answer:
        asked.append(renderer.dialogue_ids(prompt))
        return Answer("", True, marked)

    monkeypatch.setattr(generate, "answer", answer)
    typed("first", "second", "")
    found, said = says(capsys, str(tmp_path / "model"), *EXACT)
    turn = found["messages"][1]
    if kind == "ids":
        (call,) = turn["tool_calls"]
        assert call["id"] == "call00000" and call["function"] == {"name": "f", "arguments": {}}
    else:
        assert turn == {"role": "assistant", "content": marked} and "kept as the answer's" in said
    assert len(asked) == 2


def test_a_model_without_a_template_says_which_is_used(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, asked: list[Any]
):
    shutil.copytree(hub.resolve("demo"), tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    _, said = says(capsys, str(tmp_path / "model"), "--prompt", "a", *EXACT)
    assert "no chat template of its own" in said
    _, said = says(capsys, "demo", "--prompt", "a", *EXACT)
    assert "template" not in said


def test_today_is_today_and_a_base_may_have_moved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: list[Any]
):
    """A template of a user's is kept with its tags, and delivered without."""
    base = tmp_path / "base"
    shutil.copytree(hub.resolve("demo"), base)
    template = (base / "chat_template.jinja").read_text()
    asks = tmp_path / "asks.jinja"
    asks.write_text("{{ '<|system|>' + strftime_now('%Y') + '<|end|>\n' }}" + template)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Which year?", "output": "now"}\n' * 4)
    made = halfbyte.train(
        str(base),
        str(tmp_path / "rows.jsonl"),
        output_dir=str(tmp_path / "run"),
        chat_template=str(asks),
        max_steps=1,
        num_samples=0,
    )
    delivered = (made.adapter / "chat_template.jinja").read_text()
    assert "strftime_now" in delivered and "generation" not in delivered.replace(
        "add_generation_prompt", ""
    )
    tags = json.loads((made.path / "chat_templates.json").read_text())["default"]
    assert tags == asks.read_text().replace("\r\n", "\n")
    info = made.info()
    for file in ("run.json", "run.json.copy"):
        if (made.path / file).is_file():
            (made.path / file).unlink()
    made.write_info({**info, "clock": "1999-05-05T10:00:00"})
    shutil.move(base, tmp_path / "elsewhere")
    assert run(["chat", str(made.path), "--prompt", "a", "--max_new_tokens", "2"]) == 6
    assert "--base" in capsys.readouterr().err
    where = ["--base", str(tmp_path / "elsewhere")]
    for words in ([], ["--clock", "run"]):
        says(capsys, str(made.path), "--prompt", "a", *words, *where)
    seen = [settings["renderer"].render(prompt) for prompt, settings in asked]
    assert ["1999" in text for text in seen] == [False, True]


def test_an_answer_goes_on_from_how_it_was_begun(capsys: pytest.CaptureFixture[str]):
    """The likeliest answer, begun with its own first word, is the same."""
    whole, _ = says(capsys, "demo", "--prompt", "Tea?", *EXACT)
    first = whole["answer"].split()[0]
    begun, _ = says(capsys, "demo", "--prompt", "Tea?", *EXACT, "--answer_prefix", first)
    assert begun["answer"].startswith(whole["answer"]) and begun["answer_prefix"] == first
    lines, _ = says(capsys, "demo", "--prompt", "Tea?", *EXACT, "--answer_prefix", "</s>a\\nb")
    assert lines["answer"].startswith("</s>a\nb"), "control tokens are shown, but the end"


SWITCH = """\
{%- for m in messages -%}[{{ m.role }}] {{ m.content }}{{ eos_token }}{%- endfor -%}
{%- if add_generation_prompt -%}[assistant] {% if not thinking %}<think></think>{% endif %}
{%- endif -%}
"""


def test_switches_of_a_template_are_kept_and_can_be_turned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    template = tmp_path / "switch.jinja"
    template.write_text(SWITCH)
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    given: dict[str, Any] = {"chat_template": str(template), "eval_split": 0, "num_samples": 0}
    trained = halfbyte.train(
        model="demo",
        data=rows,
        output_dir=str(tmp_path / "run"),
        chat_template_kwargs={"thinking": True},
        max_steps=1,
        rehearse=False,
        **given,
    )
    asking = [{"role": "user", "content": "a"}]
    as_trained = run_renderer(trained, trained.config())
    assert as_trained.render(asking, add_generation_prompt=True).endswith("[assistant] ")
    found, _ = says(capsys, str(trained.path), "--prompt", "a", "--max_new_tokens", "2")
    assert found["chat_template_kwargs"] == {"thinking": True}
    off = ("--chat_template_kwargs", '{"thinking": false}', "--max_new_tokens", "2")
    found, _ = says(capsys, str(trained.path), "--prompt", "a", *off)
    assert found["chat_template_kwargs"] == {"thinking": False}


@pytest.mark.parametrize(
    ("given", "named"),
    [('{"thinkin": true}', "does not read"), ('{"messages": []}', "messages"), ("{", "mapping")],
)
def test_a_switch_that_nothing_reads_is_refused(given: str, named: str, capsys: Any):
    assert run(["chat", "demo", "--prompt", "a", "--chat_template_kwargs", given]) == 2
    assert named in capsys.readouterr().err

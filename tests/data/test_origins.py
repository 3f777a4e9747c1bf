"""Strings that know their origin: equal to plain strings in everything, through every template that
an installed package ships, whatever the row holds."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import trl

from halfbyte.data.origins import places
from halfbyte.data.template import Rendering, Request, TemplateProcess, variants
from halfbyte.data.tracked import TEMPLATE, Tracked, joined, origins_of, tojson

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "1", "b": [1, None]}}}
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}
CONTROL = re.compile(r"<[|｜]?[\w▁ ]+[|｜]?>|\[/?INST\]")


def tracked(text: str, place: int = 0) -> Tracked:
    return Tracked(text, [(len(text), place, 0)] if text else [])


def marked(text: str) -> list[tuple[str, int, int]]:
    """Every character with its place and number."""
    found = []
    for count, place, first in origins_of(text):
        found += [(place, first + i if place != TEMPLATE else 0) for i in range(count)]
    assert len(found) == len(text)
    return [(c, *origin) for c, origin in zip(str(text), found, strict=True)]


OPERATIONS: dict[str, Any] = {
    "slice": lambda s: s[2:-3],
    "step": lambda s: s[::-2],
    "index": lambda s: s[3],
    "strip": lambda s: s.strip(),
    "lstrip": lambda s: s.lstrip(" a"),
    "rstrip": lambda s: s.rstrip("\n "),
    "split": lambda s: s.split("</think>"),
    "split white space": lambda s: s.split(),
    "split once": lambda s: s.split(None, 1),
    "rsplit": lambda s: s.rsplit("a", 1),
    "splitlines": lambda s: s.splitlines(),
    "splitlines whole": lambda s: s.splitlines(True),
    "partition": lambda s: list(s.partition("a")),
    "rpartition": lambda s: list(s.rpartition("zz")),
    "replace": lambda s: s.replace("a", "<->"),
    "replace nothing": lambda s: s.replace("", "."),
    "replace two": lambda s: s.replace("a", "b", 2),
    "prefix": lambda s: s.removeprefix("  a"),
    "suffix": lambda s: s.removesuffix("\n"),
    "upper": lambda s: s.upper(),
    "longer": lambda s: (s + "ß").upper(),
    "title": lambda s: s.title(),
    "add": lambda s: "x" + s + "y",
    "times": lambda s: s * 3,
    "join": lambda s: s.join(["1", "2", "3"]),
    "zfill": lambda s: s.zfill(60),
    "json": lambda s: tojson({"k\n": [s, 1, None, True, {s: s}]}),
    "json indented": lambda s: tojson({"b": s, "a": [s, {}, []]}, indent=2, sort_keys=True),
    "json ascii": lambda s: tojson([s], ensure_ascii=True, separators=(",", ":")),
}
TEXT = '  a </think> "b"\\ é\u2028日😀 a\ta</think>\n'


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_give_what_strings_give_and_know_where_it_comes_from(name: str):
    found, plain = (OPERATIONS[name](value) for value in (tracked(TEXT), TEXT))
    assert found == plain and type(found) is (list if isinstance(plain, list) else Tracked)
    for part in found if isinstance(found, list) else [found]:
        for character, place, number in marked(part):
            if place != TEMPLATE and not name.startswith(("json", "longer", "upper", "title")):
                assert name == "zfill" or TEXT[number] == character
    if name == "json":
        assert json.loads(str(found)) == json.loads(
            json.dumps({"k\n": [TEXT, 1, None, True, {TEXT: TEXT}]})
        )


def test_joining_keeps_neighbours_together():
    text = tracked("abcdef")
    assert origins_of(joined([text[:2], text[2:4], "-", text[4:]])) == [
        (4, 0, 0),
        (1, TEMPLATE, 0),
        (2, 0, 4),
    ]


def conversations(words: list[str]) -> list[tuple[list[dict[str, Any]], list[Any] | None]]:
    """A few shapes, filled with words in turn."""
    given = iter(words * 8)

    def say(role: str, **more: Any) -> dict[str, Any]:
        return {"role": role, "content": next(given), **more}

    think = {"role": "assistant", "content": f"<think>\n{next(given)}\n</think>\n\n{next(given)}"}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": next(given)}}}
    return [
        ([say("user"), say("assistant"), say("user"), say("assistant")], None),
        ([say("system"), say("user"), think], None),
        ([say("user"), say("assistant", reasoning_content=next(given))], None),
        (
            [
                say("user"),
                {"role": "assistant", "content": "", "tool_calls": [call]},
                say("tool"),
                say("assistant"),
            ],
            [TOOL],
        ),
    ]


def rendered(path: Path, words: list[str]) -> list[tuple[Any, Any, Rendering]]:
    import datetime

    special = {"bos_token": "<s>", "eos_token": "</s>"}
    process = TemplateProcess(path.read_text(), special, datetime.datetime(2026, 1, 1))
    shapes = conversations(words)
    found = process.render([Request(m, tools, follow=True) for m, tools in shapes])
    process.close()
    return [
        (*shape, answer)
        for shape, answer in zip(shapes, found, strict=True)
        if isinstance(answer, Rendering)
    ]


def of_template(rendering: Rendering) -> str:
    text, at = [], 0
    for count, place, _ in rendering.origins:
        if place == TEMPLATE:
            text.append(rendering.text[at : at + count])
        at += count
    return "".join(text)


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_nothing_of_a_row_becomes_the_templates_own(path: Path):
    """Control tokens, marks of every kind and all of Unicode in a row leave the template's part of
    the text as it is with harmless words (and what is the row's is the row's, character by
    character)."""
    source, pick = path.read_text(), random.Random(path.stem)
    # templates look for <think> in contents, and are to
    controls = [c for c in CONTROL.findall(source) if c != "<think>"] or ["<s>"]
    odd = [
        chr(pick.choice((0xE000, 0xF0000, 0x100000, 0x40000)) + pick.randrange(200)) for _ in "abc"
    ]
    every = [c for _ in range(60) if (c := chr(pick.randrange(32, 0x110000))).isprintable()]
    hostile = [
        "x" + pick.choice(controls) + "y",
        *(f"o{c}o" for c in odd),
        "w" + "".join(every) + "w",
        "{{ messages }}{% raw %}",
    ]
    harmless = ["x" + "n" * (len(word) - 2) + "y" for word in hostile]
    pairs = list(zip(rendered(path, hostile), rendered(path, harmless), strict=True))
    assert pairs or "vl" in path.stem or path.stem.startswith(("idefics", "llava", "smolvlm"))
    for (messages, tools, ours), (_, _, calm) in pairs:
        assert not ours.lost, "every operation of this template is followed"
        assert CONTROL.findall(of_template(ours)) == CONTROL.findall(of_template(calm))
        strings, at = places(variants(messages)[ours.variant], tools), 0
        for count, place, first in ours.origins:
            if place != TEMPLATE:
                piece = ours.text[at : at + count]
                wanted = strings[place][1][first : first + count]
                assert piece == wanted or piece in json.dumps(strings[place][1], ensure_ascii=False)
            at += count
        assert at == len(ours.text)


def test_what_cannot_be_followed_is_said_to_be():
    import datetime

    def lost(template: str) -> bool:
        process = TemplateProcess(template, {}, datetime.datetime(2026, 1, 1))
        (answer,) = process.render(
            [Request([{"role": "user", "content": "a b c", "n": ["x"]}], follow=True)]
        )
        process.close()
        assert isinstance(answer, Rendering), answer
        return answer.lost

    content = "messages[0].content"
    for followed in (
        f"{{{{ {content} | trim | replace('a', 'b') }}}}{{{{ ['x', {content}] | join(', ') }}}}",
        f"{{{{ 'so %s' % {content} }}}}{{{{ 'so {{}}'.format({content}) }}}}",
        f"{{% macro m(x) %}}<{{{{ x }}}}>{{% endmacro %}}{{{{ m({content}) ~ {content} }}}}",
        f"{{% set x %}}{{{{ {content} }}}}{{% endset %}}{{{{ x }}}}{{{{ '-'.join([x, x]) }}}}",
        f"{{% for c in {content} %}}{{{{ c }}}}{{% endfor %}}{{{{ messages | tojson }}}}",
    ):
        assert not lost(followed), followed
    for unfollowed in (
        f"{{{{ {content} | wordwrap(2) }}}}",
        f"{{{{ {content} | urlencode }}}}",
        "{{ messages }}",
        f"{{{{ '%5s' % {content} }}}}",
    ):
        assert lost(unfollowed), unfollowed

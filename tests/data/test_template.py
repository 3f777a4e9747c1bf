"""Tests of `data.template`."""

import os
import signal
import sys
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from halfbyte.data import template as templates
from halfbyte.data.renderer import Renderer
from halfbyte.data.template import Rendering, Request, TemplateProcess
from halfbyte.errors import DataError
from halfbyte.files import hub

from ..helpers import TURNS


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "still running after",
        ),
        ("{{ 'a' * 400000000 }}", "memory|characters"),
        (
            "{% set x = namespace(s='aaaaaaaaaa') %}{% for i in range(40) %}{% set x.s = x.s + "
            "x.s %}{% endfor %}",
            "memory",
        ),
        ("{{ 'ab' * 9000000 }}", "characters, more than"),
        ("{{ messages.__class__.__mro__ }}", "unsafe|Undefined|undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for", "unexpected|expected|Unexpected"),
    ],
)
def test_hostile_templates_end_as_an_error(
    template: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    from halfbyte.data import template as module

    monkeypatch.setattr(module, "SECONDS", 1.5)
    renderer = Renderer(hub.load_tokenizer(hub.resolve("demo")), template)
    with pytest.raises(DataError, match=r"chat template (refused|cannot be read)") as caught:
        renderer.render(TURNS)
    import re

    assert re.search(message, caught.value.found), caught.value.found
    healthy = Renderer(hub.load_tokenizer(hub.resolve("demo")))
    assert healthy.render(TURNS).endswith("a<|end|>\n"), "others go on"


def test_a_template_sees_a_clock_that_stands_still(reliable_inputs: Path):
    from datetime import datetime

    renderer = Renderer(
        hub.load_tokenizer(hub.resolve("demo")),
        "{{ strftime_now('%Y-%m-%d') }}",
        clock=datetime(2001, 2, 3),
    )
    assert renderer.render(TURNS) == "2001-02-03"


def test_a_process_that_ended_with_its_thread_is_started_again():
    """The system ends a child with the thread that made it, not with the process."""
    template = TemplateProcess("{{ messages[0].content }}", {}, datetime(2026, 1, 1))
    request = [Request([{"role": "user", "content": "a"}])]
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(template.render(request)))
    thread.start()
    thread.join()
    time.sleep(0.2)
    found += template.render(request)
    assert [each.text for each in found] == ["a", "a"]
    template.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the child is forked")
def test_the_one_that_ends_the_process_is_blamed_and_no_other(monkeypatch: pytest.MonkeyPatch):
    """Of many that are sent together."""
    honest = templates._Program.render

    def render(self: Any, request: Request) -> Any:
        if request.messages[0]["content"] == "die":
            os._exit(1)
        return honest(self, request)

    monkeypatch.setattr(templates._Program, "render", render)
    template = TemplateProcess("{{ messages[0].content }}", {}, datetime(2026, 1, 1))
    contents = [*("a" for _ in range(70)), "die", *("b" for _ in range(70))]
    answers = template.render(
        [Request([{"role": "user", "content": content}]) for content in contents]
    )
    assert [isinstance(a, DataError) for a in answers] == [c == "die" for c in contents]
    template.close()


@pytest.mark.skipif(sys.platform != "linux", reason="others do not say what a process computed")
def test_a_process_that_was_stopped_with_its_parent_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    """Ctrl-Z and fg, or a machine that is busy with other things."""
    from halfbyte.data import template as module

    monkeypatch.setattr(module, "SECONDS", 0.5)
    template = TemplateProcess("{{ messages[0].content }}", {}, datetime(2026, 1, 1))
    request = [Request([{"role": "user", "content": "a"}])]
    template.render(request)
    os.kill(template._child, signal.SIGSTOP)
    threading.Timer(1.5, os.kill, (template._child, signal.SIGCONT)).start()
    (answer,) = template.render(request)
    assert isinstance(answer, Rendering) and answer.text == "a"


def test_what_a_script_gives_a_template_is_plain_values():
    given = {"given": Path("/"), "kind": 1}
    process = TemplateProcess("{{ given.name is defined }} {{ kind }}", given, datetime(2001, 2, 3))
    (found,) = process.render([Request([])])
    process.close()
    assert isinstance(found, Rendering) and found.text == "False 1"

"""Tests of `data.template`."""

from pathlib import Path

import pytest

from halfbyte.data.renderer import Renderer
from halfbyte.errors import (
    DataError,
)
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
    with pytest.raises(DataError, match="chat template refused") as caught:
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

"""Which template writes a conversation, and what identifies it."""

import os
from pathlib import Path

import pytest

from halfbyte.data.chat_template import (
    BUILTIN_TEMPLATE,
    builtin_template,
    read_template,
    refuse_unread,
    template_digest,
    templates_of,
)
from halfbyte.data.renderer import Renderer
from halfbyte.errors import DataError, UsageError
from halfbyte.files import hub

CHAT = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"


def test_templates_by_name_are_one_digest_in_any_order(tmp_path: Path, stories: Path):
    """A run with a template for tools finds it again in the files it was saved to."""
    tokenizer = hub.load_tokenizer(stories)
    tokenizer.chat_template = {"tool_use": "tools: " + CHAT, "default": CHAT, "empty": ""}
    assert list(templates_of(tokenizer)) == ["tool_use", "default"]
    renderer = Renderer(tokenizer)
    tool = {"type": "function", "function": {"name": "n"}}
    assert renderer._named([tool]) == "tool_use" and renderer._named(None) == "default"
    tokenizer.chat_template = renderer.chat_template
    tokenizer.save_pretrained(tmp_path)
    again = hub.load_tokenizer(tmp_path)
    assert template_digest(again.chat_template) == renderer.template_sha256
    assert Renderer(again).templates == renderer.templates
    assert template_digest(CHAT) != renderer.template_sha256 != template_digest(None)


def test_the_built_in_one_begins_as_the_tokenizer_does(stories: Path):
    """Llama's writes a beginning token, which its own template would have written as well."""
    tokenizer = hub.load_tokenizer(stories)
    tokenizer.chat_template = None
    assert templates_of(tokenizer) == {}
    starts = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert (
        builtin_template(tokenizer) == ("{{- bos_token -}}\n" if starts else "") + BUILTIN_TEMPLATE
    )
    assert builtin_template(tokenizer).startswith("{{- bos_token") is starts


def test_a_variable_that_no_template_names_is_refused():
    templates = {"default": "{{ enable_thinking }}", "tool_use": "{{ tools_in_user }}"}
    refuse_unread({"enable_thinking": False, "tools_in_user": 1}, templates)
    with pytest.raises(UsageError, match="thinking"):
        refuse_unread({"thinking": True}, templates)


def test_a_template_file_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "t.jinja").write_text("\ufeff" + CHAT)
    assert read_template(str(tmp_path / "t.jinja")) == CHAT
    os.mkfifo(tmp_path / "pipe.jinja")
    for place in (tmp_path / "none.jinja", tmp_path / "pipe.jinja", Path("/dev/zero"), tmp_path):
        with pytest.raises(DataError, match="chat template"):
            read_template(str(place))

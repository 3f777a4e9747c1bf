"""Which chat template writes a conversation: the tokenizer's own, by name, or the built-in one."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config.text_file import read_text_file
from ..errors import DataError, UsageError

BUILTIN_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role in ('system', 'developer') -%}{{ message.content + '\\n\\n' }}
{%- elif message.role == 'assistant' -%}\
{{ '### Assistant:\\n' + message.content + eos_token + '\\n' }}
{%- elif message.role == 'user' -%}{{ '### User:\\n' + message.content + '\\n' }}
{%- else -%}{{ '### ' + message.role | capitalize + ':\\n' + message.content + '\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Assistant:\\n' }}{%- endif -%}
"""
"""For tokenizers without a template: needs no new tokens."""


def templates_of(tokenizer: Any) -> dict[str, str]:
    """The templates of a tokenizer by name; "default" is the one without tools."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return {name: text for name, text in template.items() if text}
    return {"default": template} if template else {}


def refuse_unread(given: Mapping[str, Any], templates: Mapping[str, str]) -> None:
    """Raise UsageError for a variable that no template names."""
    for name in given:
        if not any(re.search(rf"\b{re.escape(name)}\b", text) for text in templates.values()):
            raise UsageError(
                f"chat_template_kwargs gives {name}, which the chat template does not read",
                ways_out=["leave it out", "or give a template that reads it with --chat_template"],
            )


def builtin_template(tokenizer: Any) -> str:
    """The built-in template, with the beginning token where this tokenizer itself writes one."""
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return ("{{- bos_token -}}\n" if starts else "") + BUILTIN_TEMPLATE


def read_template(path: str) -> str:
    """A template file given by the user.

    Raises:
        DataError: it cannot be read.
    """
    try:
        return read_text_file(Path(path).expanduser(), "the chat template")
    except UsageError as error:
        raise DataError(error.what, found=error.found) from error


def template_digest(chat_template: str | dict[str, str] | None) -> str:
    """sha256 of what a tokenizer's ``chat_template`` is, whatever the order of several."""
    named = isinstance(chat_template, dict)
    text = str(dict(sorted(chat_template.items())) if named else chat_template)
    return hashlib.sha256(text.encode()).hexdigest()

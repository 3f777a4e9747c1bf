"""Files that belong to a model: delivered as they are, in a form that others take."""

import json
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from halfbyte.files.companions import (
    companions,
    copy_companions,
    generation_settings,
    plain_jinja,
    write_templates,
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    (place / "additional_chat_templates").mkdir(parents=True)
    files = {
        "tokenizer.json": "{ }",
        "tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer",  "chat_template": "x"}',
        "tokenizer.model": "\x00binary",
        "merges.txt": "a b",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tool_use.jinja": "{{ tools }}",
        "LICENSE": "mine",
        "NOTICE.txt": "too",
        "model.safetensors": "weights",
        "config.json": "{}",
        "README.md": "theirs",
    }
    for name, text in files.items():
        (place / name).write_text(text)
    return place


def test_files_are_copied_byte_for_byte(model: Path, tmp_path: Path):
    target = tmp_path / "made"
    target.mkdir()
    copy_companions(model, target)
    names = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert names == {
        *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "merges.txt", "LICENSE"),
        *("NOTICE.txt", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"),
    }
    assert all((target / name).read_bytes() == (model / name).read_bytes() for name in names)
    assert {str(path) for path in companions(model)} == names


def test_where_the_template_is_another_nothing_of_the_old_one_is_left(model: Path, tmp_path: Path):
    target = tmp_path / "made"
    target.mkdir()
    copy_companions(model, target, templates=False)
    write_templates(target, {"default": "{%- generation -%}a{% endgeneration %}", "tool_use": "b"})
    assert json.loads((target / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "LlamaTokenizer"
    }
    assert (target / "chat_template.jinja").read_text() == "{%- if true -%}a{% endif %}"
    assert (target / "additional_chat_templates" / "tool_use.jinja").read_text() == "b"
    only_legal = tmp_path / "legal"
    only_legal.mkdir()
    copy_companions(model, only_legal, tokenizer=False)
    assert sorted(path.name for path in only_legal.iterdir()) == ["LICENSE", "NOTICE.txt"]


@pytest.mark.parametrize(
    ("tagged", "plain"),
    [
        ("a {% generation %} b {% endgeneration %} c", "a  b  c"),
        ("a {%- generation -%} b {%- endgeneration -%} c", "abc"),
        ("x\n{% generation %}\n  y\n{%- endgeneration %}\nz", "x\n  yz"),
    ],
)
def test_without_the_tags_a_template_writes_the_same(tagged: str, plain: str):
    engine = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert engine.from_string(plain_jinja(tagged)).render() == plain


def test_ends_are_added_and_sampling_that_is_off_is_not_delivered(tmp_path: Path):
    file = tmp_path / "generation_config.json"
    assert generation_settings(tmp_path, [2]) == {"eos_token_id": [2]}
    config = tmp_path / "config.json"
    config.write_text('{"eos_token_id": 5, "bos_token_id": 3, "pad_token_id": null}')
    assert generation_settings(tmp_path, [2]) == {"eos_token_id": [5, 2], "bos_token_id": 3}
    file.write_text('{"eos_token_id": 7, "temperature": 0.6, "do_sample": true, "max_length": 9}')
    assert generation_settings(tmp_path, [2, 7]) == {
        "eos_token_id": [7, 2],
        "temperature": 0.6,
        "do_sample": True,
        "max_length": 9,
    }
    file.write_text('{"eos_token_id": [7], "temperature": 0.6, "top_p": 0.9}')
    assert generation_settings(tmp_path, [2]) == {"eos_token_id": [7, 2]}

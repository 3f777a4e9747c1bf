"""Tests of `files.as_written`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import halfbyte
from halfbyte.config.options import DataOptions
from halfbyte.data.dataset import data_lines, read_data
from halfbyte.files import hub
from halfbyte.files.as_written import PROBES

from ..helpers import A, Q, reliable_options

TWO_LETTERS = r"\p{L}{1,2}"
"""Another way of cutting than GPT-2's, and so short that a vocabulary of 3,072 shows it."""


@pytest.fixture
def base(reliable_inputs: Path, tmp_path: Path) -> Path:
    """A model whose file cuts texts in a way of its own under GPT-2's name, as OLMo 2 and Phi 4 are
    published."""
    base = tmp_path / "base"
    shutil.copytree(reliable_inputs / "base", base)
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": TWO_LETTERS}, "behavior": "Isolated"}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    tokenizer["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{**split, "invert": False}, {**plain, "use_regex": False}],
    }
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    named(base, "GPT2Tokenizer")
    return base


def named(base: Path, name: str) -> None:
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": name}))


def test_texts_are_cut_as_the_file_says(base: Path):
    written = Tokenizer.from_file(str(base / "tokenizer.json"))

    def ids(tokenizer: Any) -> list[list[int]]:
        return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in PROBES]

    expected = [written.encode(text, add_special_tokens=False).ids for text in PROBES]
    for name in ("GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"):
        named(base, name)
        assert ids(hub.load_tokenizer(base)) == expected, name
    assert not hub.load_tokenizer(base).misread
    named(base, "GPT2Tokenizer")
    assert hub.load_tokenizer(base).misread


def test_a_result_is_read_by_others_as_it_was_trained(base: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [Q, A]}) + "\n")
    data = read_data(str(tmp_path / "rows.jsonl"), DataOptions(), base)
    assert any("read as it is written" in line for line in data_lines(data))
    inputs = tmp_path
    shutil.copy(tmp_path / "rows.jsonl", inputs / "r.jsonl")
    options = reliable_options(inputs, tmp_path / "run", max_steps=1, packing=False)
    run = halfbyte.train(**options)
    theirs, ours = AutoTokenizer.from_pretrained(run.adapter), hub.load_tokenizer(base)
    for text in PROBES:
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]

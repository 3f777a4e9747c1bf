"""Tests of `exporters.write`: the files beside merged weights."""

import json
import shutil
from pathlib import Path

from halfbyte.exporters.write import config_of, write_config
from halfbyte.files import hub
from halfbyte.files.model_config import read_config
from halfbyte.model.architecture import build_empty


def test_no_code_is_named_that_is_not_delivered(tmp_path: Path):
    base, made = tmp_path / "base", tmp_path / "made"
    shutil.copytree(hub.resolve("demo"), base)
    (tmp_path / "adapter").mkdir()
    made.mkdir()
    own = json.loads((base / "config.json").read_text())
    code = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (base / "config.json").write_text(
        json.dumps({**own, "auto_map": code, "quantization_config": {}})
    )
    model = build_empty(read_config(base))
    write_config(base, tmp_path / "adapter", made, model)
    assert json.loads((made / "config.json").read_text()) == own
    assert (made / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_ties_that_were_taken_off_are_off_in_its_file(tmp_path: Path, stories: Path):
    base = Path(shutil.copytree(stories, tmp_path / "base"))
    own = json.loads((base / "config.json").read_text())
    assert own["tie_word_embeddings"]
    own["inside"] = {"tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(own))
    found = config_of(base, build_empty(read_config(base), tied=False))
    assert found == {
        **own,
        "tie_word_embeddings": False,
        "inside": {"tie_word_embeddings": False},
    }
    assert config_of(base, build_empty(read_config(base))) == own

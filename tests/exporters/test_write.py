"""Tests of `exporters.write`: the files beside merged weights."""

import json
import shutil
from pathlib import Path

from halfbyte.exporters.write import write_config
from halfbyte.files import hub


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
    write_config(base, tmp_path / "adapter", made)
    assert json.loads((made / "config.json").read_text()) == own
    assert (made / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()

"""Configurations as people bring them: every mistake at once, nothing twice, blanks said."""

from pathlib import Path

import pytest

from halfbyte.config.aliases import translate_all
from halfbyte.config.build import CONTEXT, build, read_yaml, without_blanks
from halfbyte.config.options import TrainConfig
from halfbyte.errors import UsageError

KNOWN = set(TrainConfig.model_fields)


def test_every_key_that_cannot_be_taken_is_named_at_once():
    given = {"lora_rr": 8, "trust_remote_code": True, "bf16": True, "fp16": True, "epochs": 2}
    with pytest.raises(UsageError, match="3 options cannot be taken") as caught:
        translate_all(given.items(), KNOWN, "c.yaml")
    lines = caught.value.found.splitlines()
    assert "did you mean 'lora_r'" in lines[0] and "never run" in lines[1]
    assert "bf16 and fp16 both say what dtype is" in lines[2]


def test_axolotl_and_llama_factory_files_are_understood():
    axolotl = {
        "base_model": "demo",
        "model_type": "LlamaForCausalLM",
        "datasets": [{"path": "a.jsonl", "type": "alpaca"}, {"path": "b.jsonl"}],
        "sequence_len": 512,
        "pad_to_sequence_len": True,
        "evals_per_epoch": 4,
        "load_in_8bit": False,
        "adapter": "qlora",
        "lora_target_linear": True,
    }
    values, notices = translate_all(axolotl.items(), KNOWN, "c.yaml")
    assert values == {
        "model": "demo",
        "data": "a.jsonl\nb.jsonl",
        "max_length": 512,
        "target_modules": "all-linear",
    }
    assert any("columns of the rows" in line for line in notices)
    factory = {
        "model_name_or_path": "demo",
        "stage": "sft",
        "finetuning_type": "lora",
        "lora_target": "all",
        "quantization_bit": 4,
        "cutoff_len": 512,
        "mask_history": True,
        "dataset": "rows.jsonl",
    }
    values, _ = translate_all(factory.items(), KNOWN, "c.yaml")
    assert values["turns"] == "last" and values["target_modules"] == "all-linear"
    for key, value in (("stage", "dpo"), ("quantization_bit", 8), ("early_stopping_patience", 3)):
        with pytest.raises(UsageError, match=key):
            translate_all([(key, value)], KNOWN, "c.yaml")
    with pytest.raises(UsageError, match="field_messages"):
        translate_all([("datasets", [{"path": "a", "field_messages": "x"}])], KNOWN, "c.yaml")


def test_yaml_gives_nothing_twice_and_blanks_are_said(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("\ufeffmodel: demo\nlora_r: 8\nmodel: other\n")
    with pytest.raises(UsageError, match="not valid YAML") as caught:
        read_yaml(file)
    assert "given twice: model" in caught.value.found
    file.write_text("\ufeffmodel: demo\nmax_seq_length: null\nseed:\n")
    values, notices = without_blanks(read_yaml(file))
    assert values == {"model": "demo", "max_seq_length": CONTEXT}
    assert "as long as the model's context" in notices[0] and "seed" in notices[1]
    for target, message in ((Path("/dev/zero"), "not a regular file"), (tmp_path, "regular file")):
        with pytest.raises(UsageError, match=message):
            read_yaml(target)
    file.write_bytes(b"model: \xff\n")
    with pytest.raises(UsageError, match="not UTF-8"):
        read_yaml(file)
    with file.open("wb") as large:
        large.truncate(5 << 20)
    with pytest.raises(UsageError, match="5 MB"):
        read_yaml(file)


def test_paths_and_lists_are_sources_and_no_message_is_a_file(tmp_path: Path):
    config = build(TrainConfig, {"model": tmp_path, "data": [tmp_path / "a", "b"]})
    assert config.model == str(tmp_path) and config.data == f"{tmp_path / 'a'}\nb"
    with pytest.raises(UsageError) as caught:
        build(TrainConfig, {"model": "m", "data": [3] * 100_000})
    assert len(str(caught.value)) < 1000

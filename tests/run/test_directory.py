"""Tests of `run.directory`: what a flipped bit, a link or a full device costs."""

import json
import shutil
from pathlib import Path

import pytest

from halfbyte.errors import ModelError, StorageError
from halfbyte.run.directory import (
    ADAPTER_FACTS,
    METRICS,
    RUN_COPY,
    RUN_JSON,
    Run,
    adapter_facts,
    files_of_result,
    refuse_changed_result,
)
from halfbyte.run.load import run_tokenizer

RECORD = {
    "config": {"a": 0.1},
    "base": {"path": "p", "digest": "d"},
    "data": {"source": "s", "form": "f"},
    "clock": "2026-01-01T00:00:00",
    "template_sha256": "t",
}


def test_one_flipped_bit_in_the_record_costs_nothing(tmp_path: Path):
    run = Run(tmp_path)
    run.write_info(RECORD)
    whole = (tmp_path / RUN_JSON).read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        (tmp_path / RUN_JSON).write_bytes(bytes(flipped))
        assert run.info() == RECORD, (place, whole[place : place + 1])
    (tmp_path / RUN_JSON).unlink()
    assert run.info() == RECORD
    (tmp_path / RUN_COPY).write_bytes(b"{}")
    with pytest.raises(ModelError):
        run.info()


def test_a_record_of_an_older_release_has_no_seal(tmp_path: Path):
    (tmp_path / RUN_JSON).write_text(json.dumps(RECORD))
    assert Run(tmp_path).info() == RECORD


def test_damaged_lines_of_logs_are_named_and_set_aside(tmp_path: Path):
    run = Run(tmp_path)
    for step in range(1, 6):
        run.append(METRICS, {"step": step, "loss": 1.0 / step})
    whole = (tmp_path / METRICS).read_bytes()
    lost = 0
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 4
        (tmp_path / METRICS).write_bytes(bytes(flipped))
        rows = run.read(METRICS)
        assert all({"step", "loss"} <= row.keys() for row in rows)
        assert len(rows) >= 3, "a line, or with its end two"
        lost += len(rows) < 5
        damaged = run.cut(METRICS, 10)
        assert bool(damaged) == (tmp_path / f"{METRICS}.damaged").is_file()
        assert len(run.read(METRICS)) == len(rows)
        (tmp_path / f"{METRICS}.damaged").unlink(missing_ok=True)
    assert lost > len(whole) // 2


def test_nothing_is_written_through_a_link(tmp_path: Path):
    away = tmp_path / "away"
    away.write_text("somebody's")
    run = Run(tmp_path / "run")
    run.path.mkdir()
    for name in (METRICS, "log.txt", "LOCK"):
        (run.path / name).symlink_to(away)
    with pytest.raises(StorageError, match="cannot write"):
        run.append(METRICS, {"step": 1, "loss": 1.0})
    run.log("a line")
    with pytest.raises(StorageError, match="LOCK"), run.locked():
        pass
    assert away.read_text() == "somebody's"


def test_a_result_that_changed_is_named(trained_run: Run, tmp_path: Path):
    copy = shutil.copytree(trained_run.adapter, tmp_path / "adapter")
    refuse_changed_result(copy)
    (copy / "README.md").write_text("mine")
    refuse_changed_result(copy)
    weights = bytearray((copy / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 0x40  # an exponent
    (copy / "adapter_model.safetensors").write_bytes(bytes(weights))
    (copy / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match="has changed") as caught:
        refuse_changed_result(copy)
    assert "adapter_model.safetensors is not the file" in caught.value.found
    assert "adapter_config.json is missing" in caught.value.found
    assert "README.md" not in files_of_result(copy)


def test_any_flip_of_what_a_result_says_of_itself_is_found(trained_run: Run, tmp_path: Path):
    copy = shutil.copytree(trained_run.adapter, tmp_path / "adapter")
    file = copy / ADAPTER_FACTS
    before, raw = adapter_facts(copy), file.read_bytes()
    unseen = 0
    for place in range(len(raw)):
        for bit in (1, 4, 32):
            data = bytearray(raw)
            data[place] ^= bit
            file.write_bytes(bytes(data))
            try:
                refuse_changed_result(copy)
            except ModelError:
                continue
            after = adapter_facts(copy)
            assert after["files"] == before["files"]
            # the base and the template are held against these by those who read them
            assert after.keys() == before.keys() or after == before
            unseen += after == before
    assert unseen < len(raw) / 2, "white space"


def test_a_tokenizer_that_changed_is_named_before_it_is_read(trained_run: Run, tmp_path: Path):
    run = Run(Path(shutil.copytree(trained_run.path, tmp_path / "run")))
    run_tokenizer(run)
    file = run.adapter / "tokenizer.json"
    file.write_text(file.read_text().replace('"merges"', '"mergez"'))
    with pytest.raises(ModelError, match="has changed") as caught:
        run_tokenizer(run)
    assert "tokenizer.json" in caught.value.found

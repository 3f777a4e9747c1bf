"""Tests of `files.inside`."""

import os
import shutil
from pathlib import Path

import pytest

import halfbyte
from halfbyte.data.readers import files_of
from halfbyte.errors import DataError, ModelError
from halfbyte.files import hub
from halfbyte.files.atomic import JSON_LIMIT
from halfbyte.files.inside import refuse_foreign
from halfbyte.files.model_config import read_config
from halfbyte.run.directory import Run

from ..helpers import reliable_options


def test_links_pipes_and_giants_in_a_model_directory(reliable_inputs: Path, tmp_path: Path):
    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message):
            hub.resolve(str(tmp_path / "m"))
        shutil.rmtree(tmp_path / "m")

    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    shutil.copytree(reliable_inputs / "base", tmp_path / "m")
    (tmp_path / "m/extra.json").symlink_to(secret)
    refused("lies outside")
    shutil.copytree(reliable_inputs / "base", tmp_path / "m")
    os.mkfifo(tmp_path / "m/extra.json")
    refused("not a regular file")
    shutil.copytree(reliable_inputs / "base", tmp_path / "m")
    with (tmp_path / "m/extra.json").open("wb") as file:
        file.truncate(200_000_000)
    refused("too many")
    # a Hub snapshot links into the cache's blobs
    cache = tmp_path / "cache"
    (cache / "snapshots/abc").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in (reliable_inputs / "base").iterdir():
        shutil.copy(file, cache / "blobs" / file.name)
        (cache / "snapshots/abc" / file.name).symlink_to(Path("../../blobs") / file.name)
    assert read_config(hub.resolve(str(cache / "snapshots/abc"))).model_type == "llama"


def test_a_link_out_of_a_folder_below_is_refused(tmp_path: Path):
    model, away = tmp_path / "model", tmp_path / "away"
    shutil.copytree(hub.resolve("demo"), model)
    away.mkdir()
    (away / "secret.jinja").write_text("somebody's")
    folder = model / "additional_chat_templates"
    folder.mkdir()
    (folder / "x.jinja").symlink_to(away / "secret.jinja")
    with pytest.raises(ModelError, match="link to what lies outside"):
        hub.resolve(str(model))
    shutil.rmtree(folder)
    folder.symlink_to(away)
    with pytest.raises(ModelError, match="link to what lies outside"):
        hub.resolve(str(model))
    folder.unlink()
    (model / "inside.jinja").symlink_to(model / "chat_template.jinja")
    (model / "original").mkdir()
    with (model / "original/params.json").open("wb") as big:
        big.truncate(JSON_LIMIT + 1)
    assert hub.resolve(str(model)) == model, "nothing opens that"
    folder.mkdir()
    (model / "original/params.json").rename(folder / "params.json")
    with pytest.raises(ModelError, match="too many for a configuration"):
        hub.resolve(str(model))


def test_a_folder_with_the_name_of_a_file_is_refused(tmp_path: Path):
    model = tmp_path / "m"
    shutil.copytree(hub.resolve("demo"), model)
    (model / "chat_template.jinja").unlink(missing_ok=True)
    (model / "chat_template.jinja").mkdir()
    with pytest.raises(ModelError, match=r"chat_template\.jinja is not a regular file"):
        hub.resolve(str(model))


@pytest.mark.parametrize(
    "name",
    [
        *("run.json", "metrics.jsonl", "adapter", "adapter/adapter_config.json", "log.txt"),
        *("adapter/tokenizer.json", "checkpoints", "checkpoints/step-00000008/state.json"),
    ],
)
def test_nothing_of_a_run_leads_out_of_it(
    reliable_inputs: Path, straight_run: Run, tmp_path: Path, name: str
):
    place = tmp_path / "run"
    shutil.copytree(straight_run.path, place)
    away = tmp_path / "away"
    (place / name).rename(away)
    (place / name).symlink_to(away)
    before = away.read_bytes() if away.is_file() else b""
    for use in (
        lambda: Run.open(place),
        lambda: halfbyte.train(
            **reliable_options(reliable_inputs, place, resume_from_checkpoint="auto")
        ),
    ):
        with pytest.raises(ModelError, match="what lies outside") as caught:
            use()
        assert (place / name).name in str(caught.value)
    assert not before or away.read_bytes() == before
    (place / name).unlink()
    away.rename(place / name)
    (place / "mine").symlink_to(tmp_path)
    assert Run.open(place).path == place, "what is not the run's own is nobody's here"


@pytest.mark.parametrize("name", ["LOCK", "metrics.jsonl", "log.txt", "adapter/halfbyte.json"])
def test_a_pipe_in_a_run_is_named_and_not_waited_for(
    reliable_inputs: Path, straight_run: Run, tmp_path: Path, name: str
):
    place = tmp_path / "run"
    shutil.copytree(straight_run.path, place)
    (place / name).unlink()
    os.mkfifo(place / name)
    options = reliable_options(reliable_inputs, place, resume_from_checkpoint="auto")
    with pytest.raises(ModelError, match="is not a regular file") as caught:
        halfbyte.train(**options)
    assert name in caught.value.what


def test_an_adapter_and_a_data_folder_hold_what_is_read_of_them(straight_run: Run, tmp_path: Path):
    adapter, away = tmp_path / "adapter", tmp_path / "away"
    shutil.copytree(straight_run.adapter, adapter)
    (adapter / "tokenizer.json").rename(away)
    (adapter / "tokenizer.json").symlink_to(away)
    with pytest.raises(ModelError, match="lies outside"):
        hub.resolve_adapter(str(adapter))
    rows = tmp_path / "rows" / "deep"
    rows.mkdir(parents=True)
    (rows / "a.jsonl").write_text("{}")
    (tmp_path / "b.jsonl").write_text("{}")
    assert files_of(str(rows.parent)) == [rows / "a.jsonl"]
    (rows / "b.jsonl").symlink_to(tmp_path / "b.jsonl")
    with pytest.raises(DataError, match="lies outside"):
        files_of(str(rows.parent))
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "b.jsonl")
    assert files_of(str(tmp_path / "link.jsonl")), "a file that was named is what was meant"


def test_a_snapshot_may_lead_to_the_blobs_of_its_cache(tmp_path: Path):
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "abc" / "data"
    (snapshot.parents[2] / "blobs").mkdir(parents=True)
    (snapshot.parents[2] / "blobs" / "1").write_text("{}")
    snapshot.mkdir(parents=True)
    (snapshot / "a.jsonl").symlink_to(Path("../../../blobs/1"))
    refuse_foreign(snapshot, ["*"])
    assert files_of(str(snapshot)) == [snapshot / "a.jsonl"]

"""Tests of `files.hub`."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError

from halfbyte.errors import (
    ModelError,
)
from halfbyte.files import hub


@pytest.mark.parametrize("name", ["LICENSE", "LICENCE.txt", "USE_POLICY.md", "COPYING", "NOTICE"])
def test_what_a_model_is_passed_on_with_is_fetched(name: str):
    files = ["config.json", "model.safetensors", name]
    assert name in set(hub.opened_of("acme/tiny", files, hub.HUB_PATTERNS, []))


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("adapter_model.safetensors", "is an adapter, not a model"),
        ("adapter_model.bin", "without adapter_model.safetensors"),
        ("else.txt", "without adapter_model.safetensors"),
    ],
)
def test_an_adapter_where_a_model_is_wanted_is_told_so(tmp_path: Path, weights: str, said: str):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / weights).write_text("x")
    with pytest.raises(ModelError, match=said) as caught:
        hub.resolve(str(tmp_path))
    assert ("pickled" in caught.value.found) == (weights == "adapter_model.bin")


FILES = [
    *("config.json", "tokenizer.json", "LICENSE", "README.md", "pytorch_model.bin"),
    *("onnx/model.safetensors", "onnx/config.json", "additional_chat_templates/tool_use.jinja"),
]


@pytest.mark.parametrize(
    ("weights", "opened"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        (
            ["model.safetensors", "consolidated.safetensors", "model.fp16.safetensors"],
            ["model.safetensors"],
        ),
        (
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
            ["model.safetensors.index.json", "model-00001-of-00002.safetensors"],
        ),
        (
            [
                *("model.safetensors", "model.safetensors.index.json"),
                "model-00001-of-00001.safetensors",
            ],
            ["model.safetensors"],
        ),
    ],
)
def test_of_a_repository_one_set_of_weights_is_fetched(weights: list[str], opened: list[str]):
    found = set(hub.opened_of("acme/tiny", FILES + weights, hub.HUB_PATTERNS, ["original/*"]))
    assert found == {
        *("config.json", "tokenizer.json", "LICENSE", *opened),
        "additional_chat_templates/tool_use.jinja",
    }
    without = hub.opened_of(
        "acme/tiny", FILES + weights, hub.HUB_PATTERNS, ["original/*", "*.safetensors"]
    )
    assert not any(name.endswith(".safetensors") for name in without)


def test_a_repository_without_weights_of_ours_says_what_it_has():
    with pytest.raises(ModelError, match="no weights that are opened") as caught:
        list(hub.opened_of("acme/tiny", FILES, hub.HUB_PATTERNS, []))
    assert "pytorch_model.bin" in caught.value.found
    adapter = ["adapter_config.json", "adapter_model.safetensors", "README.md"]
    names = ["adapter_config.json", "adapter_model.safetensors", "halfbyte.json"]
    assert set(hub.opened_of("acme/lora", adapter, names, [])) == set(names[:2])


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "restricted"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("RepositoryNotFoundError", "no model"),
        ("LocalEntryNotFoundError", "'acme/tiny' at revision 'v9' is neither"),
        ("IncompleteSnapshotError", "in part"),
        ("SomethingElse", "can be reached"),
    ],
)
def test_the_hubs_reasons_are_told_apart_in_its_own_words(kind: str, said: str):
    error = type(kind, (Exception,), {})("403 Client Error.\n\nAccess is restricted to you.")
    found = hub._unreachable("acme/tiny", "v9", error)
    assert said in found.what and "Access is restricted to you." in found.found


@pytest.mark.parametrize(
    ("status", "falls_back"),
    [(None, True), (503, True), (429, True), (401, False), (404, False)],
)
def test_without_the_hub_the_cache_has_what_was_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int | None, falls_back: bool
):
    """Files that are left in the repository are no part of it: of a model that is in the cache
    nothing is missing."""
    asked: list[Any] = []

    def listed(self: Any, name: str, revision: str | None = None) -> list[str]:
        if status is None:
            raise OSError("no network")
        error = HfHubHTTPError.__new__(HfHubHTTPError, "no answer")
        error.response = SimpleNamespace(status_code=status)
        raise error

    def download(name: str, **settings: Any) -> str:
        asked.append(settings["allow_patterns"])
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    kept = [SimpleNamespace(path=path) for path in [*FILES, "model.safetensors"]]
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", listed)
    monkeypatch.setattr(
        huggingface_hub, "get_cached_repo_tree", lambda *_, **__: kept, raising=False
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    if falls_back:
        hub.resolve("acme/tiny")
        assert "onnx/config.json" not in asked[0] and "model.safetensors" in asked[0]
    else:
        with pytest.raises(ModelError):
            hub.resolve("acme/tiny")
        assert not asked


def test_a_model_in_a_subfolder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Where it is named it is opened alone; where it is not, the way out names it."""
    shutil.copytree(hub.resolve("demo"), tmp_path / "acme" / "small")
    asked: dict[str, Any] = {}

    def download(name: str, **settings: Any) -> str:
        asked.update(settings)
        return str(tmp_path / "acme")

    files = [f"{folder}/{name}" for folder in ("small", "large") for name in FILES[:3]]
    files += ["small/model.safetensors", "large/model.safetensors", "README.md"]
    monkeypatch.setattr(hub, "_listed", lambda *_: files)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("acme/tiny", subfolder="small") == tmp_path / "acme" / "small"
    assert "small/model.safetensors" in asked["allow_patterns"]
    assert not [name for name in asked["allow_patterns"] if name.startswith("large")]
    assert hub.resolve(str(tmp_path / "acme"), subfolder="small/") == tmp_path / "acme" / "small"
    for model in ("acme/tiny", str(tmp_path / "acme")):
        with pytest.raises(ModelError, match=r"no config\.json") as caught:
            hub.resolve(model)
        assert any(way.startswith("--subfolder ") for way in caught.value.ways_out)
    with pytest.raises(ModelError, match=r"no config\.json in medium"):
        hub.resolve("acme/tiny", subfolder="medium")
    for folder in ("../acme", "/acme", ".", ""):
        with pytest.raises(ModelError, match="no folder below"):
            hub.resolve("acme/tiny", subfolder=folder)

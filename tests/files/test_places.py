"""Tests of `files.places`."""

from pathlib import Path

import pytest

from halfbyte.files.places import cache_directory


def test_what_is_made_for_all_runs_has_a_place_for_everybody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "named"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "named"
    monkeypatch.delenv("HALFBYTE_CACHE")
    assert cache_directory() == tmp_path / "xdg" / "halfbyte"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == tmp_path / ".cache" / "halfbyte"
    monkeypatch.setenv("HOME", "/nonexistent")
    assert cache_directory().name.startswith("halfbyte-"), "of a user without a home"

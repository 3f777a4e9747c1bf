"""What is there, and what is not any more, before a base is loaded."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.training import setup


class Reached(Exception):
    pass


def test_no_process_of_templates_is_left_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It would hold memory that no plan counts, through the whole training."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    left: list[Any] = []
    started: list[Any] = []
    honest = setup.read_rows

    def read_rows(*arguments: Any, **more: Any) -> Any:
        data = honest(*arguments, **more)
        started.extend(multiprocessing.active_children())
        return data

    def build_learner(*arguments: Any, **more: Any) -> Any:
        left.extend(multiprocessing.active_children())
        raise Reached

    monkeypatch.setattr(setup, "read_rows", read_rows)
    monkeypatch.setattr(setup, "build_learner", build_learner)
    with pytest.raises(Reached):
        halfbyte.train("demo", str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "run"))
    assert started and not left

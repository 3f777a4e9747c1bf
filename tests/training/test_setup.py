"""What is there, and what is not any more, before a base is loaded."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.data.template import TemplateProcess
from halfbyte.planning.search import Planner
from halfbyte.training import setup


class Reached(Exception):
    pass


def test_no_process_of_templates_is_left_beside_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """It would hold memory that no plan counts, through the whole training."""
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant")]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    started: list[Any] = []
    left: dict[str, list[Any]] = {}
    start, plan = TemplateProcess._start, Planner.plan

    def begin(self: TemplateProcess) -> Any:
        started.append(self)
        return start(self)

    def planned(self: Planner, **change: Any) -> Any:
        found = plan(self, **change)
        left["planned"] = multiprocessing.active_children()
        return found

    def build_learner(*arguments: Any, **more: Any) -> Any:
        left["loaded"] = multiprocessing.active_children()
        raise Reached

    monkeypatch.setattr(TemplateProcess, "_start", begin)
    monkeypatch.setattr(Planner, "plan", planned)
    monkeypatch.setattr(setup, "build_learner", build_learner)
    with pytest.raises(Reached):
        halfbyte.train("demo", str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "run"))
    assert started and left == {"planned": [], "loaded": []}

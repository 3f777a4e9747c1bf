"""Which checkpoint a run goes on from, what may differ, and what is promised."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from halfbyte.data.dataset import make_renderer
from halfbyte.errors import BusyError, DataError, ModelError, UsageError
from halfbyte.files import hub
from halfbyte.run import checkpoint
from halfbyte.run.directory import Run
from halfbyte.run.fingerprint import tokenizer_digest
from halfbyte.training.resume import Resume, exactness, find_checkpoint

from .fakes import promise_for


def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **state: Any) -> Resume:
    monkeypatch.setattr(checkpoint, "read_state", lambda path: state)
    here = checkpoint.Found(tmp_path / "step-00000004", 4)
    return Resume(here, Run(tmp_path), "learning-rate, base,")


def test_a_run_is_not_written_over_and_not_begun_anew(tmp_path: Path):
    run = Run(tmp_path)
    assert find_checkpoint(run, None, lambda line: None) is None
    assert find_checkpoint(run, "auto", lambda line: None) is None  # nothing there: it begins
    run.adapter.mkdir()
    with pytest.raises(BusyError, match="already holds a run"):
        find_checkpoint(run, None, lambda line: None)
    with pytest.raises(ModelError, match="no valid checkpoint"):
        find_checkpoint(run, "auto", lambda line: None)


def test_damaged_checkpoints_are_said_and_passed_over(tmp_path: Path):
    (tmp_path / "checkpoints/step-00000002").mkdir(parents=True)
    lines: list[str] = []
    with pytest.raises(ModelError) as caught:
        find_checkpoint(Run(tmp_path), "auto", lines.append)
    assert "skipped a damaged checkpoint" in lines[0] and "step-00000002" in caught.value.found


def test_passes_stay_cut_as_memory_cut_them_unless_asked_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    cut = {"given": {"tokens_per_pass": 0, "tokens_per_tile": 0}}
    cut["now"] = {"tokens_per_pass": 96, "tokens_per_tile": 0}
    resume = found(tmp_path, monkeypatch, cut=cut)
    same = resume.options_as_before(promise_for(tmp_path))
    assert same == {"tokens_per_pass": 96, "tokens_per_tile": 0}
    asked = resume.options_as_before(promise_for(tmp_path, tokens_per_pass=32))
    assert asked == {"tokens_per_tile": 0}


def test_what_an_adapter_decided_is_the_runs_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The adapter that a run was begun with need not be there any more."""
    resume = found(tmp_path, monkeypatch)
    begun = promise_for(tmp_path, adapter_name_or_path="gone", lora_r=8, use_dora=True).config
    monkeypatch.setattr(Run, "config", lambda self: begun)
    again = resume.options_of_adapter(promise_for(tmp_path, adapter_name_or_path="gone").config)
    assert again["lora_r"] == 8 and again["use_dora"] and "learning_rate" not in again
    assert resume.options_of_adapter(promise_for(tmp_path).config) == {}


def test_another_base_is_refused_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    resume = found(tmp_path, monkeypatch, base_digest="a" * 64)
    assert resume.allowed == {"learning_rate", "base"}
    resume.compare_base("b" * 64, "base")
    assert resume.changes == [f"base: digest {'a' * 16} then, {'b' * 16} now"]
    resume.allowed.clear()
    with pytest.raises(ModelError, match="not the one"):
        resume.compare_base("b" * 64, "base")


def test_what_memory_made_of_a_run_is_undone_with_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    before = [
        {"step": 2, "change": "tokens_per_pass: 64", "by_memory": True},
        {"step": 6, "change": "tokens_per_tile: 32", "by_memory": True},
        {"step": 6, "change": "lr: 1 then, 2 now"},
    ]
    monkeypatch.setattr(Run, "info", lambda self: {"changes": before, "identity": "abc"})
    monkeypatch.setattr(checkpoint, "restore", lambda *args, **how: 4)
    scale = SimpleNamespace(value=1.0, good=0)
    learner: Any = SimpleNamespace(
        scale=scale, model=None, optimizer=None, updates=0, since_logged=[]
    )
    learner.device = SimpleNamespace(type="cpu")
    info: dict[str, Any] = {"identity": "new"}
    resume = found(tmp_path, monkeypatch, loss_scale=[512.0, 3])
    line = resume.restore(learner, info)
    assert [change["step"] for change in info["changes"]] == [2, 6]
    assert info["identity"] == "abc" and learner.updates == 4
    assert (scale.value, scale.good) == (512.0, 3)
    assert "resumed from step 4" in line and "which changed on its way" in line


@pytest.mark.parametrize(
    ("changes", "earlier", "device", "promised"),
    [
        ([], [], "cpu", "the same bytes"),
        ([], [], "cuda", "not bit-exact"),
        ([], ["cut"], "cpu", "changed on its way: cut"),
        (["lr: 1 then, 2 now"], ["cut"], "cpu", "will not end as the unbroken run"),
    ],
)
def test_what_is_promised(changes: list[str], earlier: list[str], device: str, promised: str):
    assert promised in exactness(changes, earlier, device)


def test_a_checkpoint_may_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run(tmp_path)
    for step in (2, 4, 6):
        (run.checkpoints / f"step-{step:08d}").mkdir(parents=True)
    monkeypatch.setattr(checkpoint, "check", lambda path: int(path.name[5:]))
    said: list[str] = []
    chosen = find_checkpoint(run, str(run.checkpoints / "step-00000004"), said.append)
    assert chosen is not None and chosen.step == 4
    assert any("step-00000006" in line and "set aside" in line for line in said)
    there = [path.name for path in checkpoint.directories(run.checkpoints)]
    assert there == ["step-00000002", "step-00000004"], "auto goes on from it, too"
    with pytest.raises(UsageError, match="no checkpoint of"):
        find_checkpoint(run, str(tmp_path), said.append)

    def damaged(path: Path) -> int:
        raise ModelError(f"checkpoint file {path} is damaged")

    monkeypatch.setattr(checkpoint, "check", damaged)
    with pytest.raises(ModelError, match="step-00000002 is damaged"):
        find_checkpoint(run, str(run.checkpoints / "step-00000002"), said.append)


def test_rows_that_fail_under_another_template_are_told_so(
    tmp_path: Path, stories: Path, monkeypatch: pytest.MonkeyPatch
):
    resume, config = found(tmp_path, monkeypatch), promise_for(tmp_path).config
    renderer = make_renderer(hub.load_tokenizer(stories), config)
    info = {
        "template_sha256": renderer.template_sha256,
        "tokenizer_sha256": tokenizer_digest(renderer),
    }
    monkeypatch.setattr(Run, "info", lambda self: info)
    error = DataError("no row can be rendered", ways_out=["mend them"])
    resume.explain(error, config, stories)
    assert error.ways_out == ("mend them",)
    info |= {"template_sha256": "another"}
    resume.explain(error, config, stories)
    assert error.ways_out[0].startswith(f"bring back the chat template in {stories}")
    resume.explain(error, config, tmp_path / "gone")  # what cannot be read explains nothing

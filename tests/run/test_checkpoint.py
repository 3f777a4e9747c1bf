"""Tests of `run.checkpoint`."""

import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import halfbyte
from halfbyte.cli import run as cli
from halfbyte.config.options import TrainConfig
from halfbyte.errors import (
    Interrupted,
    StorageError,
)
from halfbyte.run import checkpoint
from halfbyte.run.directory import Run

from ..helpers import reliable_options, stopped_after


def flips(data: bytes, every: int, offset: int = 0) -> list[tuple[int, int]]:
    return [(bit // 8, bit % 8) for bit in range(offset, 8 * len(data), every)]


def undetected(directory: Path, file: Path, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The single-bit flips of a checkpoint's file after which it still counts, or is not named."""
    data, missed = bytearray(file.read_bytes()), []
    step = int(directory.name.removeprefix("step-"))
    for byte, bit in places:
        data[byte] ^= 1 << bit
        file.write_bytes(data)
        found, damaged = checkpoint.newest(directory.parent)
        if (found and found.step >= step) or file.name not in " ".join(damaged) or found is None:
            missed.append((byte, bit))
        data[byte] ^= 1 << bit
    file.write_bytes(data)
    return missed


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def flip_everything(run: Run, tmp_path: Path, headers_every: int, in_data: int) -> int:
    """Flip bits of every file of the newest checkpoint; the older one must be fallen back on.
    Returns flips made."""
    shutil.copytree(run.checkpoints, tmp_path / "checkpoints")
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    rng, made = random.Random(0), 0
    for file in sorted(newest.iterdir()):
        data = file.read_bytes()
        head = data if file.suffix == ".json" else data[: header_bytes(file)]
        places = flips(head, headers_every)
        places += [(rng.randrange(len(data)), rng.randrange(8)) for _ in range(in_data)]
        assert undetected(newest, file, places) == [], file.name
        made += len(places)
    assert checkpoint.check(newest) == 8, "and put back, it is valid again"
    return made


def test_flipped_bits_are_found_named_and_fallen_back_from(straight_run: Run, tmp_path: Path):
    assert flip_everything(straight_run, tmp_path, 389, 12) > 100


@pytest.mark.slow
def test_every_flip_of_headers_and_manifests_and_1000_in_the_data(
    straight_run: Run, tmp_path: Path
):
    print("flips:", flip_everything(straight_run, tmp_path, 1, 1000))


def test_missing_and_renamed_files_count_as_damage(straight_run: Run, tmp_path: Path):
    for change in ("missing", "renamed"):
        shutil.copytree(straight_run.checkpoints, tmp_path / change)
        newest = sorted((tmp_path / change).iterdir())[-1]
        if change == "missing":
            (newest / "optimizer.safetensors").unlink()
        else:
            newest.rename(newest.with_name("step-00000099"))
        found, damaged = checkpoint.newest(tmp_path / change)
        assert found and found.step == 6 and len(damaged) == 1, change


def test_checkpoint_verbs(straight_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(straight_run.path, tmp_path / "run")
    assert cli(["checkpoint", "list", str(tmp_path / "run"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [row["step"] for row in rows] == [6, 8] and not any(row["damage"] for row in rows)
    assert cli(["checkpoint", "verify", str(tmp_path / "run")]) == 0
    (tmp_path / "run/checkpoints/step-00000008/state.json").write_text("{}")
    capsys.readouterr()
    assert cli(["checkpoint", "verify", str(tmp_path / "run")]) == 6
    assert "state.json is missing or damaged" in capsys.readouterr().err
    assert cli(["checkpoint", "list", str(tmp_path)]) == 6


def test_the_best_checkpoint_is_kept(reliable_inputs: Path, tmp_path: Path):
    run = halfbyte.train(
        **reliable_options(
            reliable_inputs, tmp_path / "run", save_steps=1, eval_split=6, eval_steps=1, max_steps=8
        )
    )
    losses = {row["step"]: row["loss"] for row in run.read("eval.jsonl") if row["step"]}
    best = min(losses, key=lambda step: losses[step])
    kept = [int(p.name[5:]) for p in sorted(run.checkpoints.iterdir())]
    assert kept == sorted({best, 7, 8})


def test_the_best_of_those_that_exist_is_kept_and_strangers_are_left_alone(
    reliable_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Evaluated more often than saved, the best evaluation without a checkpoint; damage and a
    user's copy beside."""
    # the package's attribute of that name is the function
    module = sys.modules["halfbyte.training.trainer"]
    losses = {
        0: 9.0,
        1: 1.0,
        2: 3.0,
        3: 5.0,
        4: 4.0,
        5: 5.0,
        6: 6.0,
        7: 7.0,
        8: 8.0,
        9: 9.0,
        10: 9.5,
    }
    calls = iter(losses.values())
    monkeypatch.setattr(module, "mean_loss", lambda *args, **more: (next(calls), 1))
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        config = TrainConfig(
            **reliable_options(
                reliable_inputs, out, eval_split=6, eval_steps=1, max_steps=10, save_steps=2
            )
        )
        halfbyte.train(config, reporter=stopped_after(8))
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000006", "step-00000008"], (
        "2 is the best that was saved"
    )
    shutil.copytree(out / "checkpoints/step-00000002", out / "checkpoints/step-00000002.bak")
    for step in (6, 8):
        (out / f"checkpoints/step-{step:08d}/state.json").write_text("{}")
    again = reliable_options(
        reliable_inputs, out, eval_split=6, eval_steps=1, max_steps=10, save_steps=1
    )
    calls = iter(list(losses.values())[3:])
    run = halfbyte.train(**again, resume_from_checkpoint="auto")
    left = sorted(p.name for p in run.checkpoints.iterdir())
    aside = ["damaged-step-00000006", "damaged-step-00000008"]
    assert left == [*aside, "step-00000002", "step-00000002.bak", "step-00000009", "step-00000010"]
    assert cli(["checkpoint", "list", str(out)]) == 0


def test_a_disk_that_will_be_full_is_known_before_training(
    reliable_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=100_000)
    )
    with pytest.raises(StorageError, match="0 MiB free; this run writes"):
        halfbyte.train(**reliable_options(reliable_inputs, tmp_path / "run"))
    assert not (tmp_path / "run/metrics.jsonl").exists()

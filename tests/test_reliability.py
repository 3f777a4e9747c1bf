"""Nothing lost, nothing wrong in silence: damage, faults, signals, resumes and hostile input, on
purpose.

A fast sample of each; the full counts run with `make test-slow` and are published in
docs/reliability.md.
"""

import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.cli import run as cli
from halfbyte.config.options import TrainConfig
from halfbyte.data.formats import Example, read_examples
from halfbyte.data.renderer import Renderer
from halfbyte.errors import (
    DataError,
    HalfbyteError,
    Interrupted,
    ModelError,
    NonFiniteError,
    StorageError,
)
from halfbyte.files import atomic, hub
from halfbyte.files.model_config import read_config
from halfbyte.files.safetensors import Checkpoint, read_header
from halfbyte.progress import Reporter
from halfbyte.run import checkpoint
from halfbyte.run.directory import METRICS, NONFINITE, Run
from halfbyte.run.fingerprint import changes_since, fingerprint

sys.path.insert(0, str(Path(__file__).parent))
from faults import make_inputs


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("inputs")
    make_inputs(home)
    return home


def options(inputs: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(inputs / "base"),
        "data": str(inputs / "rows.jsonl"),
        "output_dir": str(out),
        "dtype": "float32",
        "max_length": 64,
        "packing": True,
        "lora_r": 32,
        "lora_dropout": 0.1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-2,
        "max_steps": 8,
        "save_steps": 2,
        "num_samples": 0,
        **changes,
    }


def digest(run: Run, step: int) -> str:
    found = hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes())
    found.update((run.checkpoints / f"step-{step:08d}" / "optimizer.safetensors").read_bytes())
    return found.hexdigest()


@pytest.fixture(scope="session")
def straight(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return halfbyte.train(**options(inputs, tmp_path_factory.mktemp("straight") / "run"))


# --- checkpoints ----------------------------------------------------------------------------------


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


def test_flipped_bits_are_found_named_and_fallen_back_from(straight: Run, tmp_path: Path):
    assert flip_everything(straight, tmp_path, 389, 12) > 100


@pytest.mark.slow
def test_every_flip_of_headers_and_manifests_and_1000_in_the_data(straight: Run, tmp_path: Path):
    print("flips:", flip_everything(straight, tmp_path, 1, 1000))


def test_missing_and_renamed_files_count_as_damage(straight: Run, tmp_path: Path):
    for change in ("missing", "renamed"):
        shutil.copytree(straight.checkpoints, tmp_path / change)
        newest = sorted((tmp_path / change).iterdir())[-1]
        if change == "missing":
            (newest / "optimizer.safetensors").unlink()
        else:
            newest.rename(newest.with_name("step-00000099"))
        found, damaged = checkpoint.newest(tmp_path / change)
        assert found and found.step == 6 and len(damaged) == 1, change


def test_checkpoint_verbs(straight: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    shutil.copytree(straight.path, tmp_path / "run")
    assert cli(["checkpoint", "list", str(tmp_path / "run"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [row["step"] for row in rows] == [6, 8] and not any(row["damage"] for row in rows)
    assert cli(["checkpoint", "verify", str(tmp_path / "run")]) == 0
    (tmp_path / "run/checkpoints/step-00000008/state.json").write_text("{}")
    capsys.readouterr()
    assert cli(["checkpoint", "verify", str(tmp_path / "run")]) == 6
    assert "state.json is missing or damaged" in capsys.readouterr().err
    assert cli(["checkpoint", "list", str(tmp_path)]) == 6


def test_the_best_checkpoint_is_kept(inputs: Path, tmp_path: Path):
    run = halfbyte.train(
        **options(inputs, tmp_path / "run", save_steps=1, eval_split=6, eval_steps=1, max_steps=8)
    )
    losses = {row["step"]: row["loss"] for row in run.read("eval.jsonl") if row["step"]}
    best = min(losses, key=lambda step: losses[step])
    kept = [int(p.name[5:]) for p in sorted(run.checkpoints.iterdir())]
    assert kept == sorted({best, 7, 8})


def test_the_best_of_those_that_exist_is_kept_and_strangers_are_left_alone(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Evaluated more often than saved, the best evaluation without a checkpoint; damage and a
    user's copy beside."""
    module = sys.modules[
        "halfbyte.training.trainer"
    ]  # the package's attribute of that name is the function
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
            **options(inputs, out, eval_split=6, eval_steps=1, max_steps=10, save_steps=2)
        )
        halfbyte.train(config, reporter=stopped_after(8))
    names = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000006", "step-00000008"], (
        "2 is the best that was saved"
    )
    shutil.copytree(out / "checkpoints/step-00000002", out / "checkpoints/step-00000002.bak")
    for step in (6, 8):
        (out / f"checkpoints/step-{step:08d}/state.json").write_text("{}")
    again = options(inputs, out, eval_split=6, eval_steps=1, max_steps=10, save_steps=1)
    calls = iter(list(losses.values())[3:])
    run = halfbyte.train(**again, resume_from_checkpoint="auto")
    left = sorted(p.name for p in run.checkpoints.iterdir())
    aside = ["damaged-step-00000006", "damaged-step-00000008"]
    assert left == [*aside, "step-00000002", "step-00000002.bak", "step-00000009", "step-00000010"]
    assert cli(["checkpoint", "list", str(out)]) == 0


def test_a_disk_that_will_be_full_is_known_before_training(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    with pytest.raises(StorageError, match="0 MiB free; this run writes"):
        halfbyte.train(**options(inputs, tmp_path / "run"))
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_without_a_valid_checkpoint_is_not_begun_anew_over_it(
    inputs: Path, straight: Run, tmp_path: Path
):
    shutil.copytree(straight.path, tmp_path / "run")
    before = digest(Run(tmp_path / "run"), 8)
    (tmp_path / "run/checkpoints/step-00000008/.DS_Store").write_text(
        "somebody's file is no damage"
    )
    assert checkpoint.check(tmp_path / "run/checkpoints/step-00000008") == 8
    for path in (tmp_path / "run/checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    with pytest.raises(ModelError, match="no valid checkpoint"):
        halfbyte.train(**options(inputs, tmp_path / "run", resume_from_checkpoint="auto"))
    assert (
        digest(Run(tmp_path / "run"), 8) == before
        and len(list((tmp_path / "run/checkpoints").iterdir())) == 2
    )


# --- resume ---------------------------------------------------------------------------------------


def stopped_after(step: int) -> Reporter:
    """A reporter that interrupts the training after a step."""

    def stop(row: dict[str, Any], total: int) -> None:
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return Reporter(on_step=stop)


def stop_and_resume(inputs: Path, out: Path, steps: list[int], **changes: Any) -> Run:
    for step in steps:
        with pytest.raises(Interrupted) as caught:
            config = TrainConfig(**options(inputs, out, resume_from_checkpoint="auto", **changes))
            halfbyte.train(config, reporter=stopped_after(step))
        assert caught.value.exit_code == 143 and f"after step {step}" in str(caught.value)
    return halfbyte.train(**options(inputs, out, resume_from_checkpoint="auto", **changes))


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_stop_after_any_step_changes_nothing(
    inputs: Path, straight: Run, tmp_path: Path, step: int
):
    run = stop_and_resume(inputs, tmp_path / "run", [step])
    assert digest(run, 8) == digest(straight, 8)
    assert [row["loss"] for row in run.metrics()] == [row["loss"] for row in straight.metrics()]


@pytest.mark.slow
def test_a_stop_after_each_of_40_steps_and_ten_in_a_row(inputs: Path, tmp_path: Path):
    """Packing, accumulation 3, dropout, several epochs; and the other optimizer, unpacked,
    unquantized, ten stops."""
    whole = halfbyte.train(**options(inputs, tmp_path / "whole", max_steps=40))
    assert whole.metrics()[-1]["epoch"] > 2
    for step in range(1, 40):
        run = stop_and_resume(inputs, tmp_path / f"k{step}", [step], max_steps=40)
        assert digest(run, 40) == digest(whole, 40), step
    chained = stop_and_resume(inputs, tmp_path / "chained", list(range(3, 33, 3)), max_steps=40)
    assert digest(chained, 40) == digest(whole, 40)
    for number, changes in enumerate(
        (
            {"optim": "adamw_torch", "packing": False},
            {"load_in_4bit": False, "lora_dropout": 0.0, "gradient_checkpointing": False},
            {"full": True, "load_in_4bit": False, "optim": "adamw_torch", "learning_rate": 1e-3},
            {"per_device_train_batch_size": 3, "packing": False, "eval_split": 5, "eval_steps": 2},
            {"lr_scheduler_type": "cosine", "use_rslora": True, "dtype": "bfloat16"},
        )
    ):
        one = halfbyte.train(**options(inputs, tmp_path / f"one{number}", max_steps=9, **changes))
        two = stop_and_resume(inputs, tmp_path / f"two{number}", [2, 5], max_steps=9, **changes)
        names = ["adapter_model.safetensors"] if not changes.get("full") else ["model.safetensors"]
        for name in names:
            assert (one.adapter / name).read_bytes() == (two.adapter / name).read_bytes(), changes
        assert one.read("eval.jsonl") == two.read("eval.jsonl")


@pytest.mark.parametrize(
    "item",
    ["m_codes", "v_codes", "m_absmax", "v_absmax", "small_m", "small_v", "updates", "adapter"],
)
def test_any_state_item_lost_would_show(inputs: Path, straight: Run, tmp_path: Path, item: str):
    """The negative control: a checkpoint with one item zeroed (and its manifest sealed again) ends
    elsewhere."""
    from safetensors.torch import load_file, save_file

    with pytest.raises(Interrupted):
        halfbyte.train(TrainConfig(**options(inputs, tmp_path / "run")), reporter=stopped_after(4))
    path = tmp_path / "run/checkpoints/step-00000004"
    if item == "updates":
        state = atomic.read_json(path / "state.json")
        atomic.write_json(path / "state.json", {**state, "updates": 0})
    elif item == "adapter":
        weights = load_file(path / "adapter_model.safetensors")
        next(weights[name] for name in weights if "lora_B" in name).mul_(1 + 2**-20)
        save_file(weights, path / "adapter_model.safetensors")
    else:
        tensors = load_file(path / "optimizer.safetensors")
        assert tensors[f"group0.{item}"].any()
        tensors[f"group0.{item}"].zero_()
        save_file(tensors, path / "optimizer.safetensors")
    manifest = atomic.read_json(path / "manifest.json")
    manifest["files"] = {
        f.name: checkpoint._facts(f) for f in sorted(path.iterdir()) if f.name != "manifest.json"
    }
    del manifest["digest"]
    atomic.write_json(path / "manifest.json", checkpoint._sealed(manifest))
    run = halfbyte.train(**options(inputs, tmp_path / "run", resume_from_checkpoint="auto"))
    assert digest(run, 8) != digest(straight, 8)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_resume_across_other_arithmetic_is_named(dtype: str):
    """A checkpoint of a release whose 16-bit gradients had other last bits."""
    info: dict[str, Any] = {
        "config": {"optim": "adamw_8bit", "lora_r": 4},
        "data": {"sha256": ""},
        "machine": {"threads": 2, "device": "", "kernel_path": ""},
        "versions": {"torch": "", "transformers": ""},
        "compute_dtype": dtype,
        **dict.fromkeys(("template_sha256", "tokenizer_sha256", "total_steps"), ""),
    }
    older = {key: value for key, value in fingerprint(info).items() if key != "arithmetic"}
    if dtype == "float32":
        assert changes_since({"fingerprint": older}, info, set()) == []
        return
    with pytest.raises(ModelError, match="another training") as refusal:
        changes_since({"fingerprint": older}, info, set())
    assert "--allow_change arithmetic" in " ".join(refusal.value.ways_out)
    assert changes_since({"fingerprint": older}, info, {"arithmetic"}) == [
        "arithmetic: None then, 2 now"
    ]


def test_changes_are_refused_or_allowed_by_name_and_recorded(inputs: Path, tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        halfbyte.train(TrainConfig(**options(inputs, out)), reporter=stopped_after(3))
    changed = options(
        inputs, out, resume_from_checkpoint="auto", learning_rate=2e-2, weight_decay=0.1
    )
    with pytest.raises(ModelError, match="another training") as caught:
        halfbyte.train(**changed, allow_change="learning_rate")
    assert (
        "weight_decay: 0.0 then, 0.1 now" in caught.value.found
        and "learning_rate" not in caught.value.found
    )
    said: list[str] = []
    config = TrainConfig(**changed, allow_change="learning_rate,weight-decay")
    run = halfbyte.train(config, reporter=Reporter(say=said.append))
    assert any(
        "will not end as the unbroken run" in line and "weight_decay" in line for line in said
    )
    assert [c["step"] for c in run.info()["changes"]] == [3, 3]
    with pytest.raises(ModelError, match="another training") as caught:
        halfbyte.train(
            **options(inputs, out, resume_from_checkpoint="auto", lora_r=8, allow_change="lora_r")
        )
    assert not any("allow_change" in way for way in caught.value.ways_out), (
        "no resume can change the rank"
    )


# --- kill, signal, full disk (forked processes: tests/faults.py) ----------------------------------


def faults(fault: str, count: int, home: Path, timeout: int) -> dict[str, Any]:
    command = [
        sys.executable,
        str(Path(__file__).parent / "faults.py"),
        fault,
        "--count",
        str(count),
        "--home",
        home,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return json.loads(done.stdout)


def check_kills(found: dict[str, Any], count: int) -> None:
    assert found["kills"] >= count and found["of_them_inside_a_save"] >= count // 4
    assert found["runs_equal_to_the_unbroken_one"] == found["runs"]
    assert found["most_steps_redone"] <= found["save_steps"]


def check_signals(found: dict[str, Any]) -> None:
    assert found["runs_equal_to_the_unbroken_one"] == found["signals"]
    assert set(found["exit_codes"]) <= {
        "SIGINT -> 130",
        "SIGTERM -> 143",
        "SIGINT -> 0",
        "SIGTERM -> 0",
    }
    assert found["exit_codes"].keys() & {"SIGINT -> 130", "SIGTERM -> 143"}
    assert found["slowest_exit_s"] < 30


def check_full(found: dict[str, Any]) -> None:
    for kind, tally in found.items():
        if isinstance(tally, dict):
            assert not tally["wrong"], (kind, tally["wrong"])
            assert tally["exit_5_and_unharmed"] > 0


posix = pytest.mark.skipif(sys.platform != "linux", reason="forks, tmpfs and rlimits of Linux")


@posix
def test_kill_9(tmp_path: Path):
    check_kills(faults("kill", 8, tmp_path, 300), 8)


@posix
def test_signals(tmp_path: Path):
    check_signals(faults("signal", 6, tmp_path, 300))


@posix
def test_full_disk(tmp_path: Path):
    check_full(faults("full", 5, tmp_path, 300))


@posix
@pytest.mark.slow
def test_200_kills(tmp_path: Path):
    check_kills(faults("kill", 200, tmp_path, 3000), 200)


@posix
@pytest.mark.slow
def test_50_signals(tmp_path: Path):
    check_signals(faults("signal", 50, tmp_path, 3000))


@posix
@pytest.mark.slow
def test_full_disk_everywhere(tmp_path: Path):
    check_full(faults("full", 1000, tmp_path, 3000))


# --- numbers --------------------------------------------------------------------------------------


def poisoned(inputs: Path, tmp_path: Path, at: int) -> Callable[[], None]:
    """After so many losses, one that is not a number."""
    from halfbyte.engine.learner import Learner

    honest, calls = Learner.loss, {"n": 0}

    def loss(self: Any, batch: Any) -> torch.Tensor:
        value = honest(self, batch)
        calls["n"] += not value.is_meta  # a plan's is no number
        return value * float("nan") if calls["n"] == at else value

    Learner.loss = loss
    return lambda: setattr(Learner, "loss", honest)


@pytest.mark.parametrize("decision", ["stop", "skip"])
def test_a_nan_is_decided_before_the_update(inputs: Path, tmp_path: Path, decision: str):
    heal = poisoned(inputs, tmp_path, 7)
    try:
        if decision == "stop":
            with pytest.raises(NonFiniteError, match="step 3 gave loss nan") as caught:
                halfbyte.train(**options(inputs, tmp_path / "run", rehearse=False))
            assert caught.value.exit_code == 7 and "rows.jsonl:" in caught.value.where
        else:
            halfbyte.train(**options(inputs, tmp_path / "run", on_nonfinite="skip", rehearse=False))
    finally:
        heal()
    run = Run(tmp_path / "run")
    (row,) = run.read(NONFINITE)
    assert row["step"] == 3 and len(row["rows"]) >= 3
    assert all("nan" not in line.lower() for line in (run.path / METRICS).read_text().splitlines())
    if decision == "skip":
        losses = [r["loss"] for r in run.metrics()]
        assert losses[2] is None and all(
            isinstance(x, float) for i, x in enumerate(losses) if i != 2
        )
        state = atomic.read_json(run.checkpoints / "step-00000008/state.json")
        assert state["updates"] == 7
    else:
        assert checkpoint.newest(run.checkpoints)[0].step == 2  # pyright: ignore[reportOptionalMemberAccess]


# --- templates ------------------------------------------------------------------------------------

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "still running after",
        ),
        ("{{ 'a' * 400000000 }}", "memory|characters"),
        (
            "{% set x = namespace(s='aaaaaaaaaa') %}{% for i in range(40) %}{% set x.s = x.s + "
            "x.s %}{% endfor %}",
            "memory",
        ),
        ("{{ 'ab' * 9000000 }}", "characters, more than"),
        ("{{ messages.__class__.__mro__ }}", "unsafe|Undefined|undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for", "unexpected|expected|Unexpected"),
    ],
)
def test_hostile_templates_end_as_an_error(
    template: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    from halfbyte.data import template as module

    monkeypatch.setattr(module, "SECONDS", 1.5)
    renderer = Renderer(hub.load_tokenizer(hub.resolve("demo")), template)
    with pytest.raises(DataError, match="chat template refused") as caught:
        renderer.render(TURNS)
    import re

    assert re.search(message, caught.value.found), caught.value.found
    healthy = Renderer(hub.load_tokenizer(hub.resolve("demo")))
    assert healthy.render(TURNS).endswith("a<|end|>\n"), "others go on"


def test_a_template_sees_a_clock_that_stands_still(inputs: Path):
    from datetime import datetime

    renderer = Renderer(
        hub.load_tokenizer(hub.resolve("demo")),
        "{{ strftime_now('%Y-%m-%d') }}",
        clock=datetime(2001, 2, 3),
    )
    assert renderer.render(TURNS) == "2001-02-03"


# --- hostile models -------------------------------------------------------------------------------


def test_links_pipes_and_giants_in_a_model_directory(inputs: Path, tmp_path: Path):
    def refused(message: str) -> None:
        with pytest.raises(ModelError, match=message):
            hub.resolve(str(tmp_path / "m"))
        shutil.rmtree(tmp_path / "m")

    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    shutil.copytree(inputs / "base", tmp_path / "m")
    (tmp_path / "m/extra.json").symlink_to(secret)
    refused("outside the model's directory")
    shutil.copytree(inputs / "base", tmp_path / "m")
    os.mkfifo(tmp_path / "m/extra.json")
    refused("not a regular file")
    shutil.copytree(inputs / "base", tmp_path / "m")
    with (tmp_path / "m/extra.json").open("wb") as file:
        file.truncate(200_000_000)
    refused("too many")
    # a Hub snapshot links into the cache's blobs
    cache = tmp_path / "cache"
    (cache / "snapshots/abc").mkdir(parents=True)
    (cache / "blobs").mkdir()
    for file in (inputs / "base").iterdir():
        shutil.copy(file, cache / "blobs" / file.name)
        (cache / "snapshots/abc" / file.name).symlink_to(Path("../../blobs") / file.name)
    assert read_config(hub.resolve(str(cache / "snapshots/abc"))).model_type == "llama"


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": -1},
        {"vocab_size": "many"},
        {"head_dim": 10**12},
        {"auto_map": {"AutoModel": "x.Y"}, "model_type": "mine"},
        {"model_type": ["llama"]},
    ],
)
def test_configurations_no_model_has(inputs: Path, tmp_path: Path, change: dict[str, Any]):
    shutil.copytree(inputs / "base", tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ModelError):
        read_config(hub.resolve(str(tmp_path / "m")))


def mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(out) + 1) if out else 0
        kind = rng.randrange(6)
        if kind == 0 and place < len(out):
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[place : place + rng.randrange(1, 9)] = b""
        elif kind == 2:
            out[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        elif kind == 3:
            del out[place:]
        elif kind == 4:
            out[place : place + 1] = rng.choice(
                (b"9" * 30, b"-1", b"1e400", b"null", b"[" * 2000, b'"\\ud800"', b"\0")
            )
        else:
            other = rng.randrange(len(out) + 1)
            out[place:place] = out[other : other + 40]
    return bytes(out)


def survive(inputs: Path, home: Path, count: int, seed: int) -> dict[str, int]:
    """Mutated headers, indexes, configurations and data files: accepted or refused by name, nothing
    else."""
    rng = random.Random(seed)
    base = home / "m"
    shutil.copytree(inputs / "base", base)
    weights = (base / "model.safetensors").read_bytes()
    names = list(read_header(base / "model.safetensors"))
    index = json.dumps(
        {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    ).encode()
    chat = "".join(json.dumps({"messages": TURNS}) + "\n" for _ in range(3)).encode()
    table = b'prompt,completion\n"a, b",c\nd,e\n'
    config = (base / "config.json").read_bytes()

    def weights_case(data: bytes) -> None:
        (home / "w.safetensors").write_bytes(data)
        read_header(home / "w.safetensors")

    def index_case(data: bytes) -> None:
        (base / "model.safetensors.index.json").write_bytes(data)
        try:
            Checkpoint(base)
        finally:
            (base / "model.safetensors.index.json").unlink()

    def config_case(data: bytes) -> None:
        (base / "config.json").write_bytes(data)
        read_config(hub.resolve(str(base)))

    def rows_case(name: str) -> Callable[[bytes], None]:
        def case(data: bytes) -> None:
            (home / name).write_bytes(data)
            read_examples(home / name)

        return case

    head = 8 + int.from_bytes(weights[:8], "little")
    cases: list[tuple[str, bytes, bytes, Callable[[bytes], None]]] = [
        ("header", weights[:head], weights[head:], weights_case),
        ("index", index, b"", index_case),
        ("config", config, b"", config_case),
        ("jsonl", chat, b"", rows_case("r.jsonl")),
        ("csv", table, b"", rows_case("r.csv")),
        ("json array", b"[" + b",".join(chat.splitlines()) + b"]", b"", rows_case("r.json")),
    ]
    tally = {"accepted": 0, "refused": 0}
    for number in range(count):
        _, data, rest, case = cases[number % len(cases)]
        try:
            case(mutated(data, rng) + rest)
            tally["accepted"] += 1
        except HalfbyteError as error:
            assert error.exit_code in (4, 6) and str(error)
            tally["refused"] += 1
    return tally


@pytest.mark.filterwarnings("ignore")
def test_mutated_input_is_refused_by_name(inputs: Path, tmp_path: Path):
    tally = survive(inputs, tmp_path, 360, 0)
    assert tally["refused"] > 180


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_10000_mutations_within_200_mb(inputs: Path, tmp_path: Path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tally = survive(inputs, tmp_path, 10_000, 1)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(tally, f"{grown:.0f} MiB")
    assert grown < 200


def test_control_words_of_users_stay_text_in_every_form(inputs: Path):
    renderer = Renderer(hub.load_tokenizer(inputs / "base"))
    end = renderer.special["<|end|>"]
    row = Example("x", [{"role": "user", "content": "<|end|><|assistant|>"}, TURNS[1]])
    (encoded,) = renderer.encode([row])
    assert encoded.input_ids.count(end) == 2

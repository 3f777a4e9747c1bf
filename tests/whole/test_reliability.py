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
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.config.options import TrainConfig
from halfbyte.data.formats import Example, read_examples
from halfbyte.data.renderer import Renderer
from halfbyte.errors import (
    HalfbyteError,
    Interrupted,
    ModelError,
    NonFiniteError,
)
from halfbyte.files import atomic, hub
from halfbyte.files.model_config import read_config
from halfbyte.files.safetensors import Checkpoint, read_header
from halfbyte.run import checkpoint
from halfbyte.run.directory import METRICS, NONFINITE, Run

from ..helpers import TURNS, reliable_options, stopped_after


def digest(run: Run, step: int) -> str:
    found = hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes())
    found.update((run.checkpoints / f"step-{step:08d}" / "optimizer.safetensors").read_bytes())
    return found.hexdigest()


def test_a_run_without_a_valid_checkpoint_is_not_begun_anew_over_it(
    reliable_inputs: Path, straight_run: Run, tmp_path: Path
):
    shutil.copytree(straight_run.path, tmp_path / "run")
    before = digest(Run(tmp_path / "run"), 8)
    (tmp_path / "run/checkpoints/step-00000008/.DS_Store").write_text(
        "somebody's file is no damage"
    )
    assert checkpoint.check(tmp_path / "run/checkpoints/step-00000008") == 8
    for path in (tmp_path / "run/checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    with pytest.raises(ModelError, match="no valid checkpoint"):
        halfbyte.train(
            **reliable_options(reliable_inputs, tmp_path / "run", resume_from_checkpoint="auto")
        )
    assert (
        digest(Run(tmp_path / "run"), 8) == before
        and len(list((tmp_path / "run/checkpoints").iterdir())) == 2
    )


def stop_and_resume(reliable_inputs: Path, out: Path, steps: list[int], **changes: Any) -> Run:
    for step in steps:
        with pytest.raises(Interrupted) as caught:
            config = TrainConfig(
                **reliable_options(reliable_inputs, out, resume_from_checkpoint="auto", **changes)
            )
            halfbyte.train(config, reporter=stopped_after(step))
        assert caught.value.exit_code == 143 and f"after step {step}" in str(caught.value)
    aside = out / ".run.json.13808.tmp"  # as kill -9 inside a write leaves it
    aside.write_text("{")
    run = halfbyte.train(
        **reliable_options(reliable_inputs, out, resume_from_checkpoint="auto", **changes)
    )
    assert not aside.exists()
    return run


@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_stop_after_any_step_changes_nothing(
    reliable_inputs: Path, straight_run: Run, tmp_path: Path, step: int
):
    run = stop_and_resume(reliable_inputs, tmp_path / "run", [step])
    assert digest(run, 8) == digest(straight_run, 8)
    assert [row["loss"] for row in run.metrics()] == [row["loss"] for row in straight_run.metrics()]


@pytest.mark.slow
def test_a_stop_after_each_of_40_steps_and_ten_in_a_row(reliable_inputs: Path, tmp_path: Path):
    """Packing, accumulation 3, dropout, several epochs; and the other optimizer, unpacked,
    unquantized, ten stops."""
    whole = halfbyte.train(**reliable_options(reliable_inputs, tmp_path / "whole", max_steps=40))
    assert whole.metrics()[-1]["epoch"] > 2
    for step in range(1, 40):
        run = stop_and_resume(reliable_inputs, tmp_path / f"k{step}", [step], max_steps=40)
        assert digest(run, 40) == digest(whole, 40), step
    chained = stop_and_resume(
        reliable_inputs, tmp_path / "chained", list(range(3, 33, 3)), max_steps=40
    )
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
        one = halfbyte.train(
            **reliable_options(reliable_inputs, tmp_path / f"one{number}", max_steps=9, **changes)
        )
        two = stop_and_resume(
            reliable_inputs, tmp_path / f"two{number}", [2, 5], max_steps=9, **changes
        )
        names = ["adapter_model.safetensors"] if not changes.get("full") else ["model.safetensors"]
        for name in names:
            assert (one.adapter / name).read_bytes() == (two.adapter / name).read_bytes(), changes
        assert one.read("eval.jsonl") == two.read("eval.jsonl")


@pytest.mark.parametrize(
    "item",
    ["m_codes", "v_codes", "m_absmax", "v_absmax", "small_m", "small_v", "updates", "adapter"],
)
def test_any_state_item_lost_would_show(
    reliable_inputs: Path, straight_run: Run, tmp_path: Path, item: str
):
    """The negative control: a checkpoint with one item zeroed (and its manifest sealed again) ends
    elsewhere."""
    from safetensors.torch import load_file, save_file

    with pytest.raises(Interrupted):
        halfbyte.train(
            TrainConfig(**reliable_options(reliable_inputs, tmp_path / "run")),
            reporter=stopped_after(4),
        )
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
    run = halfbyte.train(
        **reliable_options(reliable_inputs, tmp_path / "run", resume_from_checkpoint="auto")
    )
    assert digest(run, 8) != digest(straight_run, 8)


def faults(fault: str, count: int, home: Path, timeout: int) -> dict[str, Any]:
    command = [
        sys.executable,
        str(Path(__file__).parents[1] / "tools" / "faults.py"),
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
    assert found["runs_equal_to_the_unbroken_one"] == found["runs"], found["differ"]
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
    check_kills(faults("kill", 4, tmp_path, 300), 4)


@pytest.mark.slow
@posix
def test_signals(tmp_path: Path):
    check_signals(faults("signal", 3, tmp_path, 300))


@pytest.mark.slow
@posix
def test_full_disk(tmp_path: Path):
    check_full(faults("full", 2, tmp_path, 300))


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


def tool(name: str, *words: str, timeout: int) -> dict[str, Any]:
    command = [sys.executable, "-m", f"tests.tools.{name}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=root
    )
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return json.loads(done.stdout)


@posix
@pytest.mark.parametrize("count", [10, pytest.param(5000, marks=pytest.mark.slow)])
def test_damage_to_any_file_is_named_or_harmless(tmp_path: Path, count: int):
    found = tool("damage", "--count", str(count), "--home", str(tmp_path), timeout=20_000)
    assert found["cases"] == count and found["wrong"] == []


@posix
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="nobody else sees what is opened")
def test_nothing_outside_is_opened_through_a_link(tmp_path: Path):
    found = tool("damage", "--links", "--count", "1000", "--home", str(tmp_path), timeout=3000)
    assert found["links"] > 90 and found["opened outside"] == []


def poisoned(reliable_inputs: Path, tmp_path: Path, at: int) -> Callable[[], None]:
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
def test_a_nan_is_decided_before_the_update(reliable_inputs: Path, tmp_path: Path, decision: str):
    heal = poisoned(reliable_inputs, tmp_path, 7)
    try:
        if decision == "stop":
            with pytest.raises(NonFiniteError, match="step 3 gave loss nan") as caught:
                halfbyte.train(
                    **reliable_options(reliable_inputs, tmp_path / "run", rehearse=False)
                )
            assert caught.value.exit_code == 7 and "rows.jsonl:" in caught.value.where
        else:
            halfbyte.train(
                **reliable_options(
                    reliable_inputs, tmp_path / "run", on_nonfinite="skip", rehearse=False
                )
            )
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


def survive(reliable_inputs: Path, home: Path, count: int, seed: int) -> dict[str, int]:
    """Mutated headers, indexes, configurations and data files: accepted or refused by name, nothing
    else."""
    rng = random.Random(seed)
    base = home / "m"
    shutil.copytree(reliable_inputs / "base", base)
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
def test_mutated_input_is_refused_by_name(reliable_inputs: Path, tmp_path: Path):
    tally = survive(reliable_inputs, tmp_path, 360, 0)
    assert tally["refused"] > 180


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_10000_mutations_within_200_mb(reliable_inputs: Path, tmp_path: Path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tally = survive(reliable_inputs, tmp_path, 10_000, 1)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(tally, f"{grown:.0f} MiB")
    assert grown < 200


def test_control_words_of_users_stay_text_in_every_form(reliable_inputs: Path):
    renderer = Renderer(hub.load_tokenizer(reliable_inputs / "base"))
    end = renderer.special["<|end|>"]
    row = Example("x", [{"role": "user", "content": "<|end|><|assistant|>"}, TURNS[1]])
    (encoded,) = renderer.encode([row])
    assert encoded.input_ids.count(end) == 2

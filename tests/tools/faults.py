"""Faults on purpose: trainings that are killed, signalled and starved, each in a forked process of
its own.

    python tests/faults.py kill|signal|full --count N --seed S --home DIR

prints one JSON document. torch and transformers are imported once and compute nothing here, so that
every fork starts clean in a few milliseconds. A trial trains a tiny random Llama with packing,
accumulation and dropout, disturbs it, resumes it until it is done, and compares sha256 of adapter
and optimizer with the undisturbed run's.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import halfbyte.engine.evaluate
import halfbyte.training.trainer  # noqa: F401
from halfbyte.cli import run as cli
from halfbyte.files import hub
from halfbyte.run import checkpoint

STEPS, EVERY = 12, 3


def make_inputs(home: Path) -> None:
    """A base of random weights with the built-in tokenizer, and rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=3072,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(home / "base")
    builtin = hub.resolve("demo")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(builtin / name, home / "base" / name)
    rows = [{"instruction": f"say {i}", "output": f"number {i} " * (i % 5 + 1)} for i in range(40)]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(home: Path, out: Path) -> list[str]:
    given = {
        "data": home / "rows.jsonl",
        "output_dir": out,
        "dtype": "float32",
        "max_length": 64,
        "packing": "true",
        "lora_r": 32,
        "lora_dropout": 0.1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_steps": STEPS,
        "save_steps": EVERY,
        "eval_split": 4,
        "eval_steps": 5,
        "num_samples": 1,
        "resume_from_checkpoint": "auto",
    }
    return [
        "train",
        str(home / "base"),
        *(str(x) for key, value in given.items() for x in (f"--{key}", value)),
    ]


def forked(work: Callable[[], int], log: Path) -> int:
    """Run work in a forked process; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        torch.set_num_threads(1)
        code = work()
    finally:
        os._exit(code)


def wait(pid: int, timeout: float = 120.0) -> int:
    """Exit code as a shell gives it: 128 + n for a signal."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"process {pid} hung")


def digest(out: Path) -> dict[str, str]:
    files = [
        "adapter/adapter_model.safetensors",
        f"checkpoints/step-{STEPS:08d}/optimizer.safetensors",
    ]
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in files}


def newest_step(out: Path) -> int:
    found, _ = checkpoint.newest(out / "checkpoints")
    return 0 if found is None else found.step


def logged_step(out: Path) -> int:
    try:
        lines = (out / "metrics.jsonl").read_text().split("\n")
    except OSError:
        return 0
    steps = [0]
    for line in lines:
        try:
            steps.append(json.loads(line)["step"])
        except (ValueError, KeyError):
            continue
    return max(steps)


def leftovers(out: Path) -> list[str]:
    return sorted(
        str(p.relative_to(out))
        for p in out.rglob("*")
        if ".tmp" in p.name or p.name.startswith(".probe")
    )


# --- points inside a save -------------------------------------------------------------------------


def count_points(act: Callable[[int], None], *, removals: bool = True) -> None:
    """Call act(n) before the n-th write, sync, rename or removal inside `checkpoint.save` (in this
    process).

    Args:
        removals: count them, too. They are told to ignore errors, so an act that raises one has no
            place there.
    """
    state = {"inside": False, "n": 0}
    save = checkpoint.save

    def saving(*args: Any, **kwargs: Any) -> Any:
        state["inside"] = True
        try:
            return save(*args, **kwargs)
        finally:
            state["inside"] = False

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if state["inside"]:
                state["n"] += 1
                act(state["n"])
            return function(*args, **kwargs)

        return call

    checkpoint.save = saving
    for owner, name in (
        (os, "fsync"),
        (Path, "write_bytes"),
        (Path, "replace"),
        (Path, "rename"),
        (Path, "mkdir"),
        (shutil, "rmtree"),
    )[: None if removals else -1]:
        setattr(owner, name, watched(getattr(owner, name)))


def die_at(point: int) -> Callable[[], None]:
    def patch() -> None:
        count_points(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == point else None)

    return patch


# --- trials ---------------------------------------------------------------------------------------


def undisturbed(home: Path) -> tuple[dict[str, str], float, int]:
    """(digests, seconds, points inside all saves) of a run nobody disturbs."""
    began = time.monotonic()
    assert wait(forked(lambda: cli(arguments(home, home / "straight")), home / "straight.log")) == 0
    seconds = time.monotonic() - began

    def counting() -> int:
        descriptor = os.open(home / "points", os.O_WRONLY | os.O_CREAT)
        count_points(lambda n: os.pwrite(descriptor, f"{n:8}".encode(), 0) and None)
        return cli(arguments(home, home / "counted"))

    assert wait(forked(counting, home / "counted.log")) == 0
    assert digest(home / "straight") == digest(home / "counted"), (
        "the run itself is not reproducible"
    )
    return digest(home / "straight"), seconds, int((home / "points").read_text())


def kill(home: Path, count: int, seed: int) -> dict[str, Any]:
    """kill -9 at random times and at numbered points inside saves, some thrice in a row; then
    resume to the end."""
    expected, seconds, points = undisturbed(home)
    rng = random.Random(seed)
    kills = at_points = equal = runs = worst = 0
    differ: list[str] = []
    while kills < count:
        out = home / f"run{runs}"
        runs += 1
        for _ in range(3 if runs % 5 == 0 else 1):
            inside = kills % 2 == 0
            patch = die_at(rng.randint(1, points)) if inside else lambda: None

            def work(patch: Callable[[], None] = patch, out: Path = out) -> int:
                patch()
                return cli(arguments(home, out))

            pid = forked(work, home / "log")
            if not inside:
                time.sleep(rng.uniform(0, seconds))
                os.kill(pid, signal.SIGKILL)
            code = wait(pid)
            kills += 1
            at_points += inside and code == 137
            worst = max(worst, logged_step(out) - newest_step(out))
        assert wait(forked(lambda out=out: cli(arguments(home, out)), home / "log")) == 0, (
            home / "log"
        ).read_text()
        steps = [
            json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()
        ]
        wrong = [f"left over: {name}" for name in leftovers(out)]
        wrong += ["other bytes"] if digest(out) != expected else []
        wrong += [f"steps {steps}"] if steps != list(range(1, STEPS + 1)) else []
        differ += [f"run {runs - 1}: {each}" for each in wrong]
        equal += not wrong
        if wrong:
            shutil.move(out, home / f"differs{runs - 1}")
        else:
            shutil.rmtree(out)
    return {
        "differ": differ,
        "kills": kills,
        "of_them_inside_a_save": at_points,
        "points_inside_the_saves_of_a_run": points,
        "runs": runs,
        "runs_equal_to_the_unbroken_one": equal,
        "most_steps_redone": worst,
        "save_steps": EVERY,
    }


def signals(home: Path, count: int, seed: int) -> dict[str, Any]:
    """SIGINT or SIGTERM at random moments, every third time twice; exit code, time to leave, and an
    exact resume."""
    expected, seconds, _ = undisturbed(home)
    rng = random.Random(seed)
    codes: dict[str, int] = {}
    equal, slowest = 0, 0.0
    for trial in range(count):
        out = home / f"run{trial}"
        number = signal.SIGINT if trial % 2 else signal.SIGTERM
        pid = forked(lambda out=out: cli(arguments(home, out)), home / "log")
        time.sleep(rng.uniform(0.01, seconds))
        began = time.monotonic()
        os.kill(pid, number)
        if trial % 3 == 0:  # somebody who will not wait: leaves at once, and as safely
            time.sleep(rng.uniform(0, 0.05))
            os.kill(pid, number)
        code = wait(pid)
        slowest = max(slowest, time.monotonic() - began)
        codes[f"{signal.Signals(number).name} -> {code}"] = (
            codes.get(f"{signal.Signals(number).name} -> {code}", 0) + 1
        )
        assert wait(forked(lambda out=out: cli(arguments(home, out)), home / "log")) == 0, (
            home / "log"
        ).read_text()
        equal += digest(out) == expected and not leftovers(out)
        shutil.rmtree(out)
    return {
        "signals": count,
        "exit_codes": codes,
        "runs_equal_to_the_unbroken_one": equal,
        "slowest_exit_s": round(slowest, 2),
    }


def full(home: Path, count: int, seed: int) -> dict[str, Any]:
    """A disk that is full at every 4 KiB across a save, a file size limit, and every write, sync or
    rename failing."""
    _, _, points = undisturbed(home)
    return {
        "tmpfs": _disk_full(home, count),
        "file_size_limit": _size_limits(home, count),
        "failing_call": _failing_calls(home, points, count),
    }


def _after_failure(out: Path, log: Path, step_before: int) -> list[str]:
    """What is wrong after a save that failed."""
    wrong = []
    if newest_step(out) < step_before:
        wrong.append(f"the checkpoint of step {step_before} is gone")
    if left := leftovers(out):
        wrong.append(f"left behind: {left}")
    if "cannot" not in log.read_text() and "free" not in log.read_text():
        wrong.append("no message")
    return wrong


def _trial(home: Path, out: Path, patch: Callable[[], None], tally: dict[str, Any]) -> None:
    """One training whose second save fails: exit 5, the first checkpoint valid, nothing left, a
    resume exact."""
    log = home / "log"
    log.unlink(missing_ok=True)

    def work() -> int:
        patch()
        # whose save would be the one that fails
        return cli([*arguments(home, out), "--rehearse", "false"])

    code = wait(forked(work, log))
    tally["tried"] += 1
    if code == 0:
        tally["went_through"] += 1
    elif code == 5 and not (wrong := _after_failure(out, log, EVERY)):
        tally["exit_5_and_unharmed"] += 1
    else:
        tally["wrong"].append([code, wrong if code == 5 else log.read_text()[-300:]])


def _tally() -> dict[str, Any]:
    return {"tried": 0, "exit_5_and_unharmed": 0, "went_through": 0, "wrong": []}


def _prepared(home: Path, out: Path) -> None:
    """A run stopped after its first checkpoint (so that the next thing it writes is the second)."""
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(home / "straight", out)
    for path in (out / "checkpoints").iterdir():
        shutil.rmtree(path)
    shutil.rmtree(out / "adapter")
    shutil.copytree(home / "first", out / "checkpoints" / f"step-{EVERY:08d}")


def _first_checkpoint(home: Path) -> None:
    """Keep the checkpoint after the first save interval of a run."""
    if (home / "first").exists():
        return

    def work() -> int:
        save = checkpoint.save

        def once(*args: Any, **kwargs: Any) -> Any:
            path = save(*args, **kwargs)
            if path.parent.name != "checkpoints":
                return path  # the rehearsal's
            shutil.copytree(path, home / "first")
            os._exit(0)

        checkpoint.save = once
        return cli(arguments(home, home / "begun"))

    wait(forked(work, home / "log"))


def _disk_full(home: Path, count: int) -> dict[str, Any] | str:
    mount = home / "small"
    mount.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", mount], capture_output=True
    ).returncode:
        return "no tmpfs can be mounted here"
    _first_checkpoint(home)
    tally = _tally()
    try:
        one = sum(f.stat().st_size for f in (home / "first").iterdir())
        sizes = range(0, one + (96 << 10), 4096)
        for space in list(sizes)[:: max(1, len(sizes) // count)]:
            out = mount / "run"
            _prepared(home, out)

            def patch(space: int = space) -> None:
                # the disk fills up after the free-space check, as when another program writes
                checkpoint.refuse_full_disk = lambda *args: None

                def fill(n: int) -> None:
                    if n == 1:
                        free = shutil.disk_usage(mount).free
                        with open(mount / "filler", "wb", buffering=0) as file:  # noqa: PTH123
                            file.write(b"\0" * max(0, free - space))

                count_points(fill)

            _trial(home, out, patch, tally)
            (mount / "filler").unlink(missing_ok=True)
            shutil.rmtree(out)
    finally:
        subprocess.run(["umount", mount], capture_output=True)
    return tally


def _size_limits(home: Path, count: int) -> dict[str, Any]:
    _first_checkpoint(home)
    tally = _tally()
    largest = max(f.stat().st_size for f in (home / "first").iterdir())
    for limit in list(range(4096, largest, 4096))[:: max(1, largest // 4096 // count)]:
        out = home / "limited"
        _prepared(home, out)

        def patch(limit: int = limit) -> None:
            def lower(n: int) -> None:
                if n == 1:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

            count_points(lower)

        _trial(home, out, patch, tally)
    return tally


def _failing_calls(home: Path, points: int, count: int) -> dict[str, Any]:
    _first_checkpoint(home)
    tally = _tally()
    per_save = points // (STEPS // EVERY + 1)  # and the rehearsal's
    for point in list(range(1, per_save + 1))[:: max(1, per_save // count)]:
        out = home / "failing"
        _prepared(home, out)

        def patch(point: int = point) -> None:
            def fail(n: int) -> None:
                if n == point:
                    raise OSError(28, "No space left on device")

            count_points(fail, removals=False)

        _trial(home, out, patch, tally)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fault", choices=["kill", "signal", "full"])
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, required=True)
    given = parser.parse_args()
    given.home.mkdir(parents=True, exist_ok=True)
    # forked: nothing is computed in here
    pid = forked(lambda: make_inputs(given.home) or 0, given.home / "log")
    assert wait(pid) == 0, (given.home / "log").read_text()
    print(
        json.dumps(
            {"kill": kill, "signal": signals, "full": full}[given.fault](
                given.home, given.count, given.seed
            )
        )
    )


if __name__ == "__main__":
    sys.exit(main())

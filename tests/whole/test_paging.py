"""What leaves memory and comes back: the same numbers, whatever lies where."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte
from halfbyte.cli import run
from halfbyte.config.options import TrainConfig
from halfbyte.engine import learner
from halfbyte.engine.learner import Learner
from halfbyte.errors import DoesNotFit, Interrupted, StorageError
from halfbyte.memory import recompute
from halfbyte.memory.mapped_files import ScratchFile
from halfbyte.planning.memory_plan import MemoryPlan
from halfbyte.progress import Reporter
from halfbyte.run.directory import Run
from halfbyte.training import recovery
from halfbyte.training.trainer import Trainer, run_training
from halfbyte.training.trainer import train as train_config

from ..helpers import MIB


@pytest.mark.slow
def test_a_quantized_model_trains_as_the_one_it_was_made_from(
    orders: Path,
    unpaged: dict[str, str],
    tmp_path: Path,
    own_cache: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert run(["quantize", "demo", "-o", str(tmp_path / "q"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["coverage"] == 1.0
        and 0 < max(each["relative_mse"] for each in found["tensors"]) < 0.02
    )
    assert (tmp_path / "q/tokenizer.json").is_file() and (
        tmp_path / "q/chat_template.jinja"
    ).is_file()
    assert train(tmp_path / "a", orders, model=str(tmp_path / "q")) == unpaged
    assert (
        train(tmp_path / "b", orders, model=str(tmp_path / "q"), weight_streaming="always")
        == unpaged
    )
    assert not any(own_cache.glob("*")), "it is streamed from where it lies"
    assert run(["quantize", "demo", "-o", str(tmp_path / "q")]) == 2, "never over something"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


WAYS: dict[str, dict[str, Any]] = {
    "paged": {"paging": "always"},
    "offloaded": {"activation_offloading": "always"},
    "streamed": {"weight_streaming": "always"},
    "all of it": {
        "paging": "always",
        "activation_offloading": "always",
        "weight_streaming": "always",
    },
    "kept in some": {"kept_activations": "all", "kept_layers": 3},
    "auto": {"kept_activations": "auto"},
}


def train(out: Path, data: Path, **more: Any) -> dict[str, str]:
    options: dict[str, Any] = {
        "max_steps": 5,
        "num_samples": 0,
        "gradient_accumulation_steps": 2,
        **more,
    }
    options = {
        "per_device_train_batch_size": 2,
        "kept_activations": "none",
        "optim": "adamw_8bit",
        **options,
    }
    if more.get("paging"):
        options["optim"] = "paged_adamw_8bit"
    halfbyte.train(**{"model": "demo", "data": str(data), "output_dir": str(out), **options})
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {
        name: files[name]["sha256"]
        for name in ("adapter_model.safetensors", "optimizer.safetensors")
    }


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("orders") / "rows.jsonl"
    lines = [{"prompt": f"{i} teas " * (1 + i % 5), "completion": f"{i} cups"} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def unpaged(orders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return train(tmp_path_factory.mktemp("unpaged"), orders)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_ends_with_the_same_bytes_whatever_lies_where(
    way: str, orders: Path, unpaged: dict[str, str], tmp_path: Path, own_cache: Path
):
    assert train(tmp_path / "run", orders, **WAYS[way]) == unpaged
    measured = [
        json.loads(line) for line in (tmp_path / "run/memory.jsonl").read_text().splitlines()
    ]
    steady = [row for row in measured if row["phase"] == "step"][-1]
    assert ("paged" in steady) == ("paging" in WAYS[way])
    if "paged" in steady:
        assert steady["paged"]["of them in memory"] <= 0.1 * steady["paged"]["optimizer states"]
    assert not [path for path in (tmp_path / "run").iterdir() if "tmp" in path.name]


@pytest.mark.slow
def test_a_run_resumes_in_another_mode_with_the_same_bytes(
    orders: Path, unpaged: dict[str, str], tmp_path: Path, own_cache: Path
):
    """Stopped after each step, gone on in the next mode."""
    modes = [{}, WAYS["all of it"], {"optim": "paged_adamw_8bit"}, WAYS["streamed"], WAYS["paged"]]
    out = tmp_path / "run"
    for step, mode in enumerate(modes):
        stop = {"save_steps": 1, "resume_from_checkpoint": "auto"}
        options: dict[str, Any] = {
            "model": "demo",
            "data": str(orders),
            "output_dir": str(out),
            "max_steps": 5,
            **stop,
        }
        options |= {
            "num_samples": 0,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
        }
        options |= {"kept_activations": "none", "optim": "adamw_8bit"}
        if mode.get("paging"):
            options["optim"] = "paged_adamw_8bit"
        config, honest = TrainConfig(**{**options, **mode}), Trainer.save

        def then_stop(trainer: Trainer, honest: Any = honest) -> None:
            honest(trainer)
            trainer.interrupts.signal = 15

        with pytest.MonkeyPatch.context() as patch:
            if step < 4:
                patch.setattr(Trainer, "save", then_stop)
            with pytest.raises(Interrupted) if step < 4 else contextlib.nullcontext():
                run_training(config, Run(out))
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    files = json.loads((newest / "manifest.json").read_text())["files"]
    assert (
        newest.name == "step-00000005"
        and {name: files[name]["sha256"] for name in unpaged} == unpaged
    )


class Exhausting:
    """Lets memory run out in the passes whose numbers are given, in the middle of their backward
    pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
        self.passes, self.numbers = 0, numbers
        honest = learner.Learner.loss
        layer = recompute._Layer.backward

        def loss(made: Learner, batch: Any) -> Tensor:
            self.passes += not next(made.model.parameters()).is_meta  # a plan's pass is none
            return honest(made, batch)

        def backward(ctx: Any, *grads: Tensor) -> Any:
            result = layer(ctx, *grads)
            if self.passes in self.numbers and not grads[0].is_meta:
                raise MemoryError("no memory, as the test wants it")
            return result

        monkeypatch.setattr(learner.Learner, "loss", loss)
        monkeypatch.setattr(recompute._Layer, "backward", staticmethod(backward))


def test_memory_that_runs_out_in_a_step_costs_that_step_once_more(
    orders: Path, unpaged: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three times: what changes no bit is done first, so the run ends with the same bytes."""
    Exhausting(monkeypatch, 1, 3, 8)
    more: dict[str, Any] = {
        "optim": "paged_adamw_8bit",
        "kept_activations": "all",
        "rehearse": False,
    }
    assert train(tmp_path / "run", orders, **more) == unpaged
    info = json.loads((tmp_path / "run/run.json").read_text())
    assert (
        info["config"]["paging"] == "always" and info["config"]["activation_offloading"] == "always"
    )
    assert info["config"]["kept_activations"] == "none" and not info["changes"]
    said = [json.loads(line) for line in (tmp_path / "run/memory.jsonl").read_text().splitlines()]
    assert [row["change"] for row in said if row["phase"] == "less"] == [
        {"paging": "always"},
        {"kept_activations": "none"},
        {"activation_offloading": "always"},
    ]


@pytest.mark.slow
def test_a_step_is_split_where_nothing_else_is_left_and_the_run_says_so(
    orders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Exhausting(monkeypatch, 2, 5)
    said: list[str] = []
    options: dict[str, Any] = {
        "model": "demo",
        "data": str(orders),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
        "num_samples": 0,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 4,
        "activation_offloading": "never",
        "kept_activations": "none",
        "optim": "adamw_8bit",
        "rehearse": False,
        "save_steps": 2,
    }
    train_config(TrainConfig(**options), reporter=Reporter(said.append))
    run = tmp_path / "run"
    tiny_rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in tiny_rows] == [1, 2, 3, 4] and tiny_rows[0][
        "passes"
    ] == 1 < tiny_rows[1]["passes"]
    info = json.loads((run / "run.json").read_text())
    assert info["config"]["tokens_per_pass"] > 0 and info["changes"][0]["step"] == 1
    assert "tokens_per_pass" in info["changes"][0]["change"]
    assert any("memory ran out" in line and "parts of at most" in line for line in said)
    monkeypatch.undo()
    shutil.rmtree(run / "checkpoints/step-00000004")  # as if it had been killed before
    shutil.rmtree(run / "adapter")
    train_config(TrainConfig(**options, resume_from_checkpoint="auto"))
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert (
        again[3]["loss"] == tiny_rows[3]["loss"] and again[3]["passes"] == tiny_rows[3]["passes"]
    ), "the split is kept"


@pytest.mark.slow
def test_a_resume_from_before_a_split_runs_whole_steps_again(
    orders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options: dict[str, Any] = {
        "model": "demo",
        "data": str(orders),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
    }
    options |= {
        "num_samples": 0,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 4,
    }
    options |= {
        "activation_offloading": "never",
        "kept_activations": "none",
        "optim": "adamw_8bit",
        "save_steps": 1,
    }
    options |= {"rehearse": False, "save_total_limit": 9}
    whole = tmp_path / "whole"
    train_config(TrainConfig(**{**options, "output_dir": str(whole)}))
    Exhausting(monkeypatch, 3)
    train_config(TrainConfig(**options))
    monkeypatch.undo()
    out = tmp_path / "run"
    info = json.loads((out / "run.json").read_text())
    assert info["changes"][0]["step"] == 2 and info["config"]["tokens_per_pass"]
    for later in ("step-00000003", "step-00000004"):
        shutil.rmtree(out / "checkpoints" / later)
    shutil.rmtree(out / "adapter")
    said: list[str] = []
    train_config(
        TrainConfig(**options, resume_from_checkpoint="auto"), reporter=Reporter(said.append)
    )
    assert any("it will end with the same bytes as an unbroken run" in line for line in said)
    info = json.loads((out / "run.json").read_text())
    assert not info["changes"] and not info["config"]["tokens_per_pass"]
    name = "checkpoints/step-00000004/adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_rehearsal_that_runs_out_goes_on_with_less(
    orders: Path, unpaged: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Exhausting(monkeypatch, 1, 2)
    assert (
        train(tmp_path / "run", orders, optim="paged_adamw_8bit", kept_activations="all") == unpaged
    )


def test_a_state_that_cannot_be_put_back_ends_the_run(
    orders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from halfbyte.run import checkpoint

    calls, honest = [0], checkpoint.restore

    def restore(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] == 1:
            raise MemoryError("no memory, as the test wants it")
        return honest(*arguments)

    monkeypatch.setattr(checkpoint, "restore", restore)
    first = train(tmp_path / "a", orders)
    assert calls[0] == 2, "it was tried again"
    monkeypatch.setattr(checkpoint, "restore", honest)
    assert first == train(tmp_path / "b", orders)

    def never(*arguments: Any) -> int:
        raise MemoryError("no memory, as the test wants it")

    monkeypatch.setattr(checkpoint, "restore", never)
    with pytest.raises(DoesNotFit, match="put back after the rehearsal"):
        train(tmp_path / "c", orders)
    assert not list((tmp_path / "c/checkpoints").glob("step-*")), "nothing of it was saved"


def test_room_is_made_before_memory_runs_out(
    orders: Path, unpaged: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is left decides: enough, and nothing is done; too little once, and the first remedy is
    taken."""
    module, needs, honest = recovery, [], MemoryPlan.live_bytes

    def live_bytes(plan: MemoryPlan, tokens: int) -> int:
        needs.append((honest(plan, tokens), plan))
        return needs[-1][0]

    monkeypatch.setattr(MemoryPlan, "live_bytes", live_bytes)
    monkeypatch.setattr(module, "headroom", lambda device: 1 << 40)
    more: dict[str, Any] = {"optim": "paged_adamw_8bit", "kept_activations": "all"}
    assert train(tmp_path / "enough", orders, **more) == unpaged
    tiny_rows = [
        json.loads(line) for line in (tmp_path / "enough/memory.jsonl").read_text().splitlines()
    ]
    assert not [row for row in tiny_rows if row["phase"] == "less"]
    answers = iter([1 << 40, 1000])
    monkeypatch.setattr(module, "headroom", lambda device: next(answers, 1 << 40))
    assert train(tmp_path / "short", orders, **more) == unpaged
    tiny_rows = [
        json.loads(line) for line in (tmp_path / "short/memory.jsonl").read_text().splitlines()
    ]
    (less,) = [row for row in tiny_rows if row["phase"] == "less"]
    assert less["change"] == {"paging": "always"} and "are left" in less["why"]
    for (
        need,
        plan,
    ) in needs:  # what a pass needs and what stays are no more than everything there is at the peak
        assert 0 < need <= plan.tensor_bytes - plan.bytes_of("4-bit codes", "adapters", "gradients")


def test_a_full_disk_leaves_the_other_remedies(
    orders: Path, unpaged: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):

    def full(self: ScratchFile, size: int, directory: Path) -> None:
        raise StorageError("the disk is full, as the test wants it")

    Exhausting(monkeypatch, 1)
    monkeypatch.setattr(ScratchFile, "__init__", full)
    more: dict[str, Any] = {
        "optim": "paged_adamw_8bit",
        "kept_activations": "all",
        "rehearse": False,
    }
    assert train(tmp_path / "run", orders, **more) == unpaged
    config = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert config["paging"] == "auto" and config["kept_activations"] == "none"


def test_memory_that_does_not_come_back_ends_the_run(
    orders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Exhausting(monkeypatch, *range(1, 1000))
    with pytest.raises(DoesNotFit, match="out of memory in this phase: step 1"):
        train(tmp_path / "run", orders, rehearse=False)
    kinds = [json.loads(line) for line in (tmp_path / "run/memory.jsonl").read_text().splitlines()]
    assert len([row for row in kinds if row["phase"] == "less"]) >= 2


FIFTY = "import json, sys, halfbyte; halfbyte.train(**json.loads(sys.argv[1]))"


@pytest.mark.slow
def test_fifty_steps_killed_again_and_again_in_every_mode(
    orders: Path, tmp_path: Path, own_cache: Path
):
    """kill -9 at random moments, each resume in the next mode: the bytes of a run that was never
    disturbed, and of undisturbed runs in each mode."""
    whole = train(tmp_path / "whole", orders, max_steps=50)
    for way, more in WAYS.items():
        assert train(tmp_path / way.replace(" ", "-"), orders, max_steps=50, **more) == whole, way
    draw, killed, modes = random.Random(0), 0, list(WAYS.values())
    common: dict[str, Any] = {
        "model": "demo",
        "data": str(orders),
        "max_steps": 50,
        "num_samples": 0,
        "save_steps": 3,
    }
    common |= {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "resume_from_checkpoint": "auto",
    }
    out = tmp_path / "killed"
    for attempt in range(40):
        options = {**common, "output_dir": str(out), **modes[attempt % len(modes)]}
        process = subprocess.Popen(
            [sys.executable, "-c", FIFTY, json.dumps(options)],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        )
        before = (
            len((out / "metrics.jsonl").read_text().splitlines())
            if (out / "metrics.jsonl").exists()
            else 0
        )
        while process.poll() is None:  # until it has made some steps, then a moment more
            time.sleep(0.05)
            now = (
                len((out / "metrics.jsonl").read_text().splitlines())
                if (out / "metrics.jsonl").exists()
                else 0
            )
            if now >= before + 8 and killed < 8:
                time.sleep(draw.random() * 0.4)
                process.kill()
                killed += process.wait() != 0
        if process.returncode == 0:
            break
    files = json.loads((out / "checkpoints/step-00000050/manifest.json").read_text())["files"]
    assert killed >= 4 and {name: files[name]["sha256"] for name in whole} == whole
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == [".run.json"], (
        "nothing is left behind"
    )


LARGER = """
import json, resource, sys
import halfbyte.training.trainer
import transformers.models.llama.modeling_llama
from halfbyte.memory.process import _status
resource.setrlimit(resource.RLIMIT_DATA, (_status()["VmData"] + int(sys.argv[1]),) * 2)
halfbyte.train(**json.loads(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_base_larger_than_memory_takes_a_step(orders: Path, tmp_path: Path, own_cache: Path):
    """0.6 GB of 4-bit weights in a process that may take 500 MiB in all; bench/paging.py does it
    with 35 GB."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "paging", Path(__file__).parents[2] / "bench/paging.py"
    )
    assert spec is not None and spec.loader is not None
    paging = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
    try:
        spec.loader.exec_module(paging)
    finally:
        sys.path.pop(0)
    shape = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    paging.SIZES["small"] = {**shape, "vocab_size": 4000}
    base = paging.make_packed("small", tmp_path)
    packed = sum(file.stat().st_size for file in base.glob("*.safetensors")) - 2 * 2 * 4000 * 2048
    options: dict[str, Any] = {
        "model": str(base),
        "data": str(orders),
        "output_dir": str(tmp_path / "run"),
    }
    options |= {
        "max_steps": 1,
        "num_samples": 0,
        "gradient_accumulation_steps": 1,
        "dtype": "bfloat16",
        "lora_r": 8,
    }
    arguments = [sys.executable, "-c", LARGER, str(500 * MIB), json.dumps(options)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tiny_rows = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    ]
    assert len(tiny_rows) == 1 and packed > 600e6
    config = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert config["weight_streaming"] == "always", "by itself, as it does not fit otherwise"

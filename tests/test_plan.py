"""The plan against what is really allocated, against parameter counts of real models, and against
memory itself."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared
from torch import Tensor

import halfbyte
from halfbyte import nf4
from halfbyte.cli import run
from halfbyte.config.options import PlanConfig, TrainConfig
from halfbyte.data.batches import collate
from halfbyte.data.renderer import TokenizedExample
from halfbyte.engine.learner import Learner
from halfbyte.engine.selftest import Abilities
from halfbyte.errors import DoesNotFit, UsageError
from halfbyte.files import hub
from halfbyte.files.model_config import read_config
from halfbyte.memory.process import available
from halfbyte.model import attention
from halfbyte.model.fusion import fuse
from halfbyte.ops import cpu
from halfbyte.planning.budget import CARDS, parse_size
from halfbyte.planning.dry_run import outline, plan_memory
from halfbyte.planning.resident import on_device, sizes
from halfbyte.planning.search import Planner
from halfbyte.planning.tracker import MemoryTracker
from halfbyte.planning.workload import work_of
from halfbyte.quantization.load import load_base

GIB = 2**30


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(
    ("weights", "block"), [(64, 64), (65, 64), (17 * 64 * 256 + 3, 64), (4096, 32), (1, 4096)]
)
def test_stored_sizes_are_what_a_tensor_takes(weights: int, block: int, double_quant: bool):
    tensor = nf4.quantize(torch.randn(weights), block_size=block, double_quant=double_quant)
    assert sum(nf4.stored_sizes(weights, block, double_quant)) == tensor.stored_bytes


# --- the rehearsal without numbers is the rehearsal with them -------------------------------------


def tiny(draw: random.Random) -> tuple[Any, dict[str, Any]]:
    """A random small geometry of a random family, and random options."""
    from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    family = draw.choice([LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig, Gemma2Config])
    heads = draw.choice([2, 4])
    make: Any = family
    config = make(
        vocab_size=draw.choice([96, 515]),
        hidden_size=64 * draw.choice([1, 2, 3]),
        intermediate_size=32 * draw.randint(2, 9),
        num_hidden_layers=draw.randint(1, 4),
        num_attention_heads=heads,
        num_key_value_heads=draw.choice([1, heads]),
        head_dim=32,
        tie_word_embeddings=draw.choice([True, False]),
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    checkpointing = draw.random() < 0.7
    in_4bit = draw.random() < 0.8
    options = {
        "lora_r": draw.choice([4, 8, 24]),
        "lora_dropout": draw.choice([0.0, 0.1]),
        "load_in_4bit": in_4bit,
        "full": not in_4bit and draw.random() < 0.5,
        "bnb_4bit_use_double_quant": draw.choice([True, False]),
        "optim": draw.choice(["adamw_8bit", "adamw_torch"]) if in_4bit else "adamw_torch",
        "dtype": draw.choice(["float32", "bfloat16"]),
        "gradient_checkpointing": checkpointing,
        "kept_activations": draw.choice(["none", "attention", "mlp_in", "all"])
        if checkpointing
        else "none",
        "per_device_train_batch_size": draw.choice([1, 3]),
        "max_length": draw.choice([16, 40, 200]),
        "allow_low_coverage": True,
    }
    if not options["full"]:
        options["use_dora"] = draw.random() < 0.3
        options["modules_to_save"] = draw.choice(["", "", "norm", "lm_head,embed_tokens"])
    return config, options


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("seed", range(12))
def test_a_plan_counts_what_training_allocates(seed: int, kernels: str, tmp_path: Path):
    """Random geometries, written, loaded and trained for a step under the same count: static parts
    to the byte, and where our kernels compute the peak of all tensors within 2 % (bench/memory.py,
    larger models: to a few bytes)."""
    draw = random.Random(seed)
    model_config, options = tiny(draw)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(model_config).save_pretrained(tmp_path)
    config = TrainConfig(model=str(tmp_path), data="none", **options)
    with cpu.using(kernels):
        work = work_of(config, None)
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
        plan = plan_memory(read_config(tmp_path), config, work, dtype=dtype)
        model, _ = load_base(tmp_path, config.model_copy(update={"kernels": kernels}))
        fuse(model)
        learner = Learner(model, config, Abilities(True, True, 0.0, 0.0), lambda what, line: None)
        parts = sizes(on_device(learner))
        with attention.packed(model):
            one_step(learner, work.batch)  # what lasts is there from the second step on
            with MemoryTracker(on_device(learner)) as count:
                count.restart()
                one_step(learner, work.batch)
    if config.optim == "adamw_torch":  # made in the first step
        parts = sizes(on_device(learner))
    assert parts == {part: plan.bytes_of(part) for part in parts}
    if kernels == "auto" and cpu.active() is not None:
        planned = plan.tensor_bytes - plan.bytes_of("kernel scratch")
        # ids and labels lie on the CPU in either; the few tensors that differ are smaller than a
        # layer's input
        assert abs(planned - count.peak) <= 0.02 * count.peak


def one_step(learner: Learner, batch: Any) -> None:
    learner.accumulate(batch, batch.supervised, 0, 0)
    learner.clip()
    learner.update(1e-4)
    learner.forget()


def test_the_count_is_of_storages_and_follows_them():
    held = torch.zeros(100)
    with MemoryTracker({"held": [held]}) as count:
        count.restart()
        assert count.now == 400
        a = torch.ones(1000)
        view = a[10:20]
        assert count.now == 4400, "views are no memory"
        del a
        assert count.now == 4400
        view.add_(1)
        del view
        assert (count.now, count.peak) == (400, 4400)
        torch.mm(torch.ones(2, 3), torch.ones(3, 5))
    assert count.flop == 2 * 2 * 3 * 5


@pytest.mark.parametrize(
    ("model", "linear", "lora", "packed"),
    [
        ("llama-2-7b", 6_476_005_376, 39_976_960, 3.34),
        ("llama-2-13b", 12_687_769_600, 62_586_880, 6.55),
        ("llama-2-70b", 68_451_041_280, 207_093_760, 35.31),
        ("llama-3-8b", 6_979_321_856, 41_943_040, 3.60),
    ],
)
def test_counts_of_real_models(model: str, linear: int, lora: int, packed: float):
    plan = outline(read_config(shared(f"geometry/{model}")), 512)
    assert (plan.quantized_parameters, plan.lora_parameters) == (linear, lora)
    assert round(plan.bytes_of("4-bit codes", "scales") / 1e9, 2) == packed


@pytest.mark.parametrize(("model", "most"), [("llama-2-70b", 41.0), ("llama-3-70b", 44.0)])
def test_seventy_billion_parameters_on_one_card(model: str, most: float):
    plan = halfbyte.plan(
        model=str(shared(f"geometry/{model}")), device="cuda", max_length=512, dtype="bfloat16"
    )
    assert plan.peak_bytes <= most * 1e9
    assert plan.peak_bytes > 38e9, "and nothing was forgotten"


# --- what the plan says ---------------------------------------------------------------------------


SIZES = {"24GiB": 24 * GIB, "16 GB": 16 * 10**9, "8": 8 * GIB, "500MiB": 500 << 20, "1.5g": 3 << 29}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes_as_people_write_them(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "a lot", "-3GiB", "0", "rtx-9999", "1.2.3GiB"])
def test_no_size(text: str):
    with pytest.raises(UsageError, match="fit_to"):
        parse_size(text)


def geometry(path: Path, **changes: Any) -> Path:
    from transformers import LlamaConfig

    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "vocab_size": 4000,
    }
    LlamaConfig(
        **{**shape, "num_attention_heads": 4, "max_position_embeddings": 4096, **changes}
    ).save_pretrained(path)
    return path


def test_a_directory_with_nothing_but_a_config_is_planned_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = geometry(tmp_path)
    assert run(["plan", str(path), "--max_length", "256", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    for key in (
        "model",
        "fits",
        "budget_bytes",
        "peak_bytes",
        "phases",
        "ledger",
        "lora_parameters",
    ):
        assert key in found
    assert found["fits"] and found["quantized_parameters"] == 6 * (4 * 256 * 256 + 3 * 256 * 704)
    device = sum(part["bytes"] for part in found["ledger"] if part["where"] == "device")
    assert device == found["phases"]["step"], "the ledger adds up"
    assert captured.err.rstrip().splitlines()[-1].startswith("next: halfbyte train")


def test_what_does_not_fit_is_told_with_ways_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = geometry(tmp_path / "m", hidden_size=1024, intermediate_size=2816, num_attention_heads=8)
    small = ["--fit-to", "16MiB", "--device", "cuda", "--max_length", "2048"]
    assert run(["plan", str(path), *small, "--json"]) == 3
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert not found["fits"] and found["exit_code"] == 3
    assert any(
        choice["change"] == {"max_length": 1024} and choice["loses"] for choice in found["choices"]
    )
    assert "it does not fit" in captured.err and "ways out" in captured.err


def test_the_search_finds_the_fastest_that_fits(tmp_path: Path):
    path = geometry(tmp_path)
    common: dict[str, Any] = {
        "model": str(path),
        "device": "cuda",
        "max_length": 2048,
        "dtype": "bfloat16",
    }
    loose = halfbyte.plan(**common, fit_to="rtx-4090")
    assert loose.budget_bytes == CARDS["rtx-4090"] << 20 and loose.fits
    assert loose.choices[0].change["kept_activations"] == "all", (
        "the most is kept where there is room"
    )
    for choice in loose.choices:
        change = choice.change
        assert (
            change["per_device_train_batch_size"] * change["gradient_accumulation_steps"] == 16
        ), "the same global batch"
        assert choice.relative_time >= 1
    least = min(choice.peak_bytes for choice in loose.choices)
    tight = halfbyte.plan(**common, fit_to=f"{least * 1.03 / 2**20}MiB")
    assert tight.fits and tight.peak_bytes <= least * 1.01
    cut = halfbyte.plan(**common, fit_to=f"{least * 0.99 / 2**20}MiB")
    assert cut.fits and cut.choices[0].change["max_length"] < 2048 and "cut" in cut.choices[0].loses
    never = halfbyte.plan(**common, fit_to="300MiB")
    assert not never.fits and never.choices
    with pytest.raises(DoesNotFit, match="does not fit"):
        never.check()


def test_more_of_anything_is_never_less_memory(tmp_path: Path):
    path = geometry(tmp_path)
    base: dict[str, Any] = {"model": str(path), "max_length": 256, "dtype": "bfloat16"}
    planner = Planner(path, PlanConfig(**base), None)
    least = planner.plan().tensor_bytes
    for more in (
        {"max_length": 512},
        {"per_device_train_batch_size": 2},
        {"lora_r": 32},
        {"kept_activations": "attention"},
        {"gradient_checkpointing": False},
        {"load_in_4bit": False},
        {"optim": "adamw_torch"},
        {"bnb_4bit_use_double_quant": False},
    ):
        assert planner.plan(**more).tensor_bytes > least, more
    levels = [
        planner.plan(kept_activations=keep).tensor_bytes
        for keep in ("none", "attention", "mlp_in", "all")
    ]
    assert levels == sorted(levels)


def test_what_is_free_knows_limits(tmp_path: Path):
    free = available(())
    assert free is not None and free > 0
    (tmp_path / "memory.max").write_text(str(5 << 30))
    (tmp_path / "memory.current").write_text(str(5 * 2**30 - 1000))
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 234\n")
    assert available((tmp_path,)) == 1234
    (tmp_path / "memory.max").write_text("max\n")
    assert available((tmp_path,)) == pytest.approx(free, rel=0.2)


# --- memory itself --------------------------------------------------------------------------------

LIMITED = """
import json, resource, sys
import halfbyte.training.trainer
from halfbyte.cli import run
from halfbyte.memory.process import _status
import transformers.models.llama.modeling_llama
room, *arguments = sys.argv[1:]
limit = _status()["VmData"] + int(room)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
sys.exit(run(arguments))
"""


def limited(room: int, *arguments: str) -> subprocess.CompletedProcess:
    """A command in a process that may take so many bytes more than it has with everything
    imported."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(room), *arguments], capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 60 MB in 16 bits with the tokenizer of the built-in one, and rows long and
    short."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("middling")
    tokenizer = AutoTokenizer.from_pretrained(hub.resolve("demo"))
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=8, max_position_embeddings=4096, **shape
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)
    rows = path / "rows.jsonl"
    question = (
        "how many teas and buns do you have left today, and what is the price of all of "
        "them together? "
    )
    lines = [
        {"instruction": f"{i}: " + question * (40 if i == 7 else 1), "output": "ten"}
        for i in range(16)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, rows


def training(model: Path, rows: Path, out: Path, *more: str) -> list[str]:
    options = [
        "--max_steps",
        "3",
        "--gradient_accumulation_steps",
        "2",
        "--num_samples",
        "0",
        "--max_length",
        "2048",
    ]
    return [
        "train",
        str(model),
        "--data",
        str(rows),
        "--output_dir",
        str(out),
        "--dtype",
        "bfloat16",
        *options,
        *more,
    ]


def test_a_promised_run_survives_and_an_unplannable_one_ends_before_loading(
    middling: tuple[Path, Path], tmp_path: Path
):
    model, rows = middling
    free = limited(4 * GIB, *training(model, rows, tmp_path / "free", "--json"))
    assert free.returncode == 0, free.stderr
    plan = json.loads((tmp_path / "free/plan.json").read_text())
    need = plan["peak_bytes"] - next(
        p["bytes"] for p in plan["ledger"] if p["part"] == "the process before it"
    )
    # what is mapped and not touched counts for a limit, too: regions of the arena, stacks
    promised = limited(
        int(need * 1.1) + (80 << 20), *training(model, rows, tmp_path / "promised", "--json")
    )
    assert promised.returncode == 0, promised.stderr
    half = limited(need // 2, *training(model, rows, tmp_path / "half", "--json"))
    assert half.returncode == 0, half.stderr
    assert "stay out of memory" in half.stderr, "what need not be in memory has left it"
    newest = "checkpoints/step-00000003/adapter_model.safetensors"
    assert (tmp_path / "half" / newest).read_bytes() == (tmp_path / "free" / newest).read_bytes()
    refused = limited(need // 4, *training(model, rows, tmp_path / "refused", "--json"))
    assert refused.returncode == 3, refused.stderr
    error = json.loads(refused.stdout)
    assert error["error"] == "DoesNotFit" and any(
        "--max_length" in way for way in error["ways_out"]
    )
    assert (
        not re.search(r"\bloading", refused.stderr)
        and not (tmp_path / "refused/quant.json").exists()
    )


def test_real_exhaustion_ends_with_the_phase_and_the_ways_out(
    middling: tuple[Path, Path], tmp_path: Path
):
    model, rows = middling
    forced = limited(90 << 20, *training(model, rows, tmp_path / "forced", "--force", "--json"))
    assert forced.returncode == 3, (forced.returncode, forced.stderr)
    error = json.loads(forced.stdout)
    assert "out of memory in this phase" in error["what"] and "rehearsal" in error["what"]
    assert any("less" in way for way in error["ways_out"])
    assert "Traceback" not in forced.stderr


def test_the_longest_row_is_tried_before_the_first_step_and_changes_nothing(
    middling: tuple[Path, Path], tmp_path: Path
):
    """sha256 of adapter and optimizer with and without rehearsal, for both optimizers."""
    model, rows = middling
    for optim in ("adamw_8bit", "adamw_torch"):
        digests = []
        for rehearse in ("true", "false"):
            out = tmp_path / f"{optim}-{rehearse}"
            more = ("--optim", optim, "--rehearse", rehearse, "--save_steps", "2")
            assert run(training(model, rows, out, *more)) == 0
            digests.append(manifest(out))
        assert digests[0] == digests[1]
    measured = [
        json.loads(line)
        for line in (tmp_path / "adamw_8bit-true/memory.jsonl").read_text().splitlines()
    ]
    assert [row["phase"] for row in measured][:3] == ["load", "rehearsal", "first step"]
    assert not (tmp_path / "adamw_8bit-true/.rehearsal.tmp").exists()


def manifest(out: Path) -> dict[str, str]:
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {
        name: files[name]["sha256"]
        for name in ("adapter_model.safetensors", "optimizer.safetensors")
    }


def test_fit_to_trains_with_what_fits_and_resumes_with_it(
    middling: tuple[Path, Path], tmp_path: Path
):
    model, rows = middling
    out = tmp_path / "run"
    assert run(training(model, rows, out, "--fit_to", "3GiB", "--save_steps", "2")) == 0
    config = json.loads((out / "run.json").read_text())["config"]
    assert config["kept_activations"] == "all"
    assert config["per_device_train_batch_size"] * config["gradient_accumulation_steps"] == 2
    assert (
        run(training(model, rows, out, "--fit_to", "3GiB", "--resume_from_checkpoint", "auto")) == 0
    )


def test_drift_is_said_aloud():
    from halfbyte.planning.monitor import PeakMonitor

    rows, said = [], []
    monitor = PeakMonitor(
        torch.device("cpu"), {"step": 100 << 20, "load": 1 << 40}, rows.append, said.append
    )
    monitor.note("step", 1, 104 << 20)
    assert not said and rows[0]["planned_bytes"] == 100 << 20
    monitor.note("step", 2, 104 << 20)
    assert len(rows) == 1, "only what is higher"
    monitor.note("step", 3, 110 << 20)
    assert "10% more than the 100 MiB planned" in said[0]
    with monitor.phase("load", 3):
        held = torch.ones(30 << 20, dtype=torch.uint8)
    assert held.nbytes < rows[-1]["measured_bytes"] < 1 << 40
    monitor.highest.pop("load")
    assert monitor.line() == "memory: 110 MiB at the peak, 100 planned (+10.0%)"


@pytest.mark.parametrize(
    "more",
    [
        {"packing": True, "max_length": 1600, "eval_split": 0.3},
        pytest.param(
            {"load_in_4bit": False, "full": True, "optim": "adamw_torch", "eval_split": 4},
            marks=pytest.mark.slow,
        ),
        pytest.param({"fit_to": "1.0GiB", "max_length": 2048}, marks=pytest.mark.slow),
    ],
    ids=["packed and evaluated", "every parameter", "fitted"],
)
def test_trainings_of_all_kinds_keep_to_their_plan(
    middling: tuple[Path, Path], tmp_path: Path, more: dict[str, Any]
):
    """The peak of each measured phase is at most 5 % above its plan, and the whole not far below
    it."""
    model, rows = middling
    options: dict[str, Any] = {
        "max_steps": 2,
        "num_samples": 0,
        "gradient_accumulation_steps": 2,
        "dtype": "bfloat16",
    }
    # in a process of its own: what other tests left behind would count
    script = "import json, sys, halfbyte; halfbyte.train(**json.loads(sys.argv[1]))"
    given = {
        "model": str(model),
        "data": str(rows),
        "output_dir": str(tmp_path / "run"),
        **options,
        **more,
    }
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(given)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    measured = [
        json.loads(line) for line in (tmp_path / "run/memory.jsonl").read_text().splitlines()
    ]
    phases = {row["phase"]: row for row in measured}
    assert {"load", "rehearsal", "first step", "step", "save"} <= set(phases)
    assert ("eval" in phases) == ("eval_split" in more)
    for row in measured:
        if row["planned_bytes"]:
            assert row["measured_bytes"] <= 1.05 * row["planned_bytes"], row
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert max(row["measured_bytes"] for row in measured) >= 0.85 * plan["peak_bytes"]


def test_a_card_is_no_budget_for_a_cpu(middling: tuple[Path, Path], tmp_path: Path):
    model, rows = middling
    assert (
        run(training(model, rows, tmp_path / "run", "--fit_to", "rtx-4090", "--device", "cpu")) == 2
    )


@pytest.mark.slow
def test_rows_that_may_not_be_cut_are_not(middling: tuple[Path, Path]):
    """over_length error: a smaller max_length is no way out, and the search does not take it."""
    model, rows = middling
    common: dict[str, Any] = {
        "model": str(model),
        "data": str(rows),
        "max_length": 2048,
        "device": "cuda",
    }
    tight = halfbyte.plan(**common, fit_to="680MiB", over_length="error")
    assert not tight.fits and all("max_length" not in choice.change for choice in tight.choices)
    assert any(
        "max_length" in choice.change for choice in halfbyte.plan(**common, fit_to="680MiB").choices
    )


def test_encoded_rows_are_what_a_micro_batch_is_made_of():
    batch = collate([TokenizedExample("x", [1, 2, 3], [True] * 3)], [0, 0])
    assert isinstance(batch.input_ids, Tensor) and len(batch.input_ids) == 6

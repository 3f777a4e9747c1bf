"""``halfbyte demo``: the built-in model learns to turn spoken orders into JSON, and everything
around it."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from ..config.options import TrainConfig
from ..config.verbs import DemoConfig
from ..errors import UsageError
from ..ledger import Part
from ..run.directory import Run
from . import console, orders
from .options import Verb

TRAIN_ROWS, HELD_OUT_ROWS = 3600, 100
MARK = ".halfbyte-demo"
OWN = ("run", "merged", "compare-lora", "compare-full", "orders.jsonl", "held_out.jsonl")
LLAMA_2_70B_LINEAR = 68_451_041_280
"""Weights in the linear layers of Llama 2 70B."""
ASKED = "two large teas and a bun, no sugar"


def demo(record: DemoConfig) -> dict[str, Any]:
    """Fine-tune the built-in model in 4 bits on spoken orders, offline on the CPU: plan, train,
    compare, merge."""
    began = time.monotonic()
    home = Path(record.output_dir).expanduser()
    _clear(home)
    rows, held_out = orders.rows(record.seed, TRAIN_ROWS, HELD_OUT_ROWS)
    _write(home / "orders.jsonl", rows)
    _write(home / "held_out.jsonl", held_out)
    console.say(
        f"the task: a spoken order becomes JSON. {len(rows):,} rows to learn from, {len(held_out)} "
        "other orders to be tested on"
    )
    config = _config(home, "run", record.seed)
    _show_plan(config)
    before = _test(config.model, home / "held_out.jsonl")
    console.say(
        f"before training it answers {before['exact_match']:.0%} of the held-out orders exactly"
    )
    run = _train(config)
    console.samples(run.samples())
    after = _test(str(run.path), home / "held_out.jsonl")
    console.say(
        f"exact on held-out orders: {before['exact_match']:.0%} before, "
        f"{after['exact_match']:.0%} after"
    )
    result = {
        "exact_match_before": before["exact_match"],
        "exact_match_after": after["exact_match"],
        "loss_before": before["loss"],
        "loss_after": after["loss"],
    }
    if record.compare:
        result["compare"] = _compare(home, record.seed, after)
    receipt = _merge(run.path, home / "merged")
    seconds = time.monotonic() - began
    console.say(
        f"done in {seconds:.0f} s. In {home}: the run (run/), its rows, and the merged model "
        "(merged/)"
    )
    console.following("chat", run.path, raw=f'--prompt "{ASKED}"')
    return {
        **result,
        "seconds": seconds,
        "run_dir": str(run.path),
        "merged_dir": str(home / "merged"),
        "greedy_agreement": receipt.greedy_agreement,
    }


def _config(home: Path, name: str, seed: int, **changes: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "model": "demo",
            "data": str(home / "orders.jsonl"),
            "output_dir": str(home / name),
            "dtype": "auto",
            "device": "cpu",
            "max_length": 256,
            "per_device_train_batch_size": 16,
            "gradient_accumulation_steps": 1,
            "num_train_epochs": 1,
            "learning_rate": 4e-3,
            "lr_scheduler_type": "cosine",
            "lora_dropout": 0.0,
            "gradient_checkpointing": False,
            "save_steps": 100,
            # the demo tests on orders of its own
            "eval_split": 0,
            "seed": seed,
            **changes,
        }
    )


def _clear(home: Path) -> None:
    """Remove an earlier demo's own files; a directory that no demo made, or that is being trained
    in, is an error."""
    if not home.exists():
        home.mkdir(parents=True)
    elif not home.is_dir() or (any(home.iterdir()) and not (home / MARK).is_file()):
        raise UsageError(
            f"{home} holds something else than a demo", ways_out=["name another --output_dir"]
        )
    (home / MARK).write_text("made by `halfbyte demo`, which may replace the files it made here\n")
    for name in OWN:
        if (home / name / "run.json").is_file():
            with Run(home / name).locked():
                pass
        if (home / name).is_dir():
            shutil.rmtree(home / name)
        else:
            (home / name).unlink(missing_ok=True)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _show_plan(config: TrainConfig) -> None:
    """The bytes of each part, in 4 bits and in 16."""
    from ..files import hub
    from ..files.model_config import read_config
    from ..planning.dry_run import plan_memory
    from ..planning.workload import work_of
    from ..quantization.tensor import stored_sizes

    shape = config.model_copy(update={"max_length": 96})
    sides = [
        plan_memory(
            read_config(hub.resolve("demo")),
            shape.model_copy(update={"load_in_4bit": in_4bit}),
            work_of(shape, None),
        )
        for in_4bit in (True, False)
    ]
    held = (Part.CODES, Part.SCALES, Part.LAYERS)
    lines = [["the linear layers", *(_mib(side.bytes_of(*held)) for side in sides)]]
    for part in sides[0].ledger:
        if part.part not in (*held, "allocator slack") and part.where == "device":
            lines.append([part.part, *(_mib(side.bytes_of(part.part)) for side in sides)])
    lines.append(["together", *(_mib(side.tensor_bytes) for side in sides)])
    count = sides[0].parameters
    console.table(
        f"the plan: {count / 1e6:.1f} M parameters, {sides[0].lora_parameters / 1e6:.2f} M of an "
        "adapter trained (Python and PyTorch themselves take some 400 MiB more)",
        ["MiB", "4-bit", "16-bit"],
        lines,
    )
    small, large = sum(stored_sizes(LLAMA_2_70B_LINEAR)) / 1e9, 2 * LLAMA_2_70B_LINEAR / 1e9
    console.say(
        f"a small model is mostly activations; Llama 2 70B's linear layers take {small:.1f} GB "
        f"instead of {large:.1f} (see `halfbyte explain memory`)"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f}"


def _test(model: str, data: Path) -> dict[str, Any]:
    """Loss and exact match on the held-out orders."""
    from ..config.options import DataOptions
    from ..data.dataset import read_data
    from ..data.renderer import Renderer
    from ..engine.evaluate import score
    from ..files import hub
    from ..run.load import load

    loaded, tokenizer = load(model, device="cpu")
    rows = read_data(str(data), DataOptions(), hub.resolve("demo"), renderer=Renderer(tokenizer))
    return score(
        loaded, rows, rows.train.rows, packed=True, generate=True, progress=console.progress
    ).as_dict()


def _train(config: TrainConfig) -> Any:
    from ..progress import Reporter
    from ..training.trainer import train

    with console.steps() as shown:
        return train(
            config, reporter=Reporter(console.say, console.progress, shown.update, console.show_row)
        )


def _compare(home: Path, seed: int, qlora: dict[str, Any]) -> dict[str, Any]:
    """The same rows and seed with an unquantized base, and with every parameter trained."""
    results = {"QLoRA (4-bit base)": qlora}
    for label, name, changes in (
        ("LoRA (16-bit base)", "compare-lora", {"load_in_4bit": False}),
        (
            "full fine-tuning",
            "compare-full",
            {"load_in_4bit": False, "full": True, "learning_rate": 1e-3, "dtype": "float32"},
        ),
    ):
        console.say(f"now the same with {label}")
        run = _train(_config(home, name, seed, **changes))
        results[label] = _test(str(run.path), home / "held_out.jsonl")
    console.table(
        "the same rows, the same seed",
        ["", "loss", "exact match"],
        [[label, f"{r['loss']:.4f}", f"{r['exact_match']:.0%}"] for label, r in results.items()],
    )
    return {label: {key: r[key] for key in ("loss", "exact_match")} for label, r in results.items()}


def _merge(run: Path, target: Path) -> Any:
    from ..exporters.merge import merge

    receipt = merge(run, target, say=console.say)
    console.say(
        f"merged and verified: {receipt.greedy_agreement:.2%} of {receipt.tokens:,} predicted "
        f"tokens are the same, and all {receipt.recomputed.tensors} tensors when computed again"
    )
    return receipt


command = Verb("demo", DemoConfig, demo, short={"o": "output_dir"})

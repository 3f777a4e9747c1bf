"""The plan as a contract: random trainings, each watched from outside and held to its own plan.

    python bench/contract.py [--count 40] [--seed 0] [--only N] [--model DIR] [--limit]

Family, geometry, row lengths, batch, rank, targets, base bits, recomputation, packing, optimizer,
evaluation and samples are drawn; each training runs in a process of its own, without ways to need
less, and the anonymous memory of it and its children is read every few milliseconds from start to
exit. A plan that is too small breaks the contract as one that is too generous does: the ratio is
measured over planned. With ``--limit`` each runs once more in a control group that has no more
memory than the plan and 5 %, all its processes together, files and all: it has to end there.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outside import inside, memory_group, watch

FAMILIES = ("llama", "qwen3", "mistral")
OVER = 1.05
"""Measured over planned, at most."""


@dataclass(frozen=True)
class Case:
    """One training: the model's shape, rows (characters each), options."""

    family: str
    shape: dict[str, int]
    rows: list[int]
    options: dict[str, Any]


def draw(seed: int) -> Case:
    """The training of a seed."""
    pick = random.Random(seed)
    heads = pick.choice((4, 8, 12))
    width = heads * pick.choice((32, 64))
    shape = {
        "hidden_size": width,
        "intermediate_size": width * pick.choice((2, 3, 4)),
        "num_hidden_layers": pick.choice((2, 4, 8, 16)),
        "num_attention_heads": heads,
        "num_key_value_heads": pick.choice((heads, heads // 2, heads // 4)),
    }
    longest = pick.choice((60, 400, 1500))
    rows = [pick.randint(20, longest) for _ in range(pick.choice((24, 60, 130)))]
    max_length = pick.choice((64, 256, 512))
    # a row whose answer lies behind the cut is refused before anything is planned
    rows = [min(size, 2 * max_length - 40) for size in rows]
    in_4bit = pick.random() < 0.7
    options: dict[str, Any] = {
        "max_length": max_length,
        "per_device_train_batch_size": pick.choice((1, 2, 8)),
        "gradient_accumulation_steps": pick.choice((1, 2, 4)),
        "lora_r": pick.choice((4, 16, 64)),
        "target_modules": pick.choice(("all-linear", "q_proj,v_proj")),
        "load_in_4bit": in_4bit,
        "bnb_4bit_use_double_quant": pick.random() < 0.5,
        "gradient_checkpointing": pick.random() < 0.7,
        "packing": pick.random() < 0.3,
        "optim": pick.choice(("adamw_8bit", "adamw_torch", "paged_adamw_32bit")),
        "eval_split": pick.choice((0, 4, 10)),
        "eval_steps": pick.choice((0, 2)),
        "num_samples": pick.choice((0, 2, 3)),
        "dtype": pick.choice(("bfloat16", "float32")),
        "max_steps": 6,
    }
    return Case(pick.choice(FAMILIES), shape, rows, options)


def make_model(case: Case, home: Path) -> Path:
    """Random weights of a case's shape, with the built-in model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from halfbyte.files import hub

    path = home / "model"
    tokenizer = AutoTokenizer.from_pretrained(hub.resolve("demo"))
    config = AutoConfig.for_model(
        case.family, vocab_size=len(tokenizer), max_position_embeddings=2048, **case.shape
    )
    if case.family == "qwen3":
        config.head_dim = case.shape["hidden_size"] // case.shape["num_attention_heads"]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def make_rows(case: Case, home: Path) -> Path:
    text = "how many teas and buns are left, and what is the price of all of them together? "
    lines = [
        {"instruction": f"{i}: " + (text * (1 + size // len(text)))[:size], "output": "ten of each"}
        for i, size in enumerate(case.rows)
    ]
    file = home / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def command_of(model: Path, rows: Path, options: dict[str, Any], run: Path) -> list[str]:
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "halfbyte", "train", str(model), "--data", str(rows)]
    return [*command, "--output_dir", str(run), "--report_to", "none", *flags]


def limited(model: Path, rows: Path, options: dict[str, Any], run: Path, planned: int) -> str:
    """How a training ends that has the planned memory and 5 %: "ended", or what it said last."""
    with memory_group(int(OVER * planned)) as group:
        seen = watch(inside(group, command_of(model, rows, options, run)))
    return "ended" if not seen.returncode else f"exit {seen.returncode}: {seen.out[-600:]}"


def hold(model: Path, rows: Path, options: dict[str, Any], run: Path) -> dict[str, Any]:
    """Train in a process of its own and watch it: planned and measured bytes, and by phase."""
    seen = watch(command_of(model, rows, options, run))
    if seen.returncode:
        return {"failed": seen.returncode, "said": seen.out.splitlines()[-12:]}
    planned = json.loads((run / "plan.json").read_text())
    phases: dict[str, list[float]] = {}
    for line in (run / "memory.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row.get("planned_bytes"):
            one = [round(row[key] / 2**20, 1) for key in ("measured_bytes", "planned_bytes")]
            phases[row["phase"]] = max(phases.get(row["phase"], [0.0, 0.0]), one)
    return {
        "planned": planned["peak_bytes"],
        "planned_mib": round(planned["peak_bytes"] / 2**20, 1),
        "measured_mib": round(seen.peak / 2**20, 1),
        "ratio": round(seen.peak / planned["peak_bytes"], 3),
        "at": round(seen.at / seen.seconds, 2),
        "phases": phases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--limit", action="store_true")
    given = parser.parse_args()
    ratios, broken = [], []
    seeds = [given.only] if given.only is not None else range(given.seed, given.seed + given.count)
    for seed in seeds:
        case = draw(seed)
        with tempfile.TemporaryDirectory() as place:
            home = Path(place)
            model = given.model or make_model(case, home)
            rows = make_rows(case, home)
            found = hold(model, rows, case.options, home / "run")
            if given.limit and "failed" not in found:
                one = (model, rows, case.options, home / "limited")
                found["limited"] = limited(*one, found["planned"])
        print(json.dumps({"seed": seed, "family": case.family, **case.shape, **case.options}))
        print(json.dumps(found), flush=True)
        if "failed" in found:
            broken.append(seed)
            continue
        ratios.append(found["ratio"])
        if found["ratio"] > OVER or found.get("limited", "ended") != "ended":
            broken.append(seed)
    if ratios:
        print(
            f"{len(ratios)} trainings: measured over planned {min(ratios):.3f} to "
            f"{max(ratios):.3f}, "
            f"median {statistics.median(ratios):.3f}; over {OVER}, or failed: {broken or 'none'}"
        )
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()

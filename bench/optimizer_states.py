"""Optimizer states in 8 bits beside 32: the same trainings of a real model, in pairs.

    python bench/optimizer_states.py --model SMOLLM2 --data A.jsonl B.jsonl --out FOUND.jsonl
        [--seeds 5] [--steps 200] [--max_length 512] [--only-report]

Of every data file and seed one training with ``adamw_8bit`` and one with ``adamw_torch``, each in a
process of its own: same rows, same order, same initial adapter, same held-out rows. Each is written
to ``--out`` as it ends, and what stands there is not trained again: stop it whenever you like. The
report: the difference in held-out loss (8 bits minus 32, nats a token), pair by pair, with the 95 %
interval of its mean (Student's t); and how far the furthest weight of B, which begins at 0, went in
sums of all learning rates.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OPTIMIZERS = ("adamw_8bit", "adamw_torch")
T_975 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
T_975 += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
"""Student's t, two-sided 95 %, by degrees of freedom from 1."""


def train(model: Path, data: Path, seed: int, optimizer: str, given: Any) -> dict[str, Any]:
    """One training, and what it ended with."""
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        options: dict[str, Any] = {"max_length": given.max_length, "max_steps": given.steps}
        options |= {"seed": seed, "optim": optimizer, "eval_split": given.held_out}
        options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        options |= {"num_samples": 0, "judge": "false", "rehearse": "false", "report_to": "none"}
        flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "halfbyte", "train", str(model), "--data", str(data)]
        done = subprocess.run(
            [*command, "--output_dir", str(run), *flags], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}\nfailed with {done.returncode}")
        return {
            "data": f"{data.parent.name}/{data.name}",
            "seed": seed,
            "optim": optimizer,
            "steps": given.steps,
            "max_length": given.max_length,
            **_ended(run),
        }


def _ended(run: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / name).read_text().splitlines()]

    steps, held_out = lines("metrics.jsonl"), lines("eval.jsonl")
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    furthest = max(float(b.abs().max()) for name, b in adapter.items() if "lora_B" in name)
    return {
        "start": held_out[0]["loss"],
        "end": held_out[-1]["loss"],
        "trained": statistics.fmean(step["loss"] for step in steps[-50:]),
        "furthest": furthest / sum(step["lr"] for step in steps),
        "tokens": sum(step["tokens"] for step in steps),
    }


def interval(differences: list[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, math.inf
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, T_975[min(len(differences) - 2, len(T_975) - 1)] * error


def report(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Pairs, by data file and all together."""
    ends = {(one["data"], one["seed"], one["optim"]): one for one in found}
    pairs: dict[str, list[float]] = {}
    for data, seed, optimizer in ends:
        eight, full = (ends.get((data, seed, name)) for name in OPTIMIZERS)
        if optimizer == OPTIMIZERS[0] and eight and full:
            pairs.setdefault(data, []).append(eight["end"] - full["end"])
    every = [difference for each in pairs.values() for difference in each]
    return {
        "pairs": len(every),
        "difference": {
            name: dict(zip(("mean", "half_width"), interval(each), strict=True))
            for name, each in {**pairs, "all": every}.items()
            if each
        },
        "furthest_in_sums_of_rates": {
            name: max((one["furthest"] for one in found if one["optim"] == name), default=None)
            for name in OPTIMIZERS
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--held_out", type=int, default=32)
    parser.add_argument("--only-report", action="store_true")
    given = parser.parse_args()
    found: list[dict[str, Any]] = []
    if given.out.exists():
        found = [json.loads(line) for line in given.out.read_text().splitlines()]
    done = {(one["data"], one["seed"], one["optim"]) for one in found}
    for seed in range(0 if given.only_report else given.seeds):
        for data in given.data:
            for optimizer in OPTIMIZERS:
                if (f"{data.parent.name}/{data.name}", seed, optimizer) in done:
                    continue
                found.append(train(given.model, data, seed, optimizer, given))
                with given.out.open("a") as out:
                    out.write(json.dumps(found[-1]) + "\n")
                print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    print(json.dumps(report(found), indent=1))


if __name__ == "__main__":
    main()

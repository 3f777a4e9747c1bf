"""A real chat model beside the article's script, on the same rows, in one run.

    python bench/real.py --model SMOLLM2 --data ROWS.jsonl [--rounds 3] [--seeds 3] [--steps 30]

``step``: tokens a second and peak memory of a step at 512 tokens: halfbyte, the article's script
(bitsandbytes + PEFT) and LoRA on bf16, alternating, medians. ``judge``: trainings of several seeds;
what the product says of each in its last line, beside transformers' own losses of the merged model
and of the untouched one on held-out rows, and which of its merges is recommended.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from cpu import child, machine
from step import step_of

WHO = ("halfbyte", "bitsandbytes_peft", "bf16_peft_tuned")


def steps(model: Path, rounds: int) -> dict[str, Any]:
    """Each contestant in a process of its own, taking turns."""
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in WHO}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    for _ in range(rounds):
        for who in WHO:
            command = [sys.executable, __file__, "--child", who, "--model", str(model)]
            found[who].append(child(f"step {who}", command, environment))
            print(f"step {who}: {found[who][-1]}", file=sys.stderr, flush=True)
    medians = {
        who: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for who, runs in found.items()
    }
    own = medians["halfbyte"]["tokens_per_s"]
    return {
        **medians,
        "times": {who: own / medians[who]["tokens_per_s"] for who in WHO if who != "halfbyte"},
    }


def judged(model: Path, data: Path, seed: int, steps: int) -> dict[str, Any]:
    """One training: its own last word, and transformers' judgement on the rows it held out."""
    import halfbyte
    from halfbyte.progress import Reporter

    with tempfile.TemporaryDirectory() as place:
        options: dict[str, Any] = {"max_length": 512, "max_steps": steps, "seed": seed}
        options |= {"num_samples": 0, "gradient_accumulation_steps": 4, "rehearse": False}
        run = halfbyte.train(
            model=str(model),
            data=str(data),
            output_dir=f"{place}/run",
            reporter=Reporter(),
            **options,
        )
        said = run.info()["judged"]
        receipt = halfbyte.merge(run.path, f"{place}/merged")
        rows = _held_out(run, data)
        start, merged = (_loss(path, rows) for path in (model, Path(place) / "merged"))
    return {
        "seed": seed,
        "said": said["verdict"],
        "loss": said["loss"],
        "neutral": said["neutral"]["kl"],
        "transformers": {"start": start, "onto trained": merged},
        "right": (said["verdict"] == "better") == (merged < start),
        "recommended": receipt.recommended,
        "merges": {name: each.loss for name, each in receipt.comparisons.items()},
    }


def _held_out(run: Any, data: Path) -> list[tuple[list[int], list[bool]]]:
    """Ids and masks of the rows a run did not see."""
    from halfbyte.data.dataset import read_data

    found = read_data(str(data), run.config(), Path(run.info()["base"]["path"]))
    return [(row.input_ids, row.loss_mask) for row in found.held_out]


def _loss(path: Path, rows: list[tuple[list[int], list[bool]]]) -> float:
    """transformers' loss per supervised token."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    total, count = 0.0, 0
    for ids, mask in rows:
        labels = torch.tensor([[i if m else -100 for i, m in zip(ids, mask, strict=True)]])
        kept = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(torch.tensor([ids]), labels=labels).loss) * kept
        count += kept
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--child")
    given = parser.parse_args()
    if given.child:
        print(json.dumps(step_of(given.model, 1, 512, given.child)))
        return
    report: dict[str, Any] = {"machine": machine()}
    if given.rounds:
        report["step"] = steps(given.model, given.rounds)
    if given.data:
        report["judge"] = [
            judged(given.model, given.data, seed, given.steps) for seed in range(given.seeds)
        ]
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

"""A real chat model end to end beside the article's script, on the same rows, in one run.

    python bench/real.py --model SMOLLM2 --data ROWS.jsonl [--rounds 3] [--seeds 3] [--seed 0]
        [--steps 30] [--only halfbyte bitsandbytes_peft_trl]

``step``: tokens a second and peak memory of a step at 512 tokens: halfbyte, the article's script
(bitsandbytes + PEFT) and LoRA on bf16, alternating, medians.

``train``: trainings, seed after seed, by halfbyte, by the article's script (bitsandbytes + PEFT +
TRL) and, as references, by TRL with LoRA on 16 bits and with full fine-tuning: seconds until the
first step can begin, tokens a second of a step, peak anonymous memory of the whole, tokens a
second of an answer, and the loss per supervised token of held-out rows before and after, each in
the form the contestant has (4 or 16 bits). A tenth of the rows is held out of all of it. Of
halfbyte beside these its own last word, what transformers says in fp32 of the untouched model and
of the merged one on the held-out rows (the last word is right where it says the same, or "no
better" of a difference that may be luck), and the merges' receipt.
"""

import argparse
import functools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpu import PeakAnonymous, bnb_model, child, machine
from step import step_of

STEPPERS = ("halfbyte", "bitsandbytes_peft", "bf16_peft_tuned")
TRAINERS = ("halfbyte", "bitsandbytes_peft_trl", "bf16_peft_trl", "full_trl")
LENGTH, ROWS_A_STEP, ANSWER = 512, 4, 64
RATES = {"full_trl": 2e-5}
RATE = 2e-4


def in_turns(
    names: tuple[str, ...], rounds: int, command: Callable[[str, int], list[str]]
) -> dict[str, list[dict[str, Any]]]:
    """Each contestant in a process of its own, taking turns."""
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in names}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    for turn in range(rounds):
        for who in names:
            line = [sys.executable, __file__, "--child", who, *command(who, turn)]
            with tempfile.TemporaryDirectory() as cache:
                found[who].append(child(who, line, {**environment, "HALFBYTE_CACHE": cache}))
            print(f"{who}: {found[who][-1]}", file=sys.stderr, flush=True)
    return found


def medians(found: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float]]:
    """Of the figures that every run of a contestant has."""
    return {
        who: {
            key: statistics.median(run[key] for run in runs)
            for key, value in runs[0].items()
            if isinstance(value, float)
        }
        for who, runs in found.items()
    }


def compare(medians: dict[str, dict[str, float]]) -> dict[str, float]:
    """halfbyte's tokens a second over the others'."""
    own = medians["halfbyte"]["tokens_per_s"]
    return {who: own / each["tokens_per_s"] for who, each in medians.items() if who != "halfbyte"}


# --- the same rows for all ------------------------------------------------------------------------


def divide(model: Path, data: Path, place: Path) -> None:
    """train.jsonl for those who render themselves; ids and masks of both parts in rows.json."""
    from halfbyte.config.options import TrainConfig
    from halfbyte.data.dataset import read_data

    lines = data.read_text().splitlines()
    parts = {
        "train": [line for i, line in enumerate(lines) if i % 10],
        "held_out": [line for i, line in enumerate(lines) if i % 10 == 0],
    }
    rows: dict[str, Any] = {}
    for name, part in parts.items():
        (place / f"{name}.jsonl").write_text("\n".join(part) + "\n")
        config = TrainConfig(model=str(model), data="rows", max_length=LENGTH, eval_split=None)
        found = read_data(str(place / f"{name}.jsonl"), config, model)
        rows[name] = [(row.input_ids, row.loss_mask) for row in found.train.rows]
    (place / "rows.json").write_text(json.dumps(rows))


def loss(model: Any, rows: list[tuple[list[int], list[bool]]]) -> float:
    """transformers' loss per supervised token."""
    sums, counts = row_sums(model, rows)
    return sum(sums) / sum(counts)


def row_sums(model: Any, rows: list[tuple[list[int], list[bool]]]) -> tuple[list[float], list[int]]:
    """transformers' loss of each row, and its supervised tokens."""
    import torch

    sums: list[float] = []
    counts: list[int] = []
    model.eval()
    for ids, mask in rows:
        labels = torch.tensor([[i if m else -100 for i, m in zip(ids, mask, strict=True)]])
        kept = int((labels[:, 1:] != -100).sum())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=_in_bf16(model)):
            sums.append(float(model(input_ids=torch.tensor([ids]), labels=labels).loss) * kept)
        counts.append(kept)
    return sums, counts


def _in_bf16(model: Any) -> bool:
    import torch

    return model.config.dtype == torch.bfloat16


def answering(model: Any, ids: list[int]) -> float:
    """Tokens a second of one greedy answer, its prompt included."""
    import torch

    model.eval()
    asked = torch.tensor([ids[:32]])
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "use_cache": True}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=_in_bf16(model)):
        model.generate(asked, max_new_tokens=2, **options)
        began = time.perf_counter()
        model.generate(asked, max_new_tokens=ANSWER, min_new_tokens=ANSWER, **options)
    return ANSWER / (time.perf_counter() - began)


# --- the contestants ------------------------------------------------------------------------------


def by_halfbyte(model: Path, place: Path, seed: int, steps: int) -> dict[str, Any]:
    import halfbyte
    from halfbyte.progress import Reporter

    rows = json.loads((place / "rows.json").read_text())["held_out"]
    options: dict[str, Any] = {"max_length": LENGTH, "max_steps": steps, "seed": seed}
    options |= {"gradient_accumulation_steps": ROWS_A_STEP, "learning_rate": RATE}
    with tempfile.TemporaryDirectory() as home, PeakAnonymous() as memory:
        began = time.perf_counter()
        base, _ = halfbyte.load(str(model), dtype="bfloat16")
        loaded = time.perf_counter() - began
        before = loss(base, rows)
        del base
        run = halfbyte.train(
            model=str(model),
            data=str(place / "train.jsonl"),
            output_dir=f"{home}/run",
            reporter=Reporter(),
            num_samples=0,
            dtype="bfloat16",
            **options,
        )
        trained, _ = halfbyte.load(run.path)
        after, speed = loss(trained, rows), answering(trained, rows[0][0])
        del trained
        receipt = halfbyte.merge(run.path, f"{home}/merged")
        judged = transformers_say(model, Path(home) / "merged", rows)
        info = run.info()
        steps_made = [
            json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()
        ]
    tokens = sum(each["tokens"] for each in steps_made)
    seconds = sum(each["tokens"] / each["tokens_per_s"] for each in steps_made)
    said = info["judged"]["verdict"]
    return {
        "load_s": loaded,
        "tokens_per_s": tokens / seconds,
        "peak_mib": memory.mib,
        "answer_tokens_per_s": speed,
        "before": before,
        "after": after,
        "said": said,
        "neutral_kl": info["judged"]["neutral"]["kl"],
        "difference": info["judged"]["difference"],
        "transformers": judged,
        "right": said == judged["verdict"] or (said, judged["luck"]) == ("no better", True),
        "recommended": receipt.recommended,
        "merges": {name: each.loss for name, each in receipt.comparisons.items()},
    }


def transformers_say(start: Path, merged: Path, rows: Any) -> dict[str, Any]:
    """The loss of the untouched model and of the merged one, in fp32; which is better (whatever
    the interval), and whether their difference may be luck: the 95 % interval of the mean over
    rows holds zero."""
    import torch
    from transformers import AutoModelForCausalLM

    sums, counts = {}, [1]
    for name, path in (("start", start), ("onto trained", merged)):
        net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        sums[name], counts = row_sums(net, rows)
    gaps = [after - before for before, after in zip(*sums.values(), strict=True)]
    mean = sum(gaps) / sum(counts)
    spread = sum((gap - mean * n) ** 2 for gap, n in zip(gaps, counts, strict=True))
    half = 2.05 * math.sqrt(spread * len(gaps) / (len(gaps) - 1)) / sum(counts)  # Student's, 28
    return {
        **{name: sum(each) / sum(counts) for name, each in sums.items()},
        "difference": [mean, half],
        "verdict": "better" if mean < 0 else "worse",
        "luck": abs(mean) < half,
    }


def by_peer(who: str, model: Path, place: Path, seed: int, steps: int) -> dict[str, Any]:
    """The article's script on ready rows, or the same with more bits."""
    import datasets
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    rows = json.loads((place / "rows.json").read_text())
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *given: Any, **more: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            seconds.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as home, PeakAnonymous() as memory:
        began = time.perf_counter()
        if who.startswith("bitsandbytes"):
            net: Any = bnb_model(model)
        else:
            dtype = torch.float32 if who.startswith("full") else torch.bfloat16
            net = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        loaded = time.perf_counter() - began
        before = loss(net, rows["held_out"])
        if who.startswith("bitsandbytes"):
            net = peft.prepare_model_for_kbit_training(net)
        if not who.startswith("full"):
            lora = peft.LoraConfig(
                r=16,
                lora_alpha=32,
                target_modules="all-linear",
                lora_dropout=0.05,
                task_type="CAUSAL_LM",
            )
            net = peft.get_peft_model(net, lora)
        options = SFTConfig(
            output_dir=home,
            max_steps=steps,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=ROWS_A_STEP,
            learning_rate=RATES.get(who, RATE),
            lr_scheduler_type="linear",
            bf16=True,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            optim="adamw_torch" if who.startswith("full") else "paged_adamw_8bit",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            max_length=LENGTH,
            seed=seed,
            use_cpu=True,
            include_num_input_tokens_seen="all",
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(
            model=net,
            args=options,
            train_dataset=datasets.Dataset.from_list(
                [
                    {
                        "input_ids": ids,
                        "labels": [i if m else -100 for i, m in zip(ids, mask, strict=True)],
                    }
                    for ids, mask in rows["train"]
                ]
            ),
            processing_class=AutoTokenizer.from_pretrained(model),
            callbacks=[Clock()],
        )
        trainer.train()
        tokens = trainer.state.num_input_tokens_seen
        after, speed = loss(net, rows["held_out"]), answering(net, rows["held_out"][0][0])
    return {
        "load_s": loaded,
        "tokens_per_s": tokens / sum(seconds),
        "peak_mib": memory.mib,
        "answer_tokens_per_s": speed,
        "before": before,
        "after": after,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="+", choices=TRAINERS, default=list(TRAINERS))
    parser.add_argument("--child")
    parser.add_argument("--seed", type=int, default=0, help="the first of the seeds")
    given = parser.parse_args()
    if given.data and not given.data.exists():
        parser.error(f"there is no {given.data}")
    if given.child in STEPPERS and not given.data:
        print(json.dumps(step_of(given.model, 1, LENGTH, given.child)))
        return
    if given.child:
        make = by_halfbyte if given.child == "halfbyte" else functools.partial(by_peer, given.child)
        print(json.dumps(make(given.model, given.data, given.seed, given.steps)))
        return
    report: dict[str, Any] = {"machine": machine()}
    where = ["--model", str(given.model)]
    if given.rounds:
        report["step"] = medians(in_turns(STEPPERS, given.rounds, lambda who, turn: where))
        report["step times"] = compare(report["step"])
    if given.data:
        with tempfile.TemporaryDirectory() as place:
            divide(given.model, given.data, Path(place))
            more = [*where, "--data", place, "--steps", str(given.steps)]
            trainers = tuple(given.only)
            runs = in_turns(
                trainers,
                given.seeds,
                lambda who, turn: [*more, "--seed", str(given.seed + turn)],
            )
        report["train"] = medians(runs)
        if "halfbyte" in runs:
            report["train times"] = compare(report["train"])
        report["runs"] = runs
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()

"""One optimizer step of QLoRA on this CPU, beside its peers: same work, one run, alternating,
medians and ratios.

    python bench/step.py [--only 0.4b-1x512|1b-1x512|1b-4x256|optimize-0.4b-1x512] [--rounds 3]
    [--json]

Llamas with random weights, r=16 on all linear layers, alpha 32, gradient checkpointing for all.
``halfbyte`` and ``bitsandbytes_peft`` are the article's recipe (dropout 0.05; for the peer
``prepare_model_for_kbit_training``). ``optimized`` is ``bitsandbytes_peft`` after
`halfbyte.optimize`, then also with our 8-bit AdamW. ``tuned`` peers are at their best: no upcast,
no dropout, LoRA in bf16; beside them ``halfbyte_no_dropout``. ``kept_all`` keeps the results of all
products instead of computing them twice (``--kept_activations all``). Memory is the peak of
anonymous memory over that of the process with everything imported; peers keep what they do not
quantize (embeddings and head, 125 MiB at 0.4b; all weights in bf16) mapped from the file, which is
not in it, ours holds them.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpu import (
    GEOMETRY,
    KV_HEADS,
    PeakAnonymous,
    bnb_model,
    command_line,
    contest,
    machine,
    make_checkpoint,
    print_report,
)

CASES = {
    "0.4b-1x512": ("0.4b", 1, 512),
    "1b-1x512": ("1b", 1, 512),
    "1b-4x256": ("1b", 4, 256),
    "optimize-0.4b-1x512": ("0.4b", 1, 512),
}
OPTIMIZE = [
    "bitsandbytes_peft",
    "bitsandbytes_peft_optimized",
    "bitsandbytes_peft_optimized_keeping_nothing",
    "bitsandbytes_peft_optimized_with_our_optimizer",
    "halfbyte_kept_all",
]
CONTESTANTS = [
    "halfbyte",
    "bitsandbytes_peft",
    "halfbyte_kept_all",
    "halfbyte_no_dropout",
    "bitsandbytes_peft_tuned",
    "halfbyte_no_dropout_kept_all",
    "bf16_peft_tuned",
]
RANK, VOCABULARY, STEPS = 16, 32000, 4


def step(case: str, who: str, home: Path) -> dict[str, float]:
    size, rows, length = CASES[case]
    found = step_of(make_checkpoint(size, home), rows, length, who)
    if who.startswith("halfbyte"):
        found["over_floor"] = found["seconds"] / (flop(size, rows, length) / matmul_rate())
    return found


def step_of(path: Path, rows: int, length: int, who: str) -> dict[str, float]:
    """Tokens a second and peak memory of a step on a model, so many rows of so many tokens."""
    import torch

    torch.manual_seed(0)
    ids = [torch.randint(4, VOCABULARY, (rows, length)) for _ in range(3)]
    _warm_up()
    seconds, losses = [], []
    with PeakAnonymous() as memory:
        make = _halfbyte if who.startswith("halfbyte") else _peer
        run = make(path, who)
        for number in range(STEPS):
            began = time.perf_counter()
            losses.append(run(ids[number % 3], number))
            seconds.append(time.perf_counter() - began)
    each = statistics.median(seconds[1:])
    return {
        "tokens_per_s": rows * length / each,
        "seconds": each,
        "peak_mib": memory.mib,
        "loss": losses[-1],
    }


def _warm_up() -> None:
    """What every contestant imports and starts anyway, so that it is no one's memory."""
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import halfbyte.training.trainer  # noqa: F401

    layer = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    layer(torch.randn(32, 64, dtype=torch.bfloat16)).sum().backward()


def flop(size: str, rows: int, length: int) -> float:
    """Operations of a step with checkpointing: forward, again, and input gradients; head;
    attention; adapters."""
    g, tokens = GEOMETRY[size], rows * length
    d, ff, layers = g["hidden_size"], g["intermediate_size"], g["num_hidden_layers"]
    kv = d // g["num_attention_heads"] * KV_HEADS[size]
    shapes = [(d, d), (d, kv), (d, kv), (d, d), (d, ff), (d, ff), (ff, d)]
    weights, sides = sum(a * b for a, b in shapes), sum(a + b for a, b in shapes)
    attention = rows * (2 * length**2 * d) * (2 + 2.5)
    return (
        layers * (6 * tokens * weights + 8 * tokens * RANK * sides + attention)
        + 4 * tokens * d * VOCABULARY
    )


def matmul_rate() -> float:
    """Operations per second of PyTorch's own bf16 product, 512 x 4096 x 4096."""
    import torch

    a, b = (
        torch.randn(512, 4096, dtype=torch.bfloat16),
        torch.randn(4096, 4096, dtype=torch.bfloat16),
    )
    times = []
    for _ in range(15):
        began = time.perf_counter()
        a @ b.t()
        times.append(time.perf_counter() - began)
    return 2 * 512 * 4096 * 4096 / statistics.median(times)


def _halfbyte(path: Path, who: str) -> Callable[[Any, int], float]:
    from halfbyte.config.options import TrainConfig
    from halfbyte.data.batches import collate
    from halfbyte.data.encoder import TokenizedExample
    from halfbyte.model import attention
    from halfbyte.run.directory import Run
    from halfbyte.training.step import stepper_for

    config = TrainConfig(
        model=str(path),
        data="none",
        lora_dropout=0.0 if "no_dropout" in who else 0.05,
        dtype="bfloat16",
        max_steps=1000,
        kept_activations="all" if who.endswith("kept_all") else "none",
    )
    stepper = stepper_for(config, path, Run(path))
    attention.register()
    stepper.learner.model.set_attn_implementation(attention.NAME)

    def run(ids: Any, number: int) -> float:
        rows = [TokenizedExample("bench", row.tolist(), [True] * len(row)) for row in ids]
        return stepper.run(number, [collate(rows, list(range(len(rows))))])["loss"]

    return run


def _peer(path: Path, who: str) -> Callable[[Any, int], float]:
    import bitsandbytes
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    import halfbyte

    tuned = who.endswith("tuned")
    if who.startswith("bf16"):
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    else:
        model = bnb_model(path)
    if not tuned:
        model = peft.prepare_model_for_kbit_training(
            model, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    lora = peft.LoraConfig(
        r=RANK,
        lora_alpha=32,
        target_modules="all-linear",
        lora_dropout=0.0 if tuned else 0.05,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(model, lora, autocast_adapter_dtype=not tuned)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.config.use_cache = False
    model.train()
    if "optimized" in who:
        model = halfbyte.optimize(
            model, kept_activations="none" if who.endswith("nothing") else "auto"
        )
    adamw = halfbyte.PagedAdamW8bit if who.endswith("optimizer") else bitsandbytes.optim.AdamW8bit
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], lr=2e-4)

    def run(ids: Any, number: int) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def main() -> None:
    arguments = command_line(__doc__, list(CASES))
    if arguments.child:
        case, who = arguments.child
        print(json.dumps(step(case, who, arguments.home)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        home = arguments.home or Path(temporary)
        report: dict[str, Any] = {}
        for case in [arguments.only] if arguments.only else CASES:
            contestants = OPTIMIZE if case.startswith("optimize") else CONTESTANTS
            found = contest(__file__, case, contestants, arguments.rounds, home)
            for who in ("halfbyte", *OPTIMIZE[1:]):
                if who in found:
                    peer = found["bitsandbytes_peft"]
                    found[who]["times_bitsandbytes_peft"] = (
                        found[who]["tokens_per_s"] / peer["tokens_per_s"]
                    )
            report[case] = found
            if contestants is OPTIMIZE:
                continue
            for who in ("halfbyte_no_dropout", "halfbyte_no_dropout_kept_all"):
                for peer in ("bitsandbytes_peft_tuned", "bf16_peft_tuned"):
                    found[who][f"times_{peer}"] = (
                        found[who]["tokens_per_s"] / found[peer]["tokens_per_s"]
                    )
    report["machine"] = machine()
    print_report(report, arguments.json)


if __name__ == "__main__":
    main()

"""Planned memory against measured: the steady step of trainings on this machine (its GPU, if it has
one).

    python bench/memory.py [--only 0.4b-1x512-none-r16] [--json]

Each configuration runs in a process of its own: planned before the weights are read, then trained
for four optimizer steps. ``tensors`` is the peak over one steady step of all tensors, counted
operation by operation; ``process`` the peak of the process's anonymous resident memory over another
(on a GPU: of what PyTorch reserved). ``short`` is how much less was planned than measured.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

from cpu import command_line, contest, machine, make_checkpoint, print_report

CASES = [
    "0.4b-1x128-none-r8",
    "0.4b-1x512-none-r16",
    "0.4b-1x512-none-r64",
    "0.4b-1x512-all-r16",
    "0.4b-4x256-attention-r16",
    "0.4b-1x2048-none-r16",
    "0.4b-1x128-off-r8",
    "0.4b-2x512-off-r16",
    "1b-1x128-none-r8",
    "1b-1x512-none-r16",
    "1b-4x256-none-r64",
    "1b-1x512-all-r16",
    "1b-1x1024-mlp_in-r16",
    "1b-2x128-off-r32",
]
"""Geometry, rows x length, what is kept (off: no checkpointing), rank."""


def measure(case: str, home: Path) -> dict[str, float]:
    import torch

    from halfbyte.config.options import TrainConfig
    from halfbyte.data.batches import collate
    from halfbyte.data.encoder import TokenizedExample
    from halfbyte.memory.process import Peak
    from halfbyte.model import attention
    from halfbyte.planning.parts import on_device
    from halfbyte.planning.search import Planner
    from halfbyte.planning.tracker import MemoryTracker
    from halfbyte.run.directory import Run
    from halfbyte.training.step import stepper_for

    size, shape, keep, rank = case.split("-")
    rows, length = (int(n) for n in shape.split("x"))
    path = make_checkpoint(size, home)
    options: dict[str, Any] = {
        "model": str(path),
        "data": "none",
        "dtype": "bfloat16",
        "max_steps": 1000,
        "max_length": length,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "lora_r": int(rank[1:]),
        "gradient_checkpointing": keep != "off",
        "kept_activations": "none" if keep == "off" else keep,
    }
    config = TrainConfig(**options)
    plan = Planner(path, config, None).plan()
    stepper = stepper_for(config, path, Run(path))
    generator = torch.Generator().manual_seed(0)
    given = [
        TokenizedExample(
            "bench",
            torch.randint(4, 32000, (length,), generator=generator).tolist(),
            [True] * length,
        )
    ] * rows
    batches = [collate(given, range(rows))]
    with attention.packed(stepper.learner.model):
        for step in range(2):
            stepper.run(step, batches)
        peak = Peak(stepper.learner.device)
        stepper.run(2, batches)
        process = peak.bytes()
        with MemoryTracker(on_device(stepper.learner)) as count:
            count.restart()
            stepper.run(3, batches)
    scratch = plan.bytes_of("kernel scratch", "dequantized weight")
    # on a GPU the allocator is measured, which knows nothing of the context
    planned = plan.phases["step"] - plan.bytes_of("GPU context")
    return {
        "planned_tensors": plan.tensor_bytes - scratch,
        "tensors": count.peak,
        "short_tensors": 1 - (plan.tensor_bytes - scratch) / count.peak,
        "planned_process": planned,
        "process": process,
        "short_process": 1 - planned / process,
        "runtime": plan.bytes_of("the process before it"),
    }


def main() -> None:
    arguments = command_line(__doc__, CASES)
    if arguments.child:
        print(json.dumps(measure(arguments.child[0], arguments.home)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        home = arguments.home or Path(temporary)
        for size in ("0.4b", "1b"):
            make_checkpoint(size, home)
        report: dict[str, Any] = {}
        for case in [arguments.only] if arguments.only else CASES:
            report[case] = contest(__file__, case, ["halfbyte"], 1, home)["halfbyte"]
    report["machine"] = machine()
    print_report(report, arguments.json)


if __name__ == "__main__":
    main()

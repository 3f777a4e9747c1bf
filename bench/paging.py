"""What leaving memory costs: a training step with states, layer inputs and weights in memory and
out of it.

    python bench/paging.py [--only modes|memory|7b|70b] [--rounds 3] [--home DIR] [--json]

``modes``: the 0.37B geometry of step.py, 512 tokens, every mode in one process, step by step in
turns (three times --rounds each); ``update_ms`` is the optimizer's part. ``memory``: the same, each
in a process of its own; ``states_mib`` is what of the optimizer's states was in memory after a
step. ``7b``: Llama 2 7B's geometry, random 4-bit weights, a step of 512 tokens with the weights in
memory, streamed, and streamed within a memory limit of 4 GB (a control group, where one can be
made). ``70b``: Llama 2 70B's geometry, one optimizer step of 256 tokens. The weights of the last
two are written to --home first (3.8 and 36.5 GB) and stay there if it is given.
"""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpu import command_line, contest, machine, make_checkpoint, print_report

MODES: dict[str, dict[str, Any]] = {
    "in_memory": {},
    "states_out": {"paging": "always"},
    "inputs_out": {"activation_offloading": "always"},
    "weights_out": {"weight_streaming": "always"},
    "all_out": {
        "paging": "always",
        "activation_offloading": "always",
        "weight_streaming": "always",
    },
}
STREAMED: dict[str, Any] = {
    "weight_streaming": "always",
    "activation_offloading": "always",
    "paging": "always",
}
SIZES: dict[str, dict[str, Any]] = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
}
CONTESTANTS = {
    "modes": ["all"],
    "memory": list(MODES),
    "7b": ["in_memory", "streamed", "streamed_in_4_gb"],
    "70b": ["streamed"],
}
TOKENS = {"modes": 512, "memory": 512, "7b": 512, "70b": 256}
LIMIT = 4 * 10**9
ROUNDS = "HALFBYTE_BENCH_ROUNDS"


def make_packed(size: str, home: Path) -> Path:
    """A Llama with 4-bit weights of random bytes, as `quantization.writer` writes a base."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig

    from halfbyte import ops
    from halfbyte.config.options import ModelOptions
    from halfbyte.files import atomic, hub
    from halfbyte.files.safetensors import INDEX, TensorFile
    from halfbyte.model.architecture import build_empty
    from halfbyte.model.targets import quantizable
    from halfbyte.quantization import writer as quantized
    from halfbyte.quantization.bnb_format import STATE_KEY, components
    from halfbyte.quantization.tensor import NF4Tensor, quantize
    from halfbyte.quantization.weights import _digest

    path = home / f"packed-{size}"
    if (path / quantized.FACTS).exists():
        return path
    shutil.rmtree(path, ignore_errors=True)
    config = LlamaConfig(**{"vocab_size": 32000, **SIZES[size]}, max_position_embeddings=4096)
    config.save_pretrained(path)
    AutoTokenizer.from_pretrained(hub.resolve("demo")).save_pretrained(path)
    model, options = build_empty(config), ModelOptions()
    in_4bit = quantizable(model)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (1 << 28,), dtype=torch.uint8, generator=generator)
    template = quantize(torch.zeros(64, 64))

    def packed(shape: torch.Size, number: int) -> NF4Tensor:
        count = shape.numel()
        at = 1_000_003 * number % (len(noise) - count // 2)
        blocks = count // 64
        parts = ops.FourBit(
            noise[at : at + count // 2],
            noise[:blocks],
            template.quant_map,
            torch.full((-(-blocks // 256),), 0.01),
            template.nested_quant_map,
            torch.tensor(0.04),
            64,
            256,
        )
        return NF4Tensor(parts, shape, torch.bfloat16, "nf4")

    digests, weight_map, names = [], {}, [name for name, _ in model.named_parameters()]
    shards = [names[i : i + 63] for i in range(0, len(names), 63)]
    number = 0
    for place, shard in enumerate(shards):
        file = f"model-{place + 1:05d}-of-{len(shards):05d}.safetensors"
        known: dict[str, Any] = {}
        late: dict[str, int] = {}
        for name in shard:
            p = model.get_parameter(name)
            if name in in_4bit:
                parts = components(name, packed(p.shape, 0))
                late |= {key: 512 for key in parts if STATE_KEY in key}
                known |= {
                    key: (t.dtype, tuple(t.shape)) for key, t in parts.items() if key not in late
                }
            else:
                known[name] = (torch.bfloat16, tuple(p.shape))
        with TensorFile(path / file, known, late) as out:
            for name in shard:
                p = model.get_parameter(name)
                number += 1
                if name in in_4bit:
                    tensor = packed(p.shape, number)
                    written, held = components(name, tensor), tensor.stored_tensors()
                else:
                    values = (
                        torch.ones(p.shape)
                        if p.dim() == 1
                        else torch.empty(p.shape).normal_(0, 0.02, generator=generator)
                    )
                    written = {name: values.bfloat16()}
                    held = [written[name]]
                digests.append((name, _digest(held)))
                for key, value in written.items():
                    out.write(key, value)
                    weight_map[key] = file
    atomic.write_json(path / INDEX, {"metadata": {}, "weight_map": weight_map})
    quantization = quantized._quantization(options, None)
    atomic.write_json(
        path / "config.json", {**atomic.read_json(path / "config.json"), **quantization}
    )
    digest = hashlib.sha256(json.dumps(sorted(digests)).encode()).hexdigest()
    atomic.write_json(path / quantized.FACTS, {"digest": digest, "tensors": []})
    return path


@contextlib.contextmanager
def limited(size: int) -> Iterator[bool]:
    """Within this block this process and what it maps may take so many bytes, page cache included;
    False where no control group can be made."""
    home = Path("/sys/fs/cgroup/memory")
    group = (home if home.is_dir() else Path("/sys/fs/cgroup")) / f"halfbyte-{os.getpid()}"
    try:
        group.mkdir()
        name = "memory.limit_in_bytes" if home.is_dir() else "memory.max"
        (group / name).write_text(str(size))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()))
        with contextlib.suppress(OSError):
            group.rmdir()


def forget(directory: Path) -> None:
    """Have the system drop what it keeps of these files, so that they are read from disk, within a
    limit if there is one."""
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def status(key: str) -> int:
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(f"{key}:")
    )
    return int(line.split()[1]) * 1024


def disk_bytes(key: str) -> int:
    """read_bytes or write_bytes of this process: what storage was really asked for."""
    line = next(
        line
        for line in Path("/proc/self/io").read_text().splitlines()
        if line.startswith(f"{key}:")
    )
    return int(line.split()[1])


def config_for(case: str, options: dict[str, Any], home: Path) -> Any:
    from halfbyte.config.options import TrainConfig

    path = home / f"packed-{case}" if case in SIZES else make_checkpoint("0.4b", home)
    return TrainConfig(
        model=str(path),
        data="none",
        dtype="bfloat16",
        max_steps=1000,
        max_length=TOKENS[case],
        gradient_accumulation_steps=1,
        kept_activations="none",
        output_dir=str(home / "out"),
        **options,
    )


def stepper(config: Any) -> Any:
    from halfbyte.run.directory import Run
    from halfbyte.training.step import stepper_for

    return stepper_for(config, Path(config.model), Run(Path(config.model)))


def batches_for(case: str) -> list[Any]:
    import torch

    from halfbyte.data.batches import collate
    from halfbyte.data.encoder import TokenizedExample

    generator, tokens = torch.Generator().manual_seed(0), TOKENS[case]
    ids = torch.randint(4, 32000, (tokens,), generator=generator).tolist()
    return [collate([TokenizedExample("bench", ids, [True] * tokens)], [0])]


def modes(rounds: int, home: Path) -> dict[str, dict[str, float]]:
    """Every mode's step, in turns."""
    from halfbyte.model import attention

    trainers: dict[str, Any] = {}
    for who, options in MODES.items():
        trainers[who] = stepper(config_for("modes", options, home))
        attention.register()
        trainers[who].learner.model.set_attn_implementation(attention.NAME)
    seconds: dict[str, list[float]] = {who: [] for who in MODES}
    updates: dict[str, list[float]] = {who: [] for who in MODES}
    for step in range(3 * rounds + 1):
        for who, trainer in trainers.items():
            honest = trainer.learner.update

            def timed(rate: float, honest: Any = honest, who: str = who) -> None:
                began = time.perf_counter()
                honest(rate)
                updates[who].append(time.perf_counter() - began)

            trainer.learner.update = timed
            began = time.perf_counter()
            trainer.run(step, batches_for("modes"))
            seconds[who].append(time.perf_counter() - began)
            trainer.learner.update = honest
    return {
        who: {
            "step_s": statistics.median(seconds[who][1:]),
            "tokens_per_s": TOKENS["modes"] / statistics.median(seconds[who][1:]),
            "update_ms": 1e3 * statistics.median(updates[who][1:]),
        }
        for who in MODES
    }


def measure(case: str, who: str, home: Path) -> dict[str, Any]:
    if who == "streamed_in_4_gb":
        import halfbyte.training.trainer  # noqa: F401  # what is read while importing is no part of it

        with limited(LIMIT) as is_limited:
            return {**alone(case, STREAMED, home), "limited": is_limited}
    return alone(
        case, MODES[who] if case == "memory" else STREAMED if who == "streamed" else {}, home
    )


def alone(case: str, options: dict[str, Any], home: Path) -> dict[str, Any]:
    """A training step in this process, and what it took of memory and disk."""
    from halfbyte.engine.paged_optimizers import PagedAdamW8bit
    from halfbyte.memory.process import Peak
    from halfbyte.model import attention
    from halfbyte.planning.search import Planner

    config = config_for(case, options, home)
    path = Path(config.model)
    forget(path)
    plan = Planner(path, config, None).plan()
    began = time.perf_counter()
    trainer = stepper(config)
    loaded = time.perf_counter() - began
    seconds, anonymous, read, written, loss = [], 0, 0, 0, 0.0
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    with attention.packed(trainer.learner.model):
        for step in range(1 if case == "70b" else 2):
            read, written = disk_bytes("read_bytes"), disk_bytes("write_bytes")
            peak = Peak(trainer.learner.device)
            began = time.perf_counter()
            loss = trainer.run(step, batches_for(case))["loss"]
            seconds.append(time.perf_counter() - began)
            anonymous = max(anonymous, peak.bytes())
    optimizer = trainer.learner.optimizer
    assert isinstance(optimizer, PagedAdamW8bit)
    weights = ("4-bit codes", "scales", "streamed weights")
    return {
        "step_s": seconds[-1],
        "tokens_per_s": TOKENS[case] / seconds[-1],
        "load_s": loaded,
        "anonymous_mib": anonymous / 2**20,
        "planned_mib": plan.phases["step"] / 2**20,
        "resident_mib": status("VmHWM") / 2**20,
        "states_mib": optimizer.resident_bytes() / 2**20,
        "states_all_mib": sum(t.nbytes for t in optimizer.state_tensors().values()) / 2**20,
        "read_gb": (disk_bytes("read_bytes") - read) / 1e9,
        "written_gb": (disk_bytes("write_bytes") - written) / 1e9,
        "weights_gb": sum(part.bytes for part in plan.ledger if part.part in weights) / 1e9,
        "swapped_mib": status("VmSwap") / 2**20,
        "major_faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults,
        "loss": loss,
    }


def main() -> None:
    arguments = command_line(__doc__, list(CONTESTANTS))
    if arguments.child:
        case, who = arguments.child
        found = (
            modes(int(os.environ[ROUNDS]), arguments.home)
            if who == "all"
            else measure(case, who, arguments.home)
        )
        print(json.dumps(found))
        return
    with tempfile.TemporaryDirectory() as temporary:
        home = arguments.home or Path(temporary)
        os.environ["HALFBYTE_CACHE"] = str(home / "cache")
        report: dict[str, Any] = {}
        for case in [arguments.only] if arguments.only else CONTESTANTS:
            if case in SIZES:
                make_packed(case, home)
            os.environ[ROUNDS] = str(arguments.rounds)
            found = contest(__file__, case, CONTESTANTS[case], 1, home)
            first = next(iter(found.values()))
            for figures in found.values():
                figures["times_in_memory"] = figures["step_s"] / first["step_s"]
            report[case] = found
    report["machine"] = machine()
    print_report(report, arguments.json)


if __name__ == "__main__":
    main()

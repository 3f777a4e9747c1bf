"""This package against its peers on this CPU: same work, one run, alternating, medians and ratios.

    python bench/cpu.py [--only quant|linear|adamw|generate|load] [--rounds 3] [--json]

The contestants take turns, so that a change of the machine's speed hits all alike: call by call
within one process for single operations (``quant``, ``linear``, ``adamw``), process by process for
models. torchao takes part where it is installed (it is no dependency of ours, not even for
development). ``linear`` is forward and input gradient of one layer, also on each lesser instruction
set the processor can play. Training steps are in ``step.py``.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

GEOMETRY: dict[str, dict[str, Any]] = {
    "0.4b": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
    },
    "1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
    },
}
KV_HEADS = {"0.4b": 16, "1b": 4}
CONTESTANTS = {
    "quant": ["all"],
    "linear": ["all"],
    "adamw": ["all"],
    "generate": ["halfbyte", "transformers_bf16", "bitsandbytes"],
    "load": ["halfbyte", "bitsandbytes"],
}


def median_of(call: Callable[[], object], repeats: int) -> float:
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def make_checkpoint(size: str, home: Path) -> Path:
    """A random bf16 Llama in safetensors."""
    path = home / f"llama-{size}"
    if (path / "config.json").exists():
        return path
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **GEOMETRY[size],
        num_key_value_heads=KV_HEADS[size],
        vocab_size=32000,
        max_position_embeddings=2048,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def bnb_model(path: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    q = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=q, device_map={"": "cpu"}, dtype=torch.bfloat16
    )


# --- single operations ----------------------------------------------------------------------------


def alternate(
    calls: dict[str, Callable[[], object]], seconds: float = 2.0, most: int = 25
) -> dict[str, float]:
    """Median milliseconds of each, taking turns; each gets about ``seconds`` in all, but three
    turns at least."""
    turns = {}
    for who, call in calls.items():
        call()
        began = time.perf_counter()
        call()
        turns[who] = max(3, min(most, int(seconds / max(time.perf_counter() - began, 1e-6))))
    times: dict[str, list[float]] = {who: [] for who in calls}
    for turn in range(max(turns.values())):
        for who, call in calls.items():
            if turn < turns[who]:
                began = time.perf_counter()
                call()
                times[who].append(time.perf_counter() - began)
    return {who: statistics.median(t) * 1e3 for who, t in times.items()}


def on_path(path: str, call: Callable[[], object]) -> Callable[[], object]:
    from halfbyte.ops import cpu

    def run() -> None:
        cpu.choose_path(path)
        call()

    return run


def our_paths() -> dict[str, str]:
    """Name in the table -> path, the best first; {} where nothing was compiled."""
    from halfbyte.ops import cpu

    return {
        "halfbyte" if i == 0 else f"halfbyte_on_{path}": path for i, path in enumerate(cpu.paths())
    }


def torchao_nf4() -> Any:
    """(to_nf4, linear_nf4), or None."""
    try:
        module = importlib.import_module("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    except ImportError:
        return None
    return module.to_nf4, module.linear_nf4


def quant(who: str, home: Path) -> dict[str, dict[str, float]]:
    """Milliseconds for a 4096 x 11008 bf16 weight, block 64, double quantized; a copy of it as the
    yardstick."""
    import bitsandbytes.functional as bnb
    import torch

    from halfbyte import ops
    from halfbyte.quantization.tensor import quantize

    torch.manual_seed(0)
    w = torch.randn(4096, 11008, dtype=torch.bfloat16)
    q, out = quantize(w), torch.empty(w.numel(), dtype=w.dtype)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    copied = torch.empty_like(w)
    forward: dict[str, Callable[[], object]] = {"torch_copy": lambda: copied.copy_(w)}
    back: dict[str, Callable[[], object]] = dict(forward)
    for name, path in our_paths().items():
        forward[name] = on_path(path, lambda: quantize(w))
        back[name] = on_path(path, lambda: ops.dequantize_4bit(q.parts, w.numel(), w.dtype, out))
    forward["bitsandbytes"] = lambda: bnb.quantize_4bit(
        w, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    back["bitsandbytes"] = lambda: bnb.dequantize_4bit(packed, state)
    if ao := torchao_nf4():
        theirs = ao[0](w)
        forward["torchao"] = lambda: ao[0](w)
        back["torchao"] = lambda: theirs.get_original_weight()
    quantized, dequantized = alternate(forward), alternate(back)
    return {
        name: {
            "quantize_ms": quantized[name],
            "quantize_against_copy": quantized["torch_copy"] / quantized[name],
            "dequantize_ms": dequantized[name],
            "dequantize_against_copy": dequantized["torch_copy"] / dequantized[name],
        }
        for name in forward
    }


LINEAR_TOKENS = (1, 64, 512, 2048)


def linear(who: str, home: Path) -> dict[str, dict[str, float]]:
    """Milliseconds of forward and input gradient of one layer, and the ratio to a bf16
    `nn.Linear`."""
    import bitsandbytes as bnb
    import torch
    from torch import nn

    from halfbyte.quantization.tensor import quantize

    results: dict[str, dict[str, float]] = {}
    for columns in (4096, 11008):
        torch.manual_seed(0)
        w = (torch.randn(4096, columns) * 0.02).bfloat16()
        plain = nn.Linear(columns, 4096, bias=False, dtype=torch.bfloat16)
        plain.weight = nn.Parameter(w, requires_grad=False)
        ours = nn.Linear(columns, 4096, bias=False, device="meta")
        ours.weight = nn.Parameter(quantize(w), requires_grad=False)
        theirs = bnb.nn.Linear4bit(
            columns,
            4096,
            bias=False,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            compress_statistics=True,
        )
        make: Any = bnb.nn.Params4bit
        held = make(
            w.clone(),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=True,
            module=theirs,
        )
        theirs.weight = held
        theirs = theirs.to("cpu").train()
        ao = torchao_nf4()
        nf4_weight = ao[0](w) if ao else None
        for tokens in LINEAR_TOKENS:
            x = torch.randn(tokens, columns, dtype=torch.bfloat16, requires_grad=True)
            grad = torch.randn(tokens, 4096, dtype=torch.bfloat16)

            def both(
                layer: Callable[[Any], Any], x: Any = x, grad: Any = grad
            ) -> Callable[[], None]:
                def run() -> None:
                    x.grad = None
                    layer(x).backward(grad)

                return run

            calls: dict[str, Callable[[], object]] = {"bf16": both(plain)}
            for name, path in our_paths().items():
                if name == "halfbyte" or tokens <= 512:
                    calls[name] = on_path(path, both(ours))
            calls["bitsandbytes"] = both(theirs)
            if ao:
                calls["torchao"] = both(lambda x, ao=ao, weight=nf4_weight: ao[1](x, weight))
            for name, milliseconds in alternate(calls, seconds=1.5).items():
                results.setdefault(name, {})[f"4096x{columns}_{tokens}_ms"] = milliseconds
        for found in results.values():
            for tokens in LINEAR_TOKENS:
                key = f"4096x{columns}_{tokens}"
                if f"{key}_ms" in found:
                    found[f"{key}_ratio"] = found[f"{key}_ms"] / results["bf16"][f"{key}_ms"]
    return results


def adamw(who: str, home: Path) -> dict[str, dict[str, float]]:
    """Milliseconds of one 8-bit AdamW step over the adapters (r=16, all linear layers) of the 0.37B
    model."""
    import bitsandbytes
    import torch

    from halfbyte.engine.adamw8bit import AdamW8bit

    d, ff = GEOMETRY["0.4b"]["hidden_size"], GEOMETRY["0.4b"]["intermediate_size"]
    layer = [(d, d)] * 4 + [(d, ff)] * 2 + [(ff, d)]
    shapes = [
        shape
        for a, b in layer * GEOMETRY["0.4b"]["num_hidden_layers"]
        for shape in ((16, a), (b, 16))
    ]
    calls: dict[str, Callable[[], object]] = {}
    for name, kind in (("halfbyte", AdamW8bit), ("bitsandbytes", bitsandbytes.optim.AdamW8bit)):
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        calls[name] = kind(params, lr=1e-4).step
    found = alternate(calls)
    return {
        name: {"step_ms": ms, "against_bitsandbytes": ms / found["bitsandbytes"]}
        for name, ms in found.items()
    }


# --- generation -----------------------------------------------------------------------------------


def generate(who: str, home: Path) -> dict[str, float]:
    """Tokens per second of transformers' `generate`, one sequence, greedy, 1.1B geometry, without
    the prompt."""
    import torch

    path = make_checkpoint("1b", home)
    if who == "halfbyte":
        from halfbyte.config.options import ModelOptions
        from halfbyte.quantization.load import load_base

        model = load_base(path, ModelOptions(dtype="bfloat16"))[0]
    elif who == "bitsandbytes":
        model = bnb_model(path).eval()
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    model: Any = model
    torch.manual_seed(0)
    ids = torch.randint(4, 32000, (1, 16))

    def seconds(tokens: int) -> float:
        began = time.perf_counter()
        model.generate(
            ids, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return time.perf_counter() - began

    with torch.inference_mode():
        seconds(2)
        each = statistics.median((seconds(28) - seconds(4)) / 24 for _ in range(3))
    return {"tokens_per_s": 1 / each, "ms_per_token": each * 1e3}


# --- loading --------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


class PeakAnonymous:
    """Within this block anonymous resident memory is sampled each 5 ms; ``mib`` is its peak over
    that at entry."""

    def __enter__(self) -> "PeakAnonymous":
        self.before = self.peak = anonymous_bytes()
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        return self

    def watch(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.watcher.join()
        self.mib = (self.peak - self.before) / 2**20


def load(who: str, home: Path) -> dict[str, float]:
    """Seconds and peak anonymous memory of a 1.1B bf16 checkpoint into 4 bits."""
    path = make_checkpoint("1b", home)
    if who == "halfbyte":
        from halfbyte.config.options import ModelOptions
        from halfbyte.quantization.load import load_base

        call = lambda: load_base(path, ModelOptions(dtype="bfloat16"))[0]  # noqa: E731
        import transformers.models.llama.modeling_llama as _  # noqa: F401
    else:
        import bitsandbytes  # noqa: F401

        call = lambda: bnb_model(path)  # noqa: E731
    with PeakAnonymous() as memory:
        began = time.perf_counter()
        model = call()
        seconds = time.perf_counter() - began
    sizes = [getattr(p, "stored_bytes", p.nbytes) for p in model.parameters()]
    largest = max(p.numel() for p in model.parameters()) * 2
    return {
        "seconds": seconds,
        "peak_anonymous_mib": memory.mib,
        "finished_model_mib": sum(sizes) / 2**20,
        "largest_tensor_mib": largest / 2**20,
    }


# --- the contest ----------------------------------------------------------------------------------


def child(name: str, command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    """What a measuring process prints in its last line, JSON; where it fails, what it said."""
    with tempfile.TemporaryFile() as said:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=said, env=environment)
        said.seek(0)
        last = said.read().decode(errors="replace").splitlines()[-30:]
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        state = f"was killed by signal {-done.returncode}" if done.returncode < 0 else "failed"
        raise SystemExit(
            "\n".join([*last, f"{name} {state} ({done.returncode}): {' '.join(command)}"])
        )
    return json.loads(lines[-1])


def contest(
    script: str, what: str, contestants: list[str], rounds: int, home: Path
) -> dict[str, dict[str, float]]:
    """Each contestant in a process of its own, taking turns; medians over the rounds."""
    results: dict[str, list[dict[str, Any]]] = {who: [] for who in contestants}
    for _ in range(rounds):
        for who in contestants:
            command = [sys.executable, script, "--child", what, who, "--home", str(home)]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
            results[who].append(child(f"{what} {who}", command, environment))
            print(f"{what} {who}: {results[who][-1]}", file=sys.stderr, flush=True)
    if list(results) == ["all"]:  # one process held them all
        runs = results["all"]
        return {
            who: {k: statistics.median(r[who][k] for r in runs) for k in runs[0][who]}
            for who in runs[0]
        }
    return {
        who: {k: statistics.median(r[k] for r in runs) for k in runs[0]}
        for who, runs in results.items()
    }


def machine() -> dict[str, Any]:
    import torch

    from halfbyte.ops import cpu as kernels

    cpu = next(
        (
            x.split(": ")[1]
            for x in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in x
        ),
        "",
    )
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "kernels": kernels.why(),
        "platform": platform.platform(),
        "commit": commit,
    }


def command_line(text: str | None, choices: list[str]) -> argparse.Namespace:
    """The options of a bench."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=choices)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument(
        "--home",
        type=Path,
        help="where the random checkpoints are kept; a temporary directory else",
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = command_line(__doc__, sorted(CONTESTANTS))
    if arguments.child:
        what, who = arguments.child
        print(json.dumps(CALLS[what](who, arguments.home)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        home = arguments.home or Path(temporary)
        chosen = [arguments.only] if arguments.only else list(CONTESTANTS)
        report: dict[str, Any] = {
            what: contest(__file__, what, CONTESTANTS[what], arguments.rounds, home)
            for what in chosen
        }
    report["machine"] = machine()
    print_report(report, arguments.json)


CALLS: dict[str, Callable[[str, Path], Any]] = {
    "quant": quant,
    "linear": linear,
    "adamw": adamw,
    "generate": generate,
    "load": load,
}


def print_report(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(report, indent=2))
        return
    for what, contestants in report.items():
        for who, figures in contestants.items() if what != "machine" else ():
            print(f"{what:6} {who:26} " + "  ".join(f"{k} {v:,.4g}" for k, v in figures.items()))
    print(f"machine: {report['machine']}")


if __name__ == "__main__":
    main()

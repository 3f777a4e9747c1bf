"""``halfbyte bench``: this machine's limits, and what we reach of them.

An operation can be no faster than its bytes at the rate of a copy and its products at the rate of
the arithmetic units fed from registers; its limit is the larger of the two times. All figures are
medians; peers are measured by ``bench/cpu.py``.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from ..config.verbs import BenchConfig
from . import console
from .options import Verb

ROWS, COLUMNS = 4096, 4096
TOKENS = (1, 64, 512)
PARAMETERS = 8 << 20


def bench(record: BenchConfig) -> dict[str, Any]:
    """This machine's limits, and ours against them: about half a minute."""
    import torch

    from ..ops import cpu

    if record.path:
        cpu.choose_path(record.path)
    console.say(
        f"kernels: {cpu.why() if not record.path else record.path}; {torch.get_num_threads()} "
        "threads"
    )
    limits, rows = _limits(), []
    steps = 3 + 2 * len(TOKENS)
    for _ in console.progress(_measured(limits, rows), steps, "measuring"):
        pass
    fast = (
        f"{limits['bf16_flops'] / 1e9:,.0f} GFLOP/s in bf16, " if limits.get("bf16_flops") else ""
    )
    slow = (
        f"{limits['fp32_flops'] / 1e9:,.0f} in fp32"
        if limits.get("fp32_flops")
        else "products: no library to measure"
    )
    console.say(
        f"limits: copying {limits['copy_bytes'] / 1e9:.1f} GB/s (read and written), {fast}{slow}"
    )
    console.table(
        f"a weight of {ROWS} x {COLUMNS}, against the limits",
        ["", "ms", "limit", "reached", "bf16 layer", "ratio"],
        [
            [
                row["operation"],
                f"{row['ms']:.2f}",
                f"{row['limit_ms']:.2f}",
                f"{row['limit_ms'] / row['ms']:.0%}",
                f"{row['bf16_ms']:.2f}" if "bf16_ms" in row else "-",
                f"{row['ms'] / row['bf16_ms']:.2f}" if "bf16_ms" in row else "-",
            ]
            for row in rows
        ],
    )
    console.say("next: halfbyte doctor")
    return {
        "path": cpu.path_in_use(),
        "threads": torch.get_num_threads(),
        "limits": limits,
        "operations": rows,
    }


def _limits() -> dict[str, float]:
    import torch

    from ..ops import cpu

    source = torch.ones(ROWS * COLUMNS * 4, dtype=torch.bfloat16)
    target = torch.zeros_like(source)
    found = {"copy_bytes": 2 * source.nbytes / _median(lambda: target.copy_(source), 9)}
    if cpu.active() is not None:
        found["bf16_flops"] = cpu.product_peak(torch.bfloat16)
        found["fp32_flops"] = cpu.product_peak(torch.float32)
    return found


def _measured(limits: dict[str, float], rows: list[dict[str, Any]]) -> Iterator[str]:
    """Fills ``rows``; yields the name of each operation when it is done."""
    import torch

    from .. import ops
    from ..engine.adamw8bit import AdamW8bit
    from ..quantization.tensor import quantize

    generator = torch.Generator().manual_seed(0)
    w = (torch.randn(ROWS, COLUMNS, generator=generator) * 0.02).bfloat16()
    q = quantize(w)
    out = torch.empty(w.numel(), dtype=w.dtype)
    flops_rate = limits.get("bf16_flops", float("inf"))

    def add(
        name: str,
        call: Callable[[], object],
        size: float,
        flops: float = 0,
        plain: Callable | None = None,
    ) -> str:
        times = _alternate([call, *([plain] if plain else [])])
        limit = max(size / limits["copy_bytes"], flops / flops_rate)
        row = {"operation": name, "ms": times[0] * 1e3, "limit_ms": limit * 1e3}
        rows.append(row | ({"bf16_ms": times[1] * 1e3} if plain else {}))
        return name

    yield add("quantize", lambda: quantize(w), w.nbytes + q.stored_bytes)
    dequantize: Callable[[], object] = lambda: ops.dequantize_4bit(q.parts, w.numel(), w.dtype, out)  # noqa: E731
    yield add("dequantize", dequantize, w.nbytes + q.stored_bytes)
    for tokens in TOKENS:
        x, dy = (torch.randn(tokens, n, generator=generator).bfloat16() for n in (COLUMNS, ROWS))
        size, flops = q.stored_bytes + x.nbytes + dy.nbytes, 2.0 * tokens * w.numel()
        many = f"{tokens} token{'s' if tokens > 1 else ''}"
        yield add(
            f"linear, {many}",
            lambda x=x: ops.linear_4bit(x, q.parts, ROWS),
            size,
            flops,
            lambda x=x: torch.nn.functional.linear(x, w),
        )
        yield add(
            f"input gradient, {many}",
            lambda dy=dy: ops.linear_4bit_input_grad(dy, q.parts, COLUMNS),
            size,
            flops,
            lambda dy=dy: dy @ w,
        )
    p = torch.nn.Parameter(torch.randn(PARAMETERS, generator=generator))
    p.grad = torch.randn(PARAMETERS, generator=generator)
    # parameter read and written, gradient read, two codes read and written
    yield add(
        f"8-bit AdamW, {PARAMETERS / 1e6:.1f} M",
        AdamW8bit([p], lr=1e-6).step,
        PARAMETERS * (8 + 4 + 4),
    )


def _median(call: Callable[[], object], turns: int) -> float:
    return _alternate([call], turns)[0]


def _alternate(calls: list[Callable[[], object]], turns: int = 15) -> list[float]:
    """Median seconds of each, taking turns."""
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(turns + 1):
        for call, kept in zip(calls, times, strict=True):
            began = time.perf_counter()
            call()
            if turn:
                kept.append(time.perf_counter() - began)
    return [statistics.median(t) for t in times]


command = Verb("bench", BenchConfig, bench)

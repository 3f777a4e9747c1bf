"""What a GPU does: kernels checked and timed, training steps, 70B on one card, planned against
measured. One call.

    python bench/gpu.py [--only limits|check|kernels|optimizer|steps|70b|context] [--json]
    [--minutes 9] [--rehearse]

Correctness comes first, on the card itself and in bf16: every operation beside its plain-PyTorch
meaning. Then what the card can do (a copy, a matrix product, host to device), and what is ours and
bitsandbytes' (where it is installed) in turns, medians. Models are of the true geometry with random
packed weights. What does not fit in the minutes is left out and said. ``--rehearse`` runs every
line on this machine's CPU, tiny: it proves the script, and measures nothing.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plans
import torch
from torch import Tensor

GIB = 2**30
GEOMETRY = {
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 32000),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256),
    "tiny": (64, 128, 2, 4, 2, 512),
}
"""Width, width of the MLP, layers, heads, key-value heads, vocabulary."""
SECTIONS = ("limits", "check", "kernels", "optimizer", "steps", "70b", "context")
SLEEP_CYCLES, CYCLES_PER_SECOND = 1_000_000, 2_000_000_000
"""About half a millisecond of a GPU's clock, and about its rate."""
_tiny = False


def device() -> torch.device:
    return torch.device("cpu" if _tiny or not torch.cuda.is_available() else "cuda")


def wait() -> None:
    if not _tiny:
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Median of the times of one call, by the device's own clock.

    The device is kept busy until the call is launched, so what the host takes for that is not
    measured (but where the call itself waits for the device).
    """
    repeats = 2 if _tiny else repeats
    work()
    wait()
    began = time.perf_counter()
    work()
    host = time.perf_counter() - began
    wait()
    times = []
    for _ in range(repeats):
        if _tiny:
            began = time.perf_counter()
            work()
            times.append(1e3 * (time.perf_counter() - began))
        else:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(SLEEP_CYCLES + int(3 * host * CYCLES_PER_SECOND))
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def in_turns(works: dict[str, Callable[[], object]], rounds: int = 3) -> dict[str, float]:
    """Medians of several works, one after the other, again and again."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(1 if _tiny else rounds):
        for name, work in works.items():
            found[name].append(milliseconds(work, 10))
    return {name: statistics.median(times) for name, times in found.items()}


def bitsandbytes() -> Any:
    """The package, None where it is not there (or not for this device)."""
    try:
        import bitsandbytes as found
    except ImportError:
        return None
    return found


# --- the card -------------------------------------------------------------------------------------


def limits() -> dict[str, float]:
    """Rates to measure against: copy (read and written), bf16 product, pinned host memory to
    device."""
    n = 1 << (16 if _tiny else 30)
    source = torch.randint(0, 255, (n,), dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    side = 64 if _tiny else 8192
    a, b = (torch.randn(side, side, dtype=torch.bfloat16, device=device()) for _ in range(2))
    product = milliseconds(lambda: a @ b)
    host = torch.empty(n // 4, dtype=torch.uint8, pin_memory=not _tiny)
    up = milliseconds(lambda: target[: n // 4].copy_(host, non_blocking=True))
    down = milliseconds(lambda: host.copy_(target[: n // 4], non_blocking=True))
    return {
        "copy_gb_per_s": 2 * n / copy / 1e6,
        "bf16_tflop_per_s": 2 * side**3 / product / 1e9,
        "host_to_device_gb_per_s": n / 4 / up / 1e6,
        "device_to_host_gb_per_s": n / 4 / down / 1e6,
    }


# --- correctness ----------------------------------------------------------------------------------


def check() -> dict[str, Any]:
    """Every operation on its small case; 4-bit codes and 8-bit AdamW bit for bit on large ones;
    past 2^31 elements."""
    from halfbyte.ops import fourbit, gpu
    from halfbyte.quantization.tensor import _level_table, _scale_table, quantize

    found: dict[str, Any] = {}
    for name in gpu.REGISTERED:
        if _tiny and name in ("attention", "attention_grad"):  # PyTorch's own, on GPUs only
            continue
        found[name] = gpu.tried(name, device()) or "agrees"
    generator = torch.Generator(device()).manual_seed(0)
    narrow = torch.float16 if _tiny else torch.bfloat16
    for shape in [(64, 48)] if _tiny else [(4096, 11008), (3, 1000, 777), (1, 12345677)]:
        weight = torch.randn(shape, generator=generator, device=device()).to(narrow)
        stored, levels = quantize(weight), _level_table("nf4", device())
        packed, absmax = fourbit._quantize(weight, levels, 64)
        codes, nested, _ = fourbit._quantize_absmax(absmax, _scale_table(device()), 256)
        assert stored.nested_absmax is not None
        same = torch.equal(stored.packed, packed) and torch.equal(stored.absmax, codes)
        same = same and torch.equal(stored.nested_absmax, nested)
        plain = torch.empty(weight.numel(), dtype=narrow, device=device())
        fourbit._dequantize(*stored.parts, plain)
        same = same and torch.equal(stored.dequantize().view(-1), plain)
        on_cpu = quantize(weight.cpu())
        for mine, theirs in zip(stored.stored_tensors(), on_cpu.stored_tensors(), strict=True):
            same = same and torch.equal(mine.cpu(), theirs)
        found[f"4 bits of {list(shape)}"] = (
            "the same bits as plain PyTorch and the CPU" if same else "DIFFERS"
        )
        del weight, stored, plain
    found |= large()
    if not _tiny and torch.cuda.mem_get_info()[0] > 16 * GIB:
        many = 2**31 + 4096
        row = torch.randn(4096, generator=generator, device=device()).to(narrow)
        weight = row.repeat(many // 4096)
        stored = quantize(weight)
        last = stored.dequantize()[-4096:]
        found["beyond 2^31 elements"] = (
            "right"
            if torch.equal(last, quantize(row).dequantize())
            else ("near" if float((last - row).norm() / row.norm()) < 0.12 else "WRONG")
        )
        del weight, stored, last
    return found


def large() -> dict[str, str]:
    """Operations beside their meaning at the sizes of models."""
    from halfbyte import ops
    from halfbyte.ops import dropout, fourbit, gpu, gpu_calls, passes
    from halfbyte.ops.attention import _attention, _attention_grad
    from halfbyte.quantization.tensor import quantize

    narrow, here = torch.float16 if _tiny else torch.bfloat16, device()
    width, vocabulary, tokens = (64, 500, 40) if _tiny else (8192, 128256, 3000)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=here).to(narrow)

    weight = quantize(random(width // 2, width)).parts
    few, x, w, logits = (
        random(4, width),
        random(tokens, width),
        random(width),
        random(40, vocabulary),
    )
    labels, numbers = torch.arange(40, device=here) * 7, list(ops.Dropout(3277, 42, 1, 2, 3))
    pairs: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = {
        "matvec": (
            fourbit._linear,
            fourbit.linear_by_triton,
            (few, *weight, width // 2, None, None, None),
        ),
        "rms_norm": (passes._rms_norm, gpu_calls.rms_norm, (x, w, 1e-6, 0.0, True)),
        "cross_entropy": (
            passes._cross_entropy,
            gpu_calls.cross_entropy,
            (logits, labels, torch.empty_like(logits)),
        ),
        "drop": (dropout._drop, gpu_calls.drop, (x, numbers)),
    }
    if not _tiny:
        q, k, v = random(tokens, 32, 128), random(tokens, 8, 128), random(tokens, 8, 128)
        rows = torch.tensor([0, 1, 1500, tokens], dtype=torch.int32)
        params = (128**-0.5, 0, 0.0)
        results = _attention(q, k, v, rows, *params)
        pairs["attention"] = (_attention, gpu_calls.attention, (q, k, v, rows, *params))
        given = (random(*q.shape), q, k, v, rows, *results, *params)
        pairs["attention_grad"] = (_attention_grad, gpu_calls.attention_grad, given)
    return {
        f"{name}, large": gpu.disagreement(reference, ours, lambda device, given=given: given, here)
        or "agrees"
        for name, (reference, ours, given) in pairs.items()
    }


# --- kernels --------------------------------------------------------------------------------------


def kernels(ceilings: dict[str, float]) -> dict[str, Any]:
    """Dequantize and quantize by shape, matvec by tokens, beside bitsandbytes and a copy."""
    from halfbyte.quantization.tensor import quantize

    bnb, found = bitsandbytes(), {}
    for shape in [(64, 128)] if _tiny else [(4096, 4096), (14336, 4096), (28672, 8192)]:
        weight = (torch.randn(shape, device=device()) * 0.02).to(
            torch.bfloat16 if not _tiny else torch.float32
        )
        n = weight.numel()
        # as many of each as the second-level cache does not hold, in turns
        several = range(max(1, -(-200_000_000 // (2 * n))) if not _tiny else 2)
        weights = [weight.clone() for _ in several]
        quantized = [quantize(w).parts for w in weights]
        outs = [torch.empty(n, dtype=weight.dtype, device=device()) for _ in several]
        next_one = itertools.cycle(several)

        def ours(quantized: Any = quantized, outs: Any = outs, next_one: Any = next_one) -> None:
            number = next(next_one)
            torch.ops.halfbyte.dequantize_4bit(*quantized[number], outs[number])

        def copied(weights: Any = weights, outs: Any = outs, next_one: Any = next_one) -> None:
            number = next(next_one)
            outs[number].copy_(weights[number].view(-1))

        works: dict[str, Callable[[], object]] = {"ours": ours, "copy": copied}
        if bnb is not None and not _tiny:
            theirs = [
                bnb.functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
                for w in weights
            ]

            def bitsandbytes_dequantizes(
                theirs: Any = theirs, outs: Any = outs, next_one: Any = next_one
            ) -> None:
                number = next(next_one)
                codes, state = theirs[number]
                bnb.functional.dequantize_4bit(codes, state, out=outs[number].view(state.shape))

            works["bitsandbytes"] = bitsandbytes_dequantizes
        times = in_turns(works)
        row: dict[str, float] = {f"{who}_ms": value for who, value in times.items()}
        row["bandwidth_of_copy"] = 2.516 * n / times["ours"] / 1e6 / ceilings["copy_gb_per_s"]
        if "bitsandbytes" in times:
            row["times_bitsandbytes"] = times["bitsandbytes"] / times["ours"]
        row["quantize_ms"] = milliseconds(lambda weight=weight: quantize(weight), 5)
        for tokens in (1, 4, 8, 16, 64):
            x = torch.randn(tokens, shape[1], device=device()).to(weight.dtype)

            def in_4_bits(
                x: Tensor = x,
                quantized: Any = quantized,
                rows: int = shape[0],
                turn: Any = next_one,
            ) -> None:
                torch.ops.halfbyte.linear_4bit(x, *quantized[next(turn)], rows, None, None, None)

            def unquantized(x: Any = x, weights: Any = weights, turn: Any = next_one) -> None:
                torch.matmul(x, weights[next(turn)].t())

            both = in_turns({"ours": in_4_bits, "unquantized": unquantized}, rounds=1)
            row[f"linear_{tokens}_tokens_of_unquantized"] = both["ours"] / both["unquantized"]
        found["x".join(map(str, shape))] = row
    return found


# --- optimizer ------------------------------------------------------------------------------------


def optimizer() -> dict[str, Any]:
    """8-bit AdamW over the adapter of a 70B (1,120 tensors, 207 M parameters), resident and from
    the host."""
    import halfbyte

    width, mlp, layers, _, _, _ = GEOMETRY["tiny" if _tiny else "llama-2-70b"]
    kv = width // 8
    shapes = [
        (width, width),
        (width, kv),
        (width, kv),
        (width, width),
        (width, mlp),
        (width, mlp),
        (mlp, width),
    ]
    sizes = [size for inner, outer in shapes for size in ((16, inner), (outer, 16))] * layers

    def tensors() -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.randn(size, device=device()) * 0.01) for size in sizes]
        for p in made:
            p.grad = torch.randn_like(p) * 1e-3
        return made

    count = sum(a * b for a, b in sizes)
    found: dict[str, Any] = {"parameters": count, "tensors": len(sizes)}
    makers: dict[str, Callable[[list], Any]] = {
        "resident": lambda params: halfbyte.AdamW8bit(params, lr=1e-4),
        "from_host": lambda params: halfbyte.PagedAdamW8bit(params, lr=1e-4),
    }
    if (bnb := bitsandbytes()) is not None and not _tiny:
        makers["bitsandbytes"] = lambda params: bnb.optim.AdamW8bit(params, lr=1e-4)
    for who, make in makers.items():
        made = make(tensors())
        found[f"{who}_ms"] = milliseconds(made.step, 10)
        del made
        empty()
    if "bitsandbytes_ms" in found:
        found["times_bitsandbytes"] = found["bitsandbytes_ms"] / found["resident_ms"]
    return found


def empty() -> None:
    from halfbyte.memory.process import return_freed

    gc.collect()
    return_freed()


# --- training steps -------------------------------------------------------------------------------


def configuration(name: str) -> Any:
    config = plans.shape("Llama", *GEOMETRY["tiny" if _tiny else name])
    config.use_cache = False
    return config


def random_model(name: str, options: Any) -> Any:
    """A frozen model of the true geometry on the device, 4-bit weights random bytes, in seconds."""
    from halfbyte.quantization.load import empty_base

    return filled(empty_base(configuration(name), options, torch.bfloat16))


def filled(model: Any) -> Any:
    """An empty model with random weights, in place, on the device."""
    generator = torch.Generator(device()).manual_seed(0)
    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                module._parameters[key] = torch.nn.Parameter(
                    _random(p, generator), requires_grad=False
                )
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device())
    return model


def _random(p: Tensor, generator: torch.Generator) -> Tensor:
    from halfbyte.quantization.tensor import NF4Tensor, _level_table, _scale_table

    if not isinstance(p, NF4Tensor):
        if p.dim() == 1:
            return torch.ones(p.shape, dtype=p.dtype, device=device())
        return torch.empty(p.shape, dtype=p.dtype, device=device()).normal_(
            0, 0.02, generator=generator
        )
    parts: dict[str, Any] = p.parts._asdict()
    for name in ("packed", "absmax"):
        size = parts[name].shape
        parts[name] = torch.randint(
            0, 256, size, dtype=torch.uint8, device=device(), generator=generator
        )
    parts["nested_absmax"] = torch.full_like(parts["nested_absmax"], 0.01, device=device())
    parts["nested_offset"] = torch.full((), 0.05, device=device())
    parts["quant_map"] = _level_table(p.quant_type, device())
    parts["nested_quant_map"] = _scale_table(device())
    return NF4Tensor(type(p.parts)(**parts), p.shape, p.dtype, p.quant_type)


def options_for(tokens: int, **more: Any) -> Any:
    from halfbyte.config.options import TrainConfig

    given = {
        "model": "random",
        "data": "none",
        "dtype": "bfloat16",
        "max_length": tokens,
        "gradient_accumulation_steps": 1,
        "kept_activations": "none",
        "lora_dropout": 0.05,
        "output_dir": "gpu-bench",
        "device": device().type,
    }
    return TrainConfig(**{**given, **more})


def training(name: str, tokens: int, steps: int = 4, rows: int = 1, **more: Any) -> dict[str, Any]:
    """Seconds and peak of a step, and what was planned; the tokens are those of so many rows."""
    from halfbyte.data.batches import collate
    from halfbyte.data.encoder import TokenizedExample
    from halfbyte.engine.learner import Learner
    from halfbyte.engine.selftest import Abilities, self_test
    from halfbyte.model import attention
    from halfbyte.model.fusion import fuse
    from halfbyte.planning.dry_run import plan_memory
    from halfbyte.planning.workload import work_of

    tokens = 32 if _tiny else tokens
    options = options_for(tokens, **more)
    planned = plan_memory(
        configuration(name),
        options,
        work_of(options, None),
        device=device().type,
        dtype=torch.bfloat16,
    )
    empty()
    if not _tiny:
        torch.cuda.reset_peak_memory_stats()
    model = random_model(name, options)
    fused = fuse(model).line()
    # random weights of 80 layers may round apart further than real ones: said, and no more
    tested = self_test(model)
    notes: list[str] = []
    learner = Learner(
        model, options, Abilities(True, True, 0.0, 0.0), lambda what, line: notes.append(line)
    )
    empty()
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.vocab_size
    seconds, losses = [], []
    with attention.packed(model):
        for step in range(2 if _tiny else steps):
            ids = torch.randint(4, vocabulary, (rows, tokens // rows), generator=generator).tolist()
            batch = collate(
                [TokenizedExample("bench", row, [True] * len(row)) for row in ids], range(rows)
            )
            if step == 1 and not _tiny:
                torch.cuda.reset_peak_memory_stats()
            wait()
            began = time.perf_counter()
            losses.append(
                float(sum(learner.accumulate(batch, batch.supervised, step, 0)) / batch.supervised)
            )
            learner.clip()
            learner.update(1e-4)
            learner.forget()
            wait()
            seconds.append(time.perf_counter() - began)
    each = statistics.median(seconds[1:])
    found: dict[str, Any] = {
        "step_s": each,
        "tokens_per_s": tokens / each,
        "losses": losses,
        "fused": fused,
    }
    found |= {
        "packing_error": tested.packing_error,
        "head_error": tested.head_error,
        "kernels": kernels_in_use(),
    }
    found["notes"] = notes
    outside = planned.bytes_of("GPU context") if planned.device == "cuda" else 0
    found["planned_gb"] = (planned.phases["step"] - outside) / 1e9
    if not _tiny:
        found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        found["allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["planned_over_reserved"] = found["planned_gb"] / found["reserved_gb"]
    del model, learner
    empty()
    return found


def peer(name: str, tokens: int, optimized: bool = False) -> dict[str, Any]:
    """The same step by bitsandbytes and PEFT: the article's recipe with checkpointing, weights
    random, too; or by the same script after `halfbyte.optimize`."""
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.integrations import replace_with_bnb_linear

    bnb = bitsandbytes()
    torch.manual_seed(0)
    config = configuration(name)
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = replace_with_bnb_linear(
            model, modules_to_not_convert=["lm_head"], quantization_config=settings
        )
    for module in model.modules():
        for key, p in list(module._parameters.items()):
            if p is None:
                continue
            shape = (
                (module.out_features, module.in_features)
                if isinstance(module, bnb.nn.Linear4bit)
                else p.shape
            )
            values = torch.randn(shape, device=device(), dtype=torch.bfloat16) * 0.02
            if isinstance(module, bnb.nn.Linear4bit) and key == "weight":
                module.weight = bnb.nn.Params4bit(
                    values.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True
                ).to(device())
            else:
                module._parameters[key] = torch.nn.Parameter(values, requires_grad=False)
        for key, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[key] = type(module)(config)._buffers[key].to(device())
    model.is_loaded_in_4bit = True
    model = peft.prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    lora = peft.LoraConfig(
        r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, lora).train()
    said: list[str] = []
    if optimized:
        import halfbyte

        halfbyte.optimize(model, kept_activations="none", say=said.append)
    optimizer = bnb.optim.PagedAdamW8bit(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4
    )
    empty()
    torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(4):
        ids = torch.randint(4, config.vocab_size, (1, tokens), device=device())
        wait()
        began = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        wait()
        seconds.append(time.perf_counter() - began)
    each = statistics.median(seconds[1:])
    found = {
        "step_s": each,
        "tokens_per_s": tokens / each,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9,
        "losses": losses,
        "said": said,
    }
    del model, optimizer
    empty()
    return found


def steps(left: Callable[[], float]) -> dict[str, Any]:
    """Llama-3-8B: ours in 4 bits, ours in bf16, bitsandbytes + PEFT."""
    found: dict[str, Any] = {}
    for tokens in (1024, 4096, 8192):
        if left() < 120:
            found[f"{tokens}"] = "left out: no time"
            continue
        four = attempt(lambda tokens=tokens: training("llama-3-8b", tokens))
        bf16 = attempt(lambda tokens=tokens: training("llama-3-8b", tokens, load_in_4bit=False))
        row: dict[str, Any] = {"halfbyte": four, "halfbyte_bf16_lora": bf16}
        found[f"{tokens}"] = row
        if "step_s" not in four or "step_s" not in bf16:
            show(row)
            continue
        row["over_bf16_lora"] = four["step_s"] / bf16["step_s"]
        variants: dict[str, dict[str, Any]] = {
            "kept_all": {"kept_activations": "all"},
            "in_16_rows": {"rows": 16},
        }
        if not _tiny:  # a CPU has no use for these
            variants |= {stay: {"dequantized_weights": stay} for stay in ("ahead", "layer")}
        for variant, more in variants.items():
            row[f"halfbyte_{variant}"] = found_here = attempt(
                lambda tokens=tokens, more=more: training("llama-3-8b", tokens, **more)
            )
            if "step_s" in found_here:
                row[f"{variant}_over_halfbyte"] = found_here["step_s"] / four["step_s"]
                # bits may differ: flash attention's gradients add in no fixed order
                if "rows" not in more:
                    pairs = zip(found_here["losses"], four["losses"], strict=True)
                    row[f"{variant}_losses_differ"] = max(abs(a / b - 1) for a, b in pairs)
        if tokens == 4096 and bitsandbytes() is not None and not _tiny:
            row["bitsandbytes_peft"] = attempt(lambda tokens=tokens: peer("llama-3-8b", tokens))
            row["bitsandbytes_peft_optimized"] = attempt(
                lambda tokens=tokens: peer("llama-3-8b", tokens, True)
            )
            if "step_s" in row["bitsandbytes_peft"]:
                row["times_bitsandbytes_peft"] = row["bitsandbytes_peft"]["step_s"] / four["step_s"]
                row["memory_of_bitsandbytes_peft"] = (
                    four["reserved_gb"] / row["bitsandbytes_peft"]["reserved_gb"]
                )
        show(row)
    return found


def show(row: Any) -> None:
    """What is found is shown at once: a call that is cut off has said what it knew."""
    print(json.dumps(row), file=sys.stderr, flush=True)


def kernels_in_use() -> str:
    """What computes on this device by now, and the reason."""
    from halfbyte.ops import cpu, gpu

    return cpu.why() if _tiny else gpu.why()


def seventy(left: Callable[[], float]) -> dict[str, Any]:
    """Llama-2-70B, batch 1: peak and speed by length, all on the card and with what need not be
    there on the host."""
    found: dict[str, Any] = {}
    host = {"activation_offloading": "always", "paging": "always", "embedding_offloading": "always"}
    for where, more in (("card", {}), ("host", {} if _tiny else host)):
        # the longest first: pinned memory that is made once serves the others
        for tokens in (8192, 4096, 2048, 512):
            if left() < 60:
                found[f"{tokens}_{where}"] = "left out: no time"
                continue
            options: dict[str, Any] = {**more}
            found[f"{tokens}_{where}"] = attempt(
                lambda tokens=tokens, options=options: training(
                    "llama-2-70b", tokens, steps=3, **options
                )
            )
            show({f"{tokens}_{where}": found[f"{tokens}_{where}"]})
    return found


def context(left: Callable[[], float]) -> dict[str, Any]:
    """Llama-3-70B, r=32: the longest row in 48 GiB, of which what is outside of PyTorch is left
    out."""
    found: dict[str, Any] = {}
    if not _tiny:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (48 * GIB - 0.7e9) / total))
    for tokens in (36864, 45056, 24576):
        if left() < 150:
            found[f"{tokens}"] = "left out: no time"
            continue
        more = {
            "lora_r": 32,
            "activation_offloading": "always",
            "paging": "always",
            "tokens_per_tile": 4096,
        }
        more |= {} if _tiny else {"embedding_offloading": "always"}
        found[f"{tokens}"] = attempt(
            lambda tokens=tokens, more=more: training("llama-3-70b", tokens, 2, **more)
        )
    return found


def attempt(work: Callable[[], Any]) -> Any:
    """A result, or why there is none."""
    try:
        return work()
    except Exception as error:  # a card that is too small is a result
        message = (
            f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        )
        where = traceback.extract_tb(error.__traceback__)[-1]
        traceback.clear_frames(error.__traceback__)
        del error
        empty()
        return {"failed": message, "at": f"{Path(where.filename).name}:{where.lineno}"}


def main() -> None:
    global _tiny
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--minutes", type=float, default=9.0, help="what takes longer is left out")
    parser.add_argument("--rehearse", action="store_true", help="every line on the CPU, tiny")
    arguments = parser.parse_args()
    _tiny = arguments.rehearse
    if not _tiny and not torch.cuda.is_available():
        raise SystemExit("there is no GPU; --rehearse runs the script without one")
    began = time.perf_counter()

    def left() -> float:
        return 1e9 if _tiny else 60 * arguments.minutes - (time.perf_counter() - began)

    report: dict[str, Any] = {"machine": machine()}
    ceilings = report["limits"] = limits()
    sections: dict[str, Callable[[], Any]] = {
        "check": check,
        "kernels": lambda: kernels(ceilings),
        "optimizer": optimizer,
        "steps": lambda: steps(left),
        "70b": lambda: seventy(left),
        "context": lambda: context(left),
    }
    for name, section in sections.items():
        if arguments.only in (None, name):
            report[name] = section() if _tiny else attempt(section)
            show(
                {
                    "section": name,
                    "seconds": round(time.perf_counter() - began),
                    "found": report[name],
                }
            )
    if arguments.json:
        print(json.dumps(report))


def machine() -> dict[str, Any]:
    import subprocess

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    names = {"torch": torch.__version__, "commit": commit}
    if _tiny:
        return {**names, "card": "none: a rehearsal"}
    card = torch.cuda.get_device_properties(0)
    from halfbyte.ops import gpu

    return {
        **names,
        "card": card.name,
        "memory_gib": card.total_memory / GIB,
        "kernels": gpu.try_all(),
    }


if __name__ == "__main__":
    main()

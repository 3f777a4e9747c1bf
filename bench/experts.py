"""A layer's experts in 4 bits beside transformers' own in 16, forward and backward, in turns.

    python bench/experts.py [--tokens 512] [--rounds 5] [--experts 128] [--width 2048] [--inner 768]
        [--chosen 8]
    python bench/experts.py --step [--tokens 512] [--layers 48]

The sizes are Qwen3-30B-A3B's. ``grouped_mm`` is transformers' way for frozen bf16 experts;
``eager`` its loop over experts. Gradients are those of the layer's input.

``--step``: optimizer steps of the whole geometry with random weights, LoRA on the attention, beside
what was planned for them.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from cpu import PeakAnonymous, anonymous_bytes, machine


def block(given: argparse.Namespace, divided: bool) -> Any:
    """A mixture's block with random weights, in 16 bits, or in 4 as halfbyte holds it."""
    from transformers import AutoConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    from halfbyte.model.experts import divide_experts
    from halfbyte.model.fusion import fuse
    from halfbyte.nf4 import quantize

    config: Any = AutoConfig.for_model(
        "qwen3_moe",
        hidden_size=given.width,
        moe_intermediate_size=given.inner,
        num_experts=given.experts,
        num_experts_per_tok=given.chosen,
        norm_topk_prob=True,
        dtype="bfloat16",
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    with torch.device("meta"):
        made: Any = Qwen3MoeSparseMoeBlock(config)
    made.gate.weight = torch.nn.Parameter(
        (torch.randn(given.experts, given.width) * 0.05).bfloat16(), requires_grad=False
    )
    if not divided:
        for name in ("gate_up_proj", "down_proj"):
            shape = getattr(made.experts, name).shape
            values = torch.empty(shape, dtype=torch.bfloat16).normal_(std=0.02)
            setattr(made.experts, name, torch.nn.Parameter(values, requires_grad=False))
        return made
    holder = torch.nn.Module()
    holder.mlp = made
    divide_experts(holder)
    for part in made.experts.modules():
        if isinstance(part, torch.nn.Linear):
            values = torch.empty(part.weight.shape, dtype=torch.bfloat16).normal_(std=0.02)
            part.weight = torch.nn.Parameter(quantize(values), requires_grad=False)
    fuse(holder)
    return made


def once(layer: Any, x: torch.Tensor) -> tuple[float, float]:
    """Seconds of a forward and a backward pass."""
    given = x.clone().requires_grad_()
    began = time.perf_counter()
    y = layer(given)
    between = time.perf_counter()
    y.backward(torch.ones_like(y))
    return between - began, time.perf_counter() - between


def steps(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak memory of two optimizer steps, and what was planned."""
    import gpu
    from transformers import AutoConfig

    from halfbyte.data.batches import collate
    from halfbyte.data.encoder import TokenizedExample
    from halfbyte.engine.learner import Learner
    from halfbyte.engine.selftest import Abilities, self_test
    from halfbyte.model import attention
    from halfbyte.model.fusion import fuse
    from halfbyte.planning.dry_run import plan_memory
    from halfbyte.planning.workload import work_of
    from halfbyte.quantization.load import empty_base

    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=151936,
        hidden_size=given.width,
        moe_intermediate_size=given.inner,
        num_hidden_layers=given.layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=given.experts,
        num_experts_per_tok=given.chosen,
        norm_topk_prob=True,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    config.use_cache = False
    options = gpu.options_for(given.tokens)
    began = time.perf_counter()
    before = anonymous_bytes()
    planned = plan_memory(
        config, options, work_of(options, None), runtime_bytes=before, dtype=torch.bfloat16
    )
    planning = time.perf_counter() - began
    gpu.empty()  # what planning leaves with the C library, as a training gives it back
    left = anonymous_bytes() - before
    with PeakAnonymous() as memory:
        model = gpu.filled(empty_base(config, options, torch.bfloat16))
        fused = fuse(model).line()
        tested = self_test(model)
        learner = Learner(model, options, Abilities(True, True, 0.0, 0.0), lambda what, line: None)
        seconds, peaks = [], []
        with attention.packed(model):
            for step in range(2):
                ids = torch.randint(4, 150000, (given.tokens,)).tolist()
                row = TokenizedExample("bench", ids, [True] * len(ids))
                batch = collate([row], [0])
                with PeakAnonymous() as steady:
                    at = anonymous_bytes()
                    began = time.perf_counter()
                    learner.accumulate(batch, batch.supervised, step, 0)
                    learner.clip()
                    learner.update(1e-4)
                    learner.forget()
                    seconds.append(time.perf_counter() - began)
                peaks.append(steady.mib + at / 2**20)
    return {
        "parameters": planned.parameters,
        "fused": fused,
        "packed rows keep apart": tested.packing,
        "planning_s": planning,
        "mib that planning left": left / 2**20,
        "planned_mib": planned.phases["step"] / 2**20,
        "peak_mib of each step": peaks,
        "peak_mib of all": memory.mib + before / 2**20,
        "seconds of each step": seconds,
        "tokens_per_s": given.tokens / seconds[-1],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--chosen", type=int, default=8)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--step", action="store_true")
    given = parser.parse_args()
    if given.step:
        print(json.dumps({"machine": machine(), "sizes": vars(given), **steps(given)}, indent=1))
        return
    whole, divided = block(given, False), block(given, True)
    x = torch.randn(1, given.tokens, given.width).bfloat16()
    seconds: dict[str, list[tuple[float, float]]] = {}
    for turn in range(given.rounds + 1):
        for name in ("halfbyte", "grouped_mm", "eager"):
            layer = divided if name == "halfbyte" else whole
            if layer is whole:
                whole.experts.config._experts_implementation = name
            found = once(layer, x)
            if turn:  # the first warms up
                seconds.setdefault(name, []).append(found)
    medians = {
        name: [statistics.median(each) for each in zip(*found, strict=True)]
        for name, found in seconds.items()
    }
    own = sum(medians["halfbyte"])
    print(
        json.dumps(
            {
                "machine": machine(),
                "sizes": vars(given),
                "seconds, forward and backward": medians,
                "times grouped_mm": own / sum(medians["grouped_mm"]),
                "times eager": own / sum(medians["eager"]),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()

"""A layer's experts in 4 bits beside transformers' own in 16, forward and backward, in turns.

    python bench/experts.py [--tokens 512] [--rounds 5] [--experts 128] [--width 2048] [--inner 768]
        [--chosen 8]

The sizes are Qwen3-30B-A3B's. ``grouped_mm`` is transformers' way for frozen bf16 experts;
``eager`` its loop over experts. Gradients are those of the layer's input.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from cpu import machine


def block(given: argparse.Namespace, divided: bool) -> Any:
    """A mixture's block with random weights, in 16 bits, or in 4 as halfbyte holds it."""
    from transformers import AutoConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    from halfbyte.model.experts import divide_experts
    from halfbyte.model.fusion import fuse
    from halfbyte.nf4 import quantize

    config = AutoConfig.for_model(
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--chosen", type=int, default=8)
    given = parser.parse_args()
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

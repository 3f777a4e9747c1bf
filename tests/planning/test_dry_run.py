"""Tests of `planning.dry_run`."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.config.options import TrainConfig
from halfbyte.engine.learner import Learner
from halfbyte.engine.selftest import Abilities
from halfbyte.files.model_config import read_config
from halfbyte.model import attention
from halfbyte.model.fusion import fuse
from halfbyte.ops import cpu
from halfbyte.planning.dry_run import outline, plan_memory
from halfbyte.planning.parts import on_device, sizes
from halfbyte.planning.tracker import MemoryTracker
from halfbyte.planning.workload import work_of
from halfbyte.quantization.load import load_base

from ..helpers import shared


def tiny(draw: random.Random) -> tuple[Any, dict[str, Any]]:
    """A random small geometry of a random family, and random options."""
    from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    family = draw.choice([LlamaConfig, Qwen2Config, Qwen3Config, MistralConfig, Gemma2Config])
    heads = draw.choice([2, 4])
    make: Any = family
    config = make(
        vocab_size=draw.choice([96, 515]),
        hidden_size=64 * draw.choice([1, 2, 3]),
        intermediate_size=32 * draw.randint(2, 9),
        num_hidden_layers=draw.randint(1, 4),
        num_attention_heads=heads,
        num_key_value_heads=draw.choice([1, heads]),
        head_dim=32,
        tie_word_embeddings=draw.choice([True, False]),
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    checkpointing = draw.random() < 0.7
    in_4bit = draw.random() < 0.8
    options = {
        "lora_r": draw.choice([4, 8, 24]),
        "lora_dropout": draw.choice([0.0, 0.1]),
        "load_in_4bit": in_4bit,
        "full": not in_4bit and draw.random() < 0.5,
        "bnb_4bit_use_double_quant": draw.choice([True, False]),
        "optim": draw.choice(["adamw_8bit", "adamw_torch"]) if in_4bit else "adamw_torch",
        "dtype": draw.choice(["float32", "bfloat16"]),
        "gradient_checkpointing": checkpointing,
        "kept_activations": draw.choice(["none", "attention", "mlp_in", "all"])
        if checkpointing
        else "none",
        "per_device_train_batch_size": draw.choice([1, 3]),
        "max_length": draw.choice([16, 40, 200]),
        "allow_low_coverage": True,
    }
    if not options["full"]:
        options["use_dora"] = draw.random() < 0.3
        options["modules_to_save"] = draw.choice(["", "", "norm", "lm_head,embed_tokens"])
    return config, options


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("seed", range(12))
def test_a_plan_counts_what_training_allocates(seed: int, kernels: str, tmp_path: Path):
    """Random geometries, written, loaded and trained for a step under the same count: static parts
    to the byte, and where our kernels compute the peak of all tensors within 2 % (bench/memory.py,
    larger models: to a few bytes)."""
    draw = random.Random(seed)
    model_config, options = tiny(draw)
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(model_config).save_pretrained(tmp_path)
    config = TrainConfig(model=str(tmp_path), data="none", **options)
    with cpu.using(kernels):
        work = work_of(config, None)
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
        plan = plan_memory(read_config(tmp_path), config, work, dtype=dtype)
        model, _ = load_base(tmp_path, config.model_copy(update={"kernels": kernels}))
        fuse(model)
        learner = Learner(model, config, Abilities(True, True, 0.0, 0.0), lambda what, line: None)
        parts = sizes(on_device(learner))
        with attention.packed(model):
            one_step(learner, work.batch)  # what lasts is there from the second step on
            with MemoryTracker(on_device(learner)) as count:
                count.restart()
                one_step(learner, work.batch)
    if config.optim == "adamw_torch":  # made in the first step
        parts = sizes(on_device(learner))
    assert parts == {part: plan.bytes_of(part) for part in parts}
    if kernels == "auto" and cpu.active() is not None:
        planned = plan.tensor_bytes - plan.bytes_of("kernel scratch")
        # ids and labels lie on the CPU in either; the few tensors that differ are smaller than a
        # layer's input
        assert abs(planned - count.peak) <= 0.02 * count.peak


def one_step(learner: Learner, batch: Any) -> None:
    learner.accumulate(batch, batch.supervised, 0, 0)
    learner.clip()
    learner.update(1e-4)
    learner.forget()


@pytest.mark.parametrize(
    ("model", "linear", "lora", "packed"),
    [
        ("llama-2-7b", 6_476_005_376, 39_976_960, 3.34),
        ("llama-2-13b", 12_687_769_600, 62_586_880, 6.55),
        ("llama-2-70b", 68_451_041_280, 207_093_760, 35.31),
        ("llama-3-8b", 6_979_321_856, 41_943_040, 3.60),
    ],
)
def test_counts_of_real_models(model: str, linear: int, lora: int, packed: float):
    plan = outline(read_config(shared(f"geometry/{model}")), 512)
    assert (plan.quantized_parameters, plan.lora_parameters) == (linear, lora)
    assert round(plan.bytes_of("4-bit codes", "scales") / 1e9, 2) == packed


@pytest.mark.parametrize(("model", "most"), [("llama-2-70b", 41.0), ("llama-3-70b", 44.0)])
def test_seventy_billion_parameters_on_one_card(model: str, most: float):
    plan = halfbyte.plan(
        model=str(shared(f"geometry/{model}")), device="cuda", max_length=512, dtype="bfloat16"
    )
    assert plan.peak_bytes <= most * 1e9
    assert plan.peak_bytes > 38e9, "and nothing was forgotten"

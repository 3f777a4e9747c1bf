"""What several test files share."""

import importlib
import json
import os
import random
import signal
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import halfbyte
from halfbyte.config.options import TrainConfig
from halfbyte.data.encoder import TokenizedExample
from halfbyte.engine.learner import Learner
from halfbyte.engine.selftest import Abilities
from halfbyte.files import hub
from halfbyte.model import attention
from halfbyte.model.fusion import fuse
from halfbyte.ops import cpu
from halfbyte.progress import Reporter
from halfbyte.quantization.load import load_base

SHARED = Path(__file__).resolve().parents[2] / "shared"
"""Real inputs, not part of this repository; tests that need them skip without them."""


def shared(path: str) -> Path:
    if not (SHARED / path).exists():
        pytest.skip(f"../shared/{path} is not here")
    return SHARED / path


def small_config(**changes: Any) -> LlamaConfig:
    """A Llama with grouped-query attention and biases, of next to no size."""
    sizes = {
        "vocab_size": 160,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "attention_bias": True,
    }
    return LlamaConfig(**{**sizes, **changes})


def perturb_zeros(model: nn.Module) -> None:
    """Random values where an adapter begins with zeros, and off ones where it begins with norms."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_magnitude" in name:
            p.data *= 1 + 0.1 * torch.randn_like(p)
        elif "lora_" in name:
            nn.init.normal_(p, std=0.1)
        elif p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)


ADAPTER_ROWS = [
    {"prompt": f"{word} is", "completion": f" a word of {len(word)} letters"}
    for word in "one three seven".split()
]


def train_adapter(stories: Path, home: Path, name: str, **options: Any) -> halfbyte.Run:
    data = home / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ADAPTER_ROWS))
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-2,
        "num_samples": 0,
        "lora_r": 4,
    }
    return halfbyte.train(
        str(stories), data, output_dir=str(home / name), **{**settings, **options}
    )


SIZES: dict[str, Any] = {
    "vocab_size": 3072,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
"""Of a small random model with the built-in tokenizer (`give_tokenizer`)."""


def give_tokenizer(path: Path) -> None:
    """Put the built-in tokenizer and chat template into a model's directory."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_bytes((hub.resolve("demo") / name).read_bytes())


def logits(model: Any) -> Tensor:
    """Of one row, [positions, vocabulary], without a cache."""
    with torch.no_grad():
        ids = torch.arange(40, 70)[None]
        return model.eval()(input_ids=ids, use_cache=False).logits[0]


Q, A = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}


needs_library = pytest.mark.skipif(not cpu.paths(), reason="no C++ library")


def norm(family: str, name: str, width: int = 48) -> nn.Module:
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    made = getattr(module, name)(width, eps=1e-5)
    nn.init.normal_(made.weight)
    return made


def front_matter(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    return yaml.safe_load(head)


FLOAT_TYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_weight(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    w = torch.randn(shape, generator=generator).to(dtype)
    w.view(-1)[::7] = 0
    return w


MIB = 1 << 20


def tiny_learner(config: LlamaConfig, path: Path, **options: Any) -> Learner:
    torch.manual_seed(0)
    if not (path / "config.json").exists():
        LlamaForCausalLM(config).save_pretrained(path)
    given: dict[str, Any] = {
        "dtype": "float32",
        "lora_dropout": 0.2,
        "lora_r": 4,
        "kept_activations": "none",
        **options,
    }
    train = TrainConfig(
        model=str(path), data="none", output_dir=str(path / "out"), allow_low_coverage=True, **given
    )
    model, _ = load_base(path, train)
    fuse(model)
    made = Learner(model, train, Abilities(True, True, 0.0, 0.0), lambda what, line: None)
    for p in made.trained:
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return made


def tiny_rows(*lengths: int) -> list[TokenizedExample]:
    draw = random.Random(0)
    return [
        TokenizedExample(
            str(i), [draw.randrange(3, 150) for _ in range(n)], [j > 1 for j in range(n)]
        )
        for i, n in enumerate(lengths)
    ]


def gradient(made: Learner, batch: Any) -> tuple[list[Tensor], float]:
    with attention.packed(made.model):
        losses = made.accumulate(batch, batch.supervised, 5, 1)
    found = [p.grad.clone() for p in made.trained if p.grad is not None]
    made.forget()
    return found, float(sum(losses))


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).requires_grad_()


class Reference(torch.autograd.Function):
    """An operation and its gradient, both by their plain-PyTorch meaning, as autograd would call
    them."""

    @staticmethod
    def forward(ctx, forward, backward, *inputs):
        results = forward(*inputs)
        results = results if isinstance(results, tuple) else (results,)
        ctx.save_for_backward(*inputs, *results)
        ctx.count, ctx.backward_of = len(inputs), backward
        return results[0]

    @staticmethod
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        found = ctx.backward_of(grads[0], saved[: ctx.count], saved[ctx.count :])
        return None, None, *found


GIB = 2**30


def geometry(path: Path, **changes: Any) -> Path:
    from transformers import LlamaConfig

    shape: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 6,
        "vocab_size": 4000,
    }
    LlamaConfig(
        **{**shape, "num_attention_heads": 4, "max_position_embeddings": 4096, **changes}
    ).save_pretrained(path)
    return path


def in_four_bits(checkpoint: Path, config: Any = halfbyte.BitsAndBytesConfig) -> Any:
    """A model as a script loads it, by the settings of this package or of bitsandbytes."""
    settings = config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=settings, dtype=torch.float32
    )


def limited_training(model: Path, rows: Path, out: Path, *more: str) -> list[str]:
    options = [
        "--max_steps",
        "3",
        "--gradient_accumulation_steps",
        "2",
        "--num_samples",
        "0",
        "--max_length",
        "2048",
    ]
    return [
        "train",
        str(model),
        "--data",
        str(rows),
        "--output_dir",
        str(out),
        "--dtype",
        "bfloat16",
        *options,
        *more,
    ]


def reliable_options(reliable_inputs: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(reliable_inputs / "base"),
        "data": str(reliable_inputs / "rows.jsonl"),
        "output_dir": str(out),
        "dtype": "float32",
        "max_length": 64,
        "packing": True,
        "lora_r": 32,
        "lora_dropout": 0.1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-2,
        "max_steps": 8,
        "save_steps": 2,
        "num_samples": 0,
        **changes,
    }


def stopped_after(step: int) -> Reporter:
    """A reporter that interrupts the training after a step."""

    def stop(row: dict[str, Any], total: int) -> None:
        if row["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return Reporter(on_step=stop)


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def plain_flash(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, left: int, right: int, scale: float
) -> tuple[Tensor, Tensor]:
    """What flash attention is said to do, score by score."""
    out, lse = [], []
    for a, b in pairwise(rows.tolist()):
        place = torch.arange(b - a)
        ahead = place[None] - place[:, None]
        seen = (ahead <= right) & ((-ahead <= left) | (left < 0))
        wide_k, wide_v = (t[a:b].repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        scores = (torch.einsum("qhd,khd->hqk", q[a:b], wide_k) * scale).masked_fill(
            ~seen, -torch.inf
        )
        lse.append(scores.logsumexp(2))
        out.append(torch.einsum("hqk,khd->qhd", scores.softmax(2), wide_v))
    return torch.cat(out), torch.cat(lse, 1)

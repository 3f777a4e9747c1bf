"""Shared inputs. Real ones live in ../shared (not part of this repository); tests that need them
skip without it."""

import os
from pathlib import Path
from typing import Any

if not Path(
    "/dev/nvidiactl"
).exists():  # before anything imports Triton, whose own functions are interpreted, too
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Quantized bases are kept for these tests alone."""
    os.environ["HALFBYTE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real trained Llama of 260k parameters."""
    return shared("models/stories260k")


@pytest.fixture(scope="session")
def alpaca() -> Path:
    return shared("data/rasbt-instruction/instruction-data.json")


@pytest.fixture(scope="session")
def oasst_es() -> Path:
    return shared("data/oasst1-chat/oasst1_val_es.jsonl")


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


@pytest.fixture
def tiny_config() -> LlamaConfig:
    return small_config()


@pytest.fixture
def tiny_llama(tiny_config: LlamaConfig) -> LlamaForCausalLM:
    """A random fp32 Llama with grouped-query attention and biases."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.08)
    return model.eval()

"""Recognizing a model's modules by their body, the numbers of the fused ones, and leaving the
others alone."""

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from halfbyte.model import fusion
from halfbyte.model.fusion import FusedMLP, FusedNorm
from halfbyte.model.recognize import _NORMS, _digest, normalized_source
from halfbyte.ops import cpu
from halfbyte.run.directory import EVALS
from halfbyte.training.trainer import train

from ..helpers import needs_library, norm


@needs_library
def test_a_trained_norm_gets_its_gradient():
    module = norm("llama", "LlamaRMSNorm")
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(1))

    def gradient() -> Tensor:
        module.weight.grad = None
        module(x).square().sum().backward()
        assert isinstance(module.weight.grad, Tensor)
        return module.weight.grad

    expected = gradient()
    fusion.fuse(nn.Sequential(module))
    assert isinstance(module, FusedNorm)
    torch.testing.assert_close(gradient(), expected)


@needs_library
def test_a_llama(tiny_llama: LlamaForCausalLM):
    ids = torch.arange(12)[None]
    before = tiny_llama(ids).logits
    found = fusion.fuse(tiny_llama)
    assert (found.norms, found.mlps, found.attentions, found.left) == (5, 2, 2, {})
    assert found.line() == "fused: 5 norms, 2 MLPs, 2 rotary embeddings"
    assert isinstance(tiny_llama.model.layers[0].mlp, FusedMLP)
    torch.testing.assert_close(tiny_llama(ids).logits, before, atol=1e-4, rtol=1e-4)
    # its class is still its own
    assert type(tiny_llama.model.norm).__name__ == "FusedLlamaRMSNorm"
    assert isinstance(
        tiny_llama.model.norm,
        importlib.import_module("transformers.models.llama.modeling_llama").LlamaRMSNorm,
    )
    assert fusion.fuse(tiny_llama).norms == 0  # twice is once


@needs_library
def test_one_product_for_both_halves():
    """Phi's and GLM's MLPs: the gate is the first half."""
    module = importlib.import_module("transformers.models.glm.modeling_glm")
    config = SimpleNamespace(hidden_size=32, intermediate_size=48, hidden_act="silu")
    mlp = module.GlmMLP(config)
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0))
    expected = mlp(x)
    assert fusion.fuse(nn.Sequential(mlp)).mlps == 1
    torch.testing.assert_close(mlp(x), expected)


class OddRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

    def forward(self, hidden_states):
        return (
            self.weight
            * hidden_states
            / (hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )


@needs_library
def test_an_unknown_form_is_left_alone():
    odd = OddRMSNorm()
    found = fusion.fuse(nn.Sequential(odd))
    assert found.norms == 0 and type(odd) is OddRMSNorm
    assert "OddRMSNorm (of a form not known here)" in found.line()


@needs_library
def test_a_kind_that_differs_is_left_alone(monkeypatch: pytest.MonkeyPatch):
    """A form recognized wrongly (Gemma's taken for one without the 1) must not pass the
    comparison."""
    text, _ = normalized_source(type(norm("gemma", "GemmaRMSNorm")).forward)
    helper, _ = normalized_source(type(norm("gemma", "GemmaRMSNorm"))._norm)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(_NORMS, _digest(f"{text}\n--\n{helper}"), (0.0, False))
    module = norm("gemma", "GemmaRMSNorm")
    own = type(module)
    found = fusion.fuse(nn.Sequential(module))
    assert found.norms == 0 and type(module) is own and not hasattr(module, "form")
    assert "its own results differ" in found.line()


def test_nothing_is_fused_without_the_library(tiny_llama: LlamaForCausalLM):
    with cpu.using("torch"):
        assert fusion.fuse(tiny_llama).line() == "fused: nothing"


@needs_library
@pytest.mark.slow
def test_two_hundred_steps_with_and_without(stories: Path, alpaca: Path, tmp_path: Path):
    """Loss curves of the fast path and of plain PyTorch differ by less than those of two seeds."""

    def curve(name: str, kernels: Literal["cpp", "torch"], seed: int) -> tuple[Tensor, float]:
        run = train(
            model=str(stories),
            data=str(alpaca),
            output_dir=str(tmp_path / name),
            max_steps=200,
            gradient_accumulation_steps=4,
            learning_rate=1e-3,
            lora_dropout=0.05,
            dtype="bfloat16",
            max_length=256,
            eval_split=0.1,
            num_samples=0,
            kernels=kernels,
            seed=seed,
        )
        losses = torch.tensor([row["loss"] for row in run.metrics()])
        assert len(losses) == 200
        return losses.view(10, 20).mean(1), run.read(EVALS)[-1]["loss"]

    fast, plain, other = (
        curve("fast", "cpp", 1),
        curve("plain", "torch", 1),
        curve("other", "cpp", 2),
    )
    print(
        "mean losses of 20 steps:",
        *(c[0].tolist() for c in (fast, plain, other)),
        "held out:",
        fast[1],
        plain[1],
        other[1],
    )
    assert float(fast[0][0]) - float(fast[0][-1]) > 0.3  # it learns
    assert float((fast[0] - plain[0]).abs().max()) < 0.5 * float((fast[0] - other[0]).abs().max())
    assert abs(fast[1] - plain[1]) < 0.01

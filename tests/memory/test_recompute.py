"""Layers that are run again: the same bits whatever is kept, and how often products are
computed."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from halfbyte.adapters import lora
from halfbyte.adapters.lora import AdapterConfig, attach_lora
from halfbyte.engine.selftest import checkpoint_layers
from halfbyte.memory import recompute
from halfbyte.memory.offload import OffloadPool
from halfbyte.memory.recompute import KEEPS, Recompute, recompute_layers
from halfbyte.model import attention
from halfbyte.ops import cpu


def adapted(model: Any) -> Any:
    attach_lora(model, AdapterConfig(4, 8, 0.1))
    model.config.dtype, model.config.use_cache = torch.float32, False
    for _, layer in lora.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.05, generator=torch.Generator().manual_seed(0))
    return model.train()


@pytest.fixture
def llama(tiny_config: LlamaConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return adapted(LlamaForCausalLM(tiny_config))


def gradients(model: Any) -> list[Tensor]:
    ids = torch.arange(20)[None] % 17
    cu_seqlens = torch.tensor([0, 8, 20], dtype=torch.int32)
    with attention.packed(model):
        hidden = model.base_model(input_ids=ids, cu_seq_lens_q=cu_seqlens).last_hidden_state
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    found = []
    for _, layer in lora.lora_layers(model):
        for p in (layer.lora_A, layer.lora_B):
            assert p.grad is not None
            found.append(p.grad)
            p.grad = None
    return [hidden.detach(), *found]


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Within this block products with weights and attention are counted."""
    counts = {"products": 0, "attention": 0}

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(lora, "_product", counting("products", lora._product))
        patch.setattr(attention.ops, "attention", counting("attention", attention.ops.attention))
        yield counts


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_the_same_bits_whatever_is_kept(llama: LlamaForCausalLM, kernels: str):
    with cpu.using(kernels):
        expected = gradients(llama)
        for keep in KEEPS:
            line, _ = checkpoint_layers(llama, keep, packing=True)
            assert (
                line == "recomputed in the backward pass: not the last product, kept activations: "
                f"{keep}"
            )
            found = gradients(llama)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), keep


# a layer here has 3 products before attention and 4 after it, the last of which is never computed
# twice
@pytest.mark.parametrize(
    ("keep", "products", "attentions"),
    [("none", 7 + 6, 2), ("attention", 7 + 3, 1), ("mlp_in", 7 + 2, 1), ("all", 7, 1)],
)
@pytest.mark.skipif(not cpu.paths(), reason="no C++ library")
def test_what_is_computed_twice(
    llama: LlamaForCausalLM,
    monkeypatch: pytest.MonkeyPatch,
    keep: Any,
    products: int,
    attentions: int,
):
    checkpoint_layers(llama, keep, packing=True)
    with counted(monkeypatch) as counts:
        gradients(llama)
    assert counts == {"products": 2 * products, "attention": 2 * attentions}


def test_a_last_product_that_matters_is_computed_again():
    """Gemma 2 normalizes what its MLP gives, so the gradient depends on it; skipping it must be
    found out."""
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=6,
    )
    model = adapted(Gemma2ForCausalLM(config))
    expected = gradients(model)
    assert (
        checkpoint_layers(model, "all", packing=True)[0]
        == "recomputed in the backward pass: kept activations: all"
    )
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), expected, strict=True))


def test_layers_that_cannot_be_run_again_are_pytorchs(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    """A recomputation that gives other gradients must not be used."""
    expected = gradients(llama)
    honest = recompute.ActivationTape.take
    monkeypatch.setattr(
        recompute.ActivationTape,
        "take",
        lambda self, compute, kind: honest(self, compute, kind) * (0.5 if self.replaying else 1),
    )
    assert "by PyTorch" in checkpoint_layers(llama, "none", packing=False)[0]
    monkeypatch.undo()
    assert all(torch.equal(a, b) for a, b in zip(gradients(llama), expected, strict=True))


def test_without_attention_only_all_keeps_products(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    """Where attention does not report (the model's own, unpacked), no product lies before it."""
    for keep, again in (("none", 6), ("attention", 6), ("mlp_in", 6), ("all", 0)):
        assert checkpoint_layers(llama, keep, packing=False)[0].endswith(keep)
        with counted(monkeypatch) as counts:
            llama.model(input_ids=torch.arange(9)[None]).last_hidden_state.square().sum().backward()
        assert counts["products"] == 2 * (7 + again), keep
        llama.zero_grad()


def test_every_differentiable_input_of_a_layer_has_its_gradient(
    llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
):
    """As in models that give every layer a trained embedding of its own; and layers that return
    tuples, as older families' do."""
    second = torch.full((1,), 2.0, requires_grad=True)
    third = torch.full((1,), 3.0, requires_grad=True)

    def layer(hidden: Tensor, other: Tensor, *, factor: Tensor) -> Any:
        return (hidden * other).sin() * factor, None, "attention"

    hidden = torch.linspace(0, 1, 4, requires_grad=True)
    found = []
    for run in (Recompute("none", 2).layer(0), lambda function, *given: function(*given)):
        out, nothing, word = run(functools.partial(layer, factor=third), hidden, second)
        assert nothing is None and word == "attention"
        (out * torch.arange(4)).sum().backward()
        found.append([t.grad for t in (hidden, second, third)])
        hidden.grad = second.grad = third.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return recompute.product(lambda: x * 2.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return 2.0 * grads[0]


def test_a_result_that_is_changed_in_place_is_computed_again():
    """What a caller adds to a product's result, in the layer or behind it, is not in what was
    kept."""

    def inside(hidden: Tensor) -> Tensor:
        result: Any = _Double.apply(hidden)
        with torch.no_grad():
            result.add_(1)
        return result.square()

    def behind(hidden: Tensor) -> Tensor:
        result: Any = _Double.apply(hidden)
        return _Double.apply(result.sin())  # pyright: ignore[reportReturnType]

    for function in (inside, behind):
        found = []
        for keep in ("all", "none"):
            hidden = torch.linspace(0, 1, 4, requires_grad=True)
            out = Recompute("none", 1).run(keep, function, hidden)
            with torch.no_grad():
                out.add_(5)
            out.sum().backward()
            assert hidden.grad is not None
            found.append(hidden.grad)
        assert torch.equal(*found)


def test_a_models_own_dropout_is_pytorchs_to_repeat(tiny_config: LlamaConfig):
    """Its masks are drawn anew in a replay unless the generator is wound back."""
    tiny_config.attention_dropout = 0.5
    torch.manual_seed(0)
    model = adapted(LlamaForCausalLM(tiny_config))

    def seeded() -> list[Tensor]:
        torch.manual_seed(5)
        return gradients(model)

    expected = seeded()
    assert "by PyTorch" in checkpoint_layers(model, "none", packing=True)[0]
    assert all(torch.equal(a, b) for a, b in zip(seeded(), expected, strict=True))


def test_the_test_leaves_no_trace(llama: LlamaForCausalLM):
    before = {name: p.detach().clone() for name, p in llama.named_parameters()}
    checkpoint_layers(llama, "all", packing=True)
    for name, p in llama.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None, name


def test_a_step_given_up_midway_leaves_room_for_the_next(llama: LlamaForCausalLM):
    """Inputs of layers whose backward pass never came are free again."""
    recompute_layers(llama, run := Recompute("none", 2))
    expected = gradients(llama)
    for _ in range(3):
        with attention.packed(llama):
            cu_seqlens = torch.tensor([0, 20], dtype=torch.int32)
            hidden = llama.model(
                input_ids=torch.arange(20)[None], cu_seq_lens_q=cu_seqlens
            ).last_hidden_state
        del hidden
    assert len(run.inputs.free) == 2
    assert all(torch.equal(a, b) for a, b in zip(gradients(llama), expected, strict=True))


def test_slots_grow_and_are_reused():
    pool = OffloadPool(2)
    a, b = pool.put(torch.ones(3)), pool.put(torch.full((2,), 2.0))
    assert a.take().tolist() == [1, 1, 1] and b.take().tolist() == [2, 2]
    extra = pool.put(torch.zeros(3))  # more than there is room for
    del b
    larger = pool.put(torch.zeros(2, 4))  # the room is made anew; what is in use stays what it is
    assert a.take().tolist() == [1, 1, 1] and larger.take().shape == (2, 4)
    del a, extra, larger
    assert len(pool.free) == 2
    place = pool.put(torch.zeros(8)).place.data_ptr()
    assert place in {t.data_ptr() for t in pool.free}

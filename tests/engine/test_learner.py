"""Tests of `engine.learner`."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, Trainer

from halfbyte.config.options import TrainConfig
from halfbyte.data.batches import collate
from halfbyte.data.encoder import TokenizedExample
from halfbyte.engine.learner import Learner, all_finite
from halfbyte.engine.selftest import Abilities
from halfbyte.memory.recompute import KEEPS
from halfbyte.model import attention
from halfbyte.model.fusion import tile_mlps
from halfbyte.ops import cpu

from ..helpers import gradient, tiny_learner, tiny_rows


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("keep", ["none", "all"])
@pytest.mark.parametrize("change", ["passes", "tiles", "both"])
def test_a_step_in_parts_has_the_gradients_of_the_whole(
    tiny_config: LlamaConfig, tmp_path: Path, change: str, keep: str, kernels: str
):
    """In fp32 with dropout: a sum of n terms in another order differs by at most n roundings of the
    terms' absolute sum (Higham 2002, 4.2), here 103 tokens' or 103 * 2^-24 of it. Held to that
    share of the sum itself, which is less; and to a hundredth of what a wrong mask would make."""
    batch = collate(tiny_rows(9, 30, 16, 41, 7), range(5))
    with cpu.using(kernels):
        made = tiny_learner(tiny_config, tmp_path, kernels=kernels, kept_activations=keep)
        expected, loss = gradient(made, batch)
        if change != "tiles":
            made.tokens_per_pass = 46
            assert [len(part.rows) for _, part in made.parts(batch)] == [2, 1, 1, 1]
        if change != "passes":
            tiled = made.tile(16)
            assert tiled == (cpu.active() is not None)
            if not tiled:
                pytest.skip("MLPs are fused, and tiled, by the library alone")
        found, again = gradient(made, batch)
        other, _ = gradient(tiny_learner(tiny_config, tmp_path, kernels=kernels, seed=1), batch)
    assert abs(again - loss) <= 1e-5 * abs(loss)
    for mine, theirs, wrong in zip(found, expected, other, strict=True):
        error = float((mine - theirs).norm() / theirs.norm())
        assert error <= 103 * 2.0**-24
        assert error <= 0.01 * float((wrong - theirs).norm() / theirs.norm())


@pytest.mark.skipif(not cpu.paths(), reason="MLPs are fused, and tiled, by the library alone")
@pytest.mark.parametrize("keep", KEEPS)
def test_tiles_cost_no_product(
    tiny_config: LlamaConfig, tmp_path: Path, keep: Any, monkeypatch: pytest.MonkeyPatch
):
    """A tiled MLP is run twice, forward and backward, as an untiled one; what it gives is not
    computed again."""
    from halfbyte.adapters import lora

    made, tokens = tiny_learner(tiny_config, tmp_path, kept_activations=keep), [0]
    product = lora._product

    def counting(x: Tensor, *rest: Any) -> Tensor:
        tokens[0] += x.shape[-2]
        return product(x, *rest)

    monkeypatch.setattr(lora, "_product", counting)
    batch = collate(tiny_rows(64), [0])
    tile_mlps(made.model, 16)
    gradient(made, batch)
    attends = 4 if KEEPS.index(keep) == 0 else 1 if keep == "attention" else 0
    assert tokens[0] == 64 * 2 * ((4 + 3) + attends + 3)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("layers", [-1, 0, 1, 2])
def test_gradients_are_the_same_bits_whatever_is_kept_where(
    tiny_config: LlamaConfig, tmp_path: Path, keep: Any, layers: int
):
    batch = collate(tiny_rows(9, 30), range(2))
    expected, _ = gradient(tiny_learner(tiny_config, tmp_path / "m"), batch)
    more: dict[str, Any] = {
        "kept_activations": keep,
        "kept_layers": layers,
        "activation_offloading": "always",
    }
    made = tiny_learner(tiny_config, tmp_path / "m", **more)
    for _ in range(2):
        found, _ = gradient(made, batch)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"paging": "always", "optim": "adamw_8bit"}, "paged optimizer|paged_adamw_8bit"),
        (
            {"activation_offloading": "always", "gradient_checkpointing": False},
            "gradient_checkpointing",
        ),
        ({"tokens_per_tile": 3}, "at least 16"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        TrainConfig(model="demo", data="none", **options)


def test_scaled_gradients_are_nearer_than_unscaled_ones(tiny_llama: Any):
    """Gradients so small that fp16 has no number for them, of a loss that is divided by many
    tokens."""
    from halfbyte.data.batches import collate

    found = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 1.0), (torch.float16, 65536.0)):
        model = copy.deepcopy(tiny_llama).to(dtype)
        model.config.dtype = dtype
        config = TrainConfig(
            model="m", data="d", load_in_4bit=False, lora_dropout=0.0, gradient_checkpointing=False
        )
        learner = Learner(model, config, Abilities(True, True, 0.0, 0.0), lambda what, line: None)
        learner.scale.value = scale
        batch = collate([TokenizedExample("row", list(range(20)), [True] * 20)], [0])
        with attention.packed(model):
            learner.accumulate(batch, 3_000_000, 0, 0)
        learner.config = config.model_copy(update={"max_grad_norm": 0.0})
        learner.clip()
        found.append(torch.cat([buffer.double() for buffer in learner.gradients]))
    exact, unscaled, scaled = found
    assert (scaled - exact).norm() < 0.01 * exact.norm() < 0.2 * (unscaled - exact).norm()


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch"])
def test_norms_and_biases_are_not_decayed(tiny_config: LlamaConfig, tmp_path: Path, optim: str):
    """The same parameters as under transformers' trainer."""
    options = {"full": True, "load_in_4bit": False, "weight_decay": 0.1, "optim": optim}
    made = tiny_learner(tiny_config, tmp_path, **options)
    trainer = object.__new__(Trainer)
    theirs = set(trainer.get_decay_parameter_names(made.model))
    names = {id(p): name for name, p in made.model.named_parameters()}
    decayed, plain = made.optimizer.param_groups
    assert {names[id(p)] for p in decayed["params"]} == theirs & set(names.values())
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    adapted = tiny_learner(tiny_config, tmp_path, weight_decay=0.1)
    assert len(adapted.optimizer.param_groups) == 1, "all of an adapter is"


def test_embeddings_and_heads_keep_32_bits(tiny_config: LlamaConfig, tmp_path: Path):
    """Rows that are met now and then, as bitsandbytes' paper and transformers' trainer have
    embeddings; untied heads, too."""
    options = {"full": True, "load_in_4bit": False, "optim": "adamw_8bit"}
    made = tiny_learner(tiny_config, tmp_path, **options)
    tables = [made.model.get_input_embeddings().weight, made.model.get_output_embeddings().weight]
    assert all(p.numel() >= 4096 for p in tables), "large enough for 8 bits"
    in_8_bits, in_32_bits = made.optimizer._split(made.trained)
    assert in_8_bits and not any(p is table for p in in_8_bits for table in tables)
    assert all(any(p is table for p in in_32_bits) for table in tables)


def test_one_element_that_is_not_finite_is_found():
    good = [torch.randn(40, 30), torch.randn(7), torch.zeros(0), torch.arange(5)]
    assert all_finite(good)
    for wrong in (float("nan"), float("inf"), -float("inf")):
        bad = torch.randn(40, 30)
        bad[17, 3] = wrong
        assert not all_finite([*good, bad])
    bad[17, 3] = -1e20
    assert all_finite([bad]) and not all_finite([bad], 1e19)

"""Tests of `engine.reductions`."""

from pathlib import Path

import torch
from transformers import LlamaConfig

from halfbyte.data.batches import collate
from halfbyte.memory.recompute import Recompute

from ..helpers import gradient, tiny_learner, tiny_rows


def test_a_learner_takes_less_memory_midway_for_the_same_bits(
    tiny_config: LlamaConfig, tmp_path: Path
):
    batch = collate(tiny_rows(9, 30), range(2))
    made = tiny_learner(tiny_config, tmp_path, kept_activations="all")
    expected, _ = gradient(made, batch)
    for change in (made.keep_less, made.offload, made.page_out):
        assert change(), change
        found, _ = gradient(made, batch)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not change(), "there is nothing more of it"
    assert isinstance(made.recompute, Recompute) and made.recompute.keep == "none"

"""Tests of `quantization.original`."""

from pathlib import Path

import pytest
import torch

from halfbyte.config.options import ModelOptions
from halfbyte.model.fp32 import model_in_fp32, typical_distance
from halfbyte.progress import no_progress
from halfbyte.quantization.load import load_base
from halfbyte.quantization.original import OriginalWeights
from halfbyte.quantization.writer import quantize


@torch.inference_mode()
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantized_model_computes_with_its_original_weights(stories: Path, dtype: str):
    held, _ = load_base(stories, ModelOptions(dtype=dtype))  # pyright: ignore[reportArgumentType]
    plain, _ = load_base(stories, ModelOptions(dtype=dtype, load_in_4bit=False))  # pyright: ignore[reportArgumentType]
    ids = torch.arange(30)[None]
    before = held(input_ids=ids).logits
    original = OriginalWeights(held, stories)
    assert original.available and original.replaces_quantized
    with original.in_use():
        assert torch.equal(held(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert torch.equal(held(input_ids=ids).logits, before)
    with original.in_use(), model_in_fp32(held):
        wide = held(input_ids=ids).logits
    with model_in_fp32(plain):  # whose weights are rounded to the compute dtype
        expected = plain(input_ids=ids).logits
    assert wide.dtype == torch.float32
    assert typical_distance(wide, expected) < 0.02
    assert dtype == "bfloat16" or torch.equal(wide, expected)
    assert torch.equal(held(input_ids=ids).logits, before), "whichever is left first"


def test_a_base_in_4_bits_only_has_none(stories: Path, tmp_path: Path):
    quantize(stories, ModelOptions(), tmp_path / "q", no_progress)
    model, _ = load_base(tmp_path / "q", ModelOptions())
    assert not OriginalWeights(model, tmp_path / "q").available

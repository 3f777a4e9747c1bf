"""Linear layers under other names: beside transformers' and PEFT's, on the weights as files hold
them."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FalconConfig, GPT2Config

import halfbyte
from halfbyte.config.options import ModelOptions
from halfbyte.files.model_config import read_config
from halfbyte.model.architecture import build_empty
from halfbyte.model.linear import STOOD_AS, name_linear, transposed_on_disk
from halfbyte.model.targets import adaptable
from halfbyte.quantization.load import load_base
from halfbyte.quantization.tensor import NF4Tensor
from halfbyte.run.load import load

from ..helpers import give_tokenizer, logits, train_adapter

FALCON = FalconConfig(
    vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, ffn_hidden_size=128
)


def _checkpoint(path: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=3072, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=None,
        eos_token_id=1, pad_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        nn.init.normal_(p, std=0.08)
    model.save_pretrained(path)
    give_tokenizer(path)
    return path


def test_every_conv1d_is_a_linear_layer_that_says_how_it_lies_on_disk(tmp_path: Path):
    path = _checkpoint(tmp_path / "gpt2")
    model = build_empty(read_config(path))
    assert len(transposed_on_disk(model)) == 8
    layer = model.transformer.h[0].mlp.c_fc
    assert type(layer) is nn.Linear and layer.weight.shape == (256, 64)
    loaded, _ = load_base(path, ModelOptions(dtype="float32", load_in_4bit=False))
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert torch.allclose(logits(loaded), logits(theirs), atol=1e-5)


def test_it_trains_in_4_bits_and_peft_and_transformers_open_what_comes_out(tmp_path: Path):
    path = _checkpoint(tmp_path / "gpt2")
    run = train_adapter(
        path, tmp_path, "run", dtype="float32", max_steps=2, judge=False, rehearse=False
    )
    ours, _ = load(run.path, dtype="float32")
    expected = logits(ours)
    theirs: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            held = ours.get_parameter(name)
            if isinstance(held.data, NF4Tensor):
                p.copy_(held.data.dequantize(torch.float32).t())
    before = logits(theirs)
    found = logits(peft.PeftModel.from_pretrained(theirs, str(run.adapter)))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert (found - before).abs().max() > 100 * (found - expected).abs().max()
    halfbyte.merge(run.path, tmp_path / "merged", onto="trained")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - expected).abs().max() <= 1e-4 * expected.abs().max()
    shapes = [
        {name: tuple(t.shape) for name, t in load_file(place / "model.safetensors").items()}
        for place in (path, tmp_path / "merged")
    ]
    assert shapes[0] == shapes[1]


class _Adds(nn.Linear):
    """Another thing than a linear layer."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_subclasses_that_compute_the_same_are_plain_and_others_are_left_alone(
    monkeypatch: pytest.MonkeyPatch,
):
    model = build_empty(FALCON)
    layer = model.transformer.h[0].self_attention.dense
    assert type(layer) is nn.Linear and getattr(layer, STOOD_AS) == "FalconLinear"
    assert "transformer.h.0.self_attention.dense" in adaptable(model)
    monkeypatch.setattr(_Adds, "__module__", "transformers.models.made_up")
    holder = nn.ModuleDict({"other": _Adds(8, 4), "plain": nn.Linear(8, 4)})
    assert name_linear(holder) == [holder["other"]]
    assert type(holder["other"]) is _Adds

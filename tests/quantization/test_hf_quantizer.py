"""Our quantizer in transformers' registry: `from_pretrained` in 4 bits with and without
bitsandbytes installed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
)

import halfbyte
from halfbyte.adapters.lora import AdapterConfig
from halfbyte.errors import UsageError
from halfbyte.files import hub
from halfbyte.quantization.tensor import NF4Tensor, ops, quantize

from ..helpers import in_four_bits, small_config

SETTINGS: dict[str, Any] = {
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.bfloat16,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = small_config(
        vocab_size=96, intermediate_size=128, num_hidden_layers=1, attention_bias=False
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_from_pretrained_holds_our_bytes_and_writes_bitsandbytes(
    checkpoint: Path, tmp_path: Path, quant_type: str
):
    config = halfbyte.BitsAndBytesConfig(
        bnb_4bit_quant_type=quant_type, llm_int8_skip_modules=["o_proj", "lm_head"], **SETTINGS
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=config, dtype=torch.bfloat16
    )
    plain: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    assert model.is_loaded_in_4bit and model.is_quantized
    held = {name for name, p in model.named_parameters() if isinstance(p, NF4Tensor)}
    assert len(held) == 6 and not any("o_proj" in name or "lm_head" in name for name in held)
    for name in held:
        mine, made = (
            model.get_parameter(name),
            quantize(plain.get_parameter(name).data, quant_type=quant_type),
        )
        assert all(
            torch.equal(a, b)
            for a, b in zip(mine.stored_tensors(), made.stored_tensors(), strict=True)
        )
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "bitsandbytes" and written["load_in_4bit"]
    ids = torch.arange(11)[None]
    pytest.importorskip("bitsandbytes")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        expected = theirs.train()(input_ids=ids).logits.float()
        found = model(input_ids=ids).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 0.02
    seen: list[torch.dtype] = []
    wide = halfbyte.BitsAndBytesConfig(
        bnb_4bit_quant_type=quant_type, bnb_4bit_compute_dtype=torch.float32
    )
    in_fp32: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=wide, dtype=torch.bfloat16
    )
    honest = ops.linear_4bit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            ops, "linear_4bit", lambda x, *rest: (seen.append(x.dtype), honest(x, *rest))[1]
        )
        assert in_fp32(input_ids=ids).logits.dtype == torch.bfloat16
    assert set(seen) == {torch.float32}, "the type that is asked for computes"
    with pytest.raises(ValueError, match="4bit"):
        halfbyte.BitsAndBytesConfig(load_in_8bit=True, load_in_4bit=False)
    with pytest.raises(ValueError, match="nf4-article"):
        halfbyte.BitsAndBytesConfig(bnb_4bit_quant_type="nf4-article")


WITHOUT = """
import importlib.metadata, sys, warnings
warnings.filterwarnings("ignore")
sys.modules["bitsandbytes"] = None
real = importlib.metadata.version
def version(name):
    if name == "bitsandbytes":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
import peft, torch
from transformers import AutoModelForCausalLM
import halfbyte
from halfbyte import BitsAndBytesConfig
source, written = sys.argv[1:]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
                            bnb_4bit_compute_dtype=torch.bfloat16)
model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="auto")
ids = torch.arange(11)[None]
expected = model(input_ids=ids).logits
model.save_pretrained(written)
model = AutoModelForCausalLM.from_pretrained(written)
assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
assert torch.equal(model(input_ids=ids).logits, expected)
model = peft.prepare_model_for_kbit_training(model)
lora = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
model = peft.get_peft_model(model, lora)
model = halfbyte.optimize(model.train())
optimizer = halfbyte.AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(6):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
assert losses[-1] < losses[0] - 0.05, losses
model.save_pretrained(written + "-adapter")
print("to the end")
"""


def test_without_bitsandbytes_a_script_loads_saves_and_trains(checkpoint: Path, tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(checkpoint), str(tmp_path / "written")],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "to the end" in done.stdout, done.stderr[-3000:]


IDS = torch.arange(11)[None]


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **options)
    model = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    return model.train()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"init_lora_weights": "olora"}])
def test_peft_does_with_it_what_it_does_with_bitsandbytes(checkpoint: Path, options: Any):
    """Logits, counts, footprint, merged (safely, too) and unmerged logits."""
    pytest.importorskip("bitsandbytes")
    theirs = adapted(in_four_bits(checkpoint, BitsAndBytesConfig), **options)
    ours = adapted(in_four_bits(checkpoint), **options)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()

    def distance(a: Any, b: Any) -> float:
        with torch.no_grad():
            x, y = (model.train()(input_ids=IDS).logits for model in (a, b))
        return float((x - y).norm() / y.norm())

    assert distance(ours, theirs) < 2e-3
    with torch.no_grad():
        before = ours(input_ids=IDS).logits
    ours.merge_adapter()
    theirs.merge_adapter()
    assert distance(ours, theirs) < 2e-2, "two roundings to 4 bits of nearly the same sums"
    ours.unmerge_adapter()
    with torch.no_grad():
        after = ours(input_ids=IDS).logits
    assert float((after - before).norm() / before.norm()) < 0.5
    kept = [p for p in ours.parameters() if isinstance(p, NF4Tensor)]
    assert len(kept) == 7 and all(p.data.packed is not None for p in kept)
    again = adapted(in_four_bits(checkpoint), **options)
    assert isinstance(again.merge_and_unload(safe_merge=True), LlamaForCausalLM)


def test_its_arithmetic_is_of_its_values():
    from halfbyte.quantization.params4bit import Params4bit

    torch.manual_seed(0)
    values = torch.randn(16, 64)
    tensor = Params4bit(values, quant_type="nf4", compress_statistics=False)
    assert isinstance(tensor, torch.nn.Parameter) and isinstance(tensor, NF4Tensor)
    plain = tensor.dequantize()
    assert torch.equal(tensor + 1, plain + 1) and torch.equal(2 * tensor, 2 * plain)
    assert torch.equal(tensor.clone(), plain) and tensor.nbytes == 16 * 64 // 2
    assert torch.equal(tensor.T @ values, plain.T @ values)
    tensor.data += 0.5
    made = quantize(plain + 0.5, double_quant=False).dequantize()
    assert torch.equal(tensor.dequantize(), made)
    tensor.data = values
    assert torch.equal(tensor.dequantize(), quantize(values, double_quant=False).dequantize())
    with torch.no_grad():
        tensor.copy_(plain)
    assert torch.equal(tensor.dequantize(), plain)
    with pytest.raises(TypeError, match="not cast"):
        tensor.to(torch.bfloat16)
    with pytest.raises(ValueError, match="does not fit"):
        tensor.data = torch.ones(3, 3)
    x = torch.randn(2, 64)
    assert torch.nn.functional.linear(x, tensor).shape == (2, 16)
    total = tensor.data
    total += torch.ones(16, 64, requires_grad=True)
    with pytest.raises(TypeError, match="passes none on"):
        torch.nn.functional.linear(x, total)


def test_gpt2s_layers_are_held_as_bitsandbytes_holds_them(tmp_path: Path):
    """Their weights lie the other way round."""
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    ours, theirs = (
        in_four_bits(tmp_path / "gpt2"),
        in_four_bits(tmp_path / "gpt2", BitsAndBytesConfig),
    )
    assert sum(isinstance(p, NF4Tensor) for p in ours.parameters()) == 4
    ours.save_pretrained(tmp_path / "written")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "written")
    with torch.no_grad():
        expected = theirs.eval()(input_ids=IDS).logits
        for model in (ours, again):
            found = model.eval()(input_ids=IDS).logits
            # for inference on CPUs bitsandbytes rounds scales to bf16
            assert float((found - expected).norm() / expected.norm()) < 5e-3


def test_a_model_of_which_nothing_is_in_4_bits_says_so(checkpoint: Path):
    config = halfbyte.BitsAndBytesConfig(llm_int8_skip_modules=["model", "lm_head"], **SETTINGS)
    with pytest.warns(UserWarning, match="no layer of this LlamaForCausalLM is in 4 bits"):
        AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)


def test_dequantize_gives_an_ordinary_model(checkpoint: Path):
    model = in_four_bits(checkpoint)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        plain = model.dequantize()
        assert not any(isinstance(p, NF4Tensor) for p in plain.parameters())
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-4)
    assert not plain.is_loaded_in_4bit and not hasattr(plain.config, "quantization_config")


def test_what_load_returns_is_saved_for_transformers_and_bitsandbytes(
    checkpoint: Path, tmp_path: Path
):
    pytest.importorskip("bitsandbytes")
    shutil.copytree(checkpoint, tmp_path / "model")
    AutoTokenizer.from_pretrained(hub.resolve("demo")).save_pretrained(tmp_path / "model")
    model, _ = halfbyte.load(tmp_path / "model", dtype="float32")
    model.save_pretrained(tmp_path / "written")
    theirs: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=torch.float32)
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        found = theirs.train()(input_ids=IDS).logits.float()
    assert float((found - expected).norm() / expected.norm()) < 2e-3
    with pytest.raises(UsageError, match="has an adapter"):
        halfbyte.attach_lora(model, AdapterConfig(2, 4), "q_proj")
        model.save_pretrained(tmp_path / "adapted")

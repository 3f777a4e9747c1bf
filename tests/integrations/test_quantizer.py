"""Our quantizer in transformers' registry: `from_pretrained` in 4 bits with and without
bitsandbytes installed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import halfbyte
from halfbyte.quantization.tensor import NF4Tensor, ops, quantize

from ..helpers import small_config

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

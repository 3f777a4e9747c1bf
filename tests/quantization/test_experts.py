"""Mixtures that scripts load through transformers: experts in 4 bits in transformers' own
parameters, beside the same model with the values that the 4 bits stand for."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.errors import UsageError
from halfbyte.quantization.experts import expert_weights
from halfbyte.quantization.tensor import NF4Tensor, quantize

from ..model.test_experts import IDS, MIXTURES, mixture

FP32: dict[str, Any] = {"bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_quant_type": "nf4"}


def held(path: Path, **settings: Any) -> Any:
    """A mixture as a script loads it."""
    config: Any = halfbyte.BitsAndBytesConfig(**FP32, **settings)
    return AutoModelForCausalLM.from_pretrained(
        path, quantization_config=config, dtype=torch.float32
    )


def twin(path: Path, model: Any) -> Any:
    """transformers' own with the values of another, which has the same parameters."""
    other: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            found = other.get_parameter(name.replace("base_model.model.", ""))
            found.copy_(p.dequantize() if isinstance(p, NF4Tensor) else p)
    return other.eval()


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_held_and_give_what_their_values_give(
    family: str, double_quant: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = mixture(family, tmp_path / "model")
    model = held(path, bnb_4bit_use_double_quant=double_quant)
    stacks = {n: p for n, p in model.named_parameters() if p.dim() == 3}
    assert stacks and all(isinstance(p, NF4Tensor) for p in stacks.values())
    plain: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for name, p in stacks.items():  # of a whole tensor, as bitsandbytes would
        made = quantize(plain.get_parameter(name).data, double_quant=double_quant)
        pairs = zip(p.stored_tensors(), made.stored_tensors(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        values = p.dequantize()
        assert all(torch.equal(part.dequantize(), values[i]) for i, part in enumerate(p.unbind(0)))
    other = twin(path, model)
    mine, theirs = model.eval()(input_ids=IDS).logits, other(input_ids=IDS).logits
    assert torch.allclose(mine, theirs, atol=2e-5 * float(theirs.abs().max()))
    assert "weights are in 4 bits; the experts" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("where", ["attention", "experts"])
def test_peft_adapts_it_and_gradients_are_those_of_the_values(
    family: str, where: str, tmp_path: Path
):
    path = mixture(family, tmp_path / "model")
    model = held(path)
    other = twin(path, model)
    options: Any = {"target_modules": ["q_proj", "v_proj"]}
    if where == "experts":
        options["target_parameters"] = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    found = []
    for base in (peft.prepare_model_for_kbit_training(model), other):
        torch.manual_seed(0)
        adapted: Any = peft.get_peft_model(base, config).train()
        adapted.enable_input_require_grads()
        adapted(input_ids=IDS, labels=IDS).loss.backward()
        found.append({n: p.grad for n, p in adapted.named_parameters() if p.grad is not None})
    mine, theirs = found
    assert len(mine) == len(theirs) > 4 and mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (mine[name] - grad).norm() <= 1e-4 * grad.norm(), name
    adapted = peft.get_peft_model(held(path), config)
    adapted.save_pretrained(tmp_path / "adapter")
    opened: Any = peft.PeftModel.from_pretrained(held(path), tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(
            adapted.eval()(input_ids=IDS).logits, opened.eval()(input_ids=IDS).logits
        )


def test_what_is_skipped_or_not_divided_by_blocks_stays_as_it_is(tmp_path: Path):
    path = mixture("mixtral", tmp_path / "model")
    model = held(path, llm_int8_skip_modules=["experts", "lm_head"])
    assert not any(isinstance(p, NF4Tensor) for p in model.parameters() if p.dim() == 3)
    assert any(isinstance(p, NF4Tensor) for p in model.parameters())
    experts = model.model.layers[0].mlp.experts
    assert expert_weights(experts) and not expert_weights(experts, block_size=1 << 16)
    assert not expert_weights(model.model.layers[0])


def test_a_checkpoint_that_could_not_be_read_is_not_written(tmp_path: Path):
    model = held(mixture("mixtral", tmp_path / "model"))
    with pytest.raises(UsageError, match="experts in 4 bits"):
        model.save_pretrained(tmp_path / "out")

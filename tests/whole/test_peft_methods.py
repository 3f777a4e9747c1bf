"""PEFT's methods on 4-bit models of ours beside bitsandbytes': the table in ``docs/peft.md``."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

import halfbyte

from ..helpers import in_four_bits, small_config

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
TARGETS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.arange(5, 45).view(2, 20) * 3 % 160


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, **options)


def on(targets: list[str] = TARGETS, **options: Any) -> dict[str, Any]:
    return {"target_modules": targets, **options}


METHODS: dict[str, Any] = {
    "LoRA": lambda: lora(),
    "rsLoRA": lambda: lora(use_rslora=True),
    "DoRA": lambda: lora(use_dora=True),
    "OLoRA": lambda: lora(init_lora_weights="olora"),
    "PiSSA": lambda: lora(init_lora_weights="pissa"),
    "LoRA with biases": lambda: lora(lora_bias=True),
    "aLoRA": lambda: lora(alora_invocation_tokens=[11, 14]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, **on()),
    "LoHa": lambda: peft.LoHaConfig(r=4, **on()),
    "LoKr": lambda: peft.LoKrConfig(r=4, **on()),
    "IA3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **on()),
    "VeRA": lambda: peft.VeraConfig(r=8, **on(["q_proj", "v_proj"])),
    "OFT": lambda: peft.OFTConfig(oft_block_size=16, **on()),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=16, **on()),
    "HRA": lambda: peft.HRAConfig(r=4, **on()),
    "FourierFT": lambda: peft.FourierFTConfig(n_frequency=50, **on()),
    "LN tuning": lambda: peft.LNTuningConfig(**on(["input_layernorm"])),
    "VB-LoRA": lambda: peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=32, **on()),
    "MiSS": lambda: peft.MissConfig(r=4, **on()),
    "SHiRA": lambda: peft.ShiraConfig(r=4, **on()),
    "RandLoRA": lambda: peft.RandLoraConfig(r=8, **on()),
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=4),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=32),
}
LIMIT = {"OLoRA": 0.05}
"""Of gradients and merged logits, relative; OLoRA quantizes its base a second time, where a
rounding moves a weight to the next level."""


def trained(checkpoint: Path, config: Any, method: Any) -> tuple[Any, dict[str, Tensor]]:
    """A model with a method, not at its beginning, and its logits and gradients."""
    torch.manual_seed(0)
    settings = method()
    settings.task_type = "CAUSAL_LM"
    model = peft.get_peft_model(in_four_bits(checkpoint, config), settings)
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)
    out = model.train()(input_ids=IDS, labels=IDS)
    out.loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return model, {"logits": out.logits.detach(), **grads}


def merged(model: Any) -> Tensor:
    with torch.no_grad():
        return model.merge_and_unload().train()(input_ids=IDS).logits


def attempt(function: Any, *arguments: Any) -> Any:
    """What it gives, or that it fails."""
    try:
        return function(*arguments)
    except Exception:
        return None


def cell(mine: Any, theirs: Any, limit: float) -> str:
    if mine is None or theirs is None:
        return {(True, True): "neither", (True, False): "bitsandbytes", (False, True): "halfbyte"}[
            mine is None, theirs is None
        ]
    far = max(float((mine[n] - t).norm() / (t.norm() + 1e-12)) for n, t in theirs.items())
    assert mine.keys() == theirs.keys() and far < limit, f"{far:.1e}"
    return "both, the same"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_methods_of_peft(tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = LlamaForCausalLM(small_config(hidden_size=128, intermediate_size=192))
    for p in base.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.08)
    base.save_pretrained(tmp_path)
    lines = []
    for name, method in METHODS.items():
        limit = LIMIT.get(name, 5e-3)
        mine = attempt(trained, tmp_path, halfbyte.BitsAndBytesConfig, method)
        theirs = attempt(trained, tmp_path, BitsAndBytesConfig, method)
        cells = [cell(mine and mine[1], theirs and theirs[1], limit)]
        ends = [made and attempt(merged, made[0]) for made in (mine, theirs)]
        cells.append(cell(*[None if e is None else {"logits": e} for e in ends], 2 * limit))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    page = PAGE.read_text()
    missing = [line for line in lines if line not in page]
    assert not missing, f"{PAGE} lacks:\n" + "\n".join(missing)

"""Mixtures of experts, held apart: beside transformers' own fused ones."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import halfbyte
from halfbyte.config.options import ModelOptions
from halfbyte.engine import selftest
from halfbyte.engine.selftest import self_test
from halfbyte.errors import HalfbyteError
from halfbyte.files import hub
from halfbyte.model.experts import DividedExperts, Expert
from halfbyte.model.targets import adaptable, quantizable
from halfbyte.quantization.load import load_base
from halfbyte.quantization.tensor import NF4Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 3072,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 6},
    "mixtral": {"num_local_experts": 4},
    # its files hold the experts of a layer in one tensor
    "granitemoe": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    # and these hold them the other way round, gate and up interleaved, with biases
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 16},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 64},
    "deepseek_v3": {
        "n_routed_experts": 8,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "head_dim": 8,
        "num_key_value_heads": 4,
    },
}


def mixture(family: str, path: Path) -> Path:
    """A random mixture on disk, its router decided by more than rounding."""
    config = AutoConfig.for_model(family, **{**SIZES, **MIXTURES[family]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.1)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (path / name).write_bytes((hub.resolve("demo") / name).read_bytes())
    return path


def twin(path: Path, model: Any) -> Any:
    """transformers' model with the values that ours holds in 4 bits."""
    other: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    theirs = dict(other.named_parameters())
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, DividedExperts):
                experts = [getattr(module, str(i)) for i in range(module.num_experts)]
                if module.is_joined:
                    for part in ("gate_up_proj", "down_proj"):
                        layers = [getattr(e, part) for e in experts]
                        stacked = torch.stack([whole(layer.weight).t() for layer in layers])
                        theirs[f"{name}.{part}"].copy_(stacked)
                    continue
                gates = [
                    torch.cat([whole(e.gate_proj.weight), whole(e.up_proj.weight)]) for e in experts
                ]
                theirs[f"{name}.gate_up_proj"].copy_(torch.stack(gates))
                downs = [whole(e.down_proj.weight) for e in experts]
                theirs[f"{name}.down_proj"].copy_(torch.stack(downs))
            elif isinstance(module, nn.Linear) and f"{name}.weight" in theirs:
                theirs[f"{name}.weight"].copy_(whole(module.weight))
    return other.eval()


def whole(weight: Any) -> torch.Tensor:
    return weight.data.dequantize() if isinstance(weight.data, NF4Tensor) else weight.data


def loaded(path: Path, **options: Any) -> Any:
    return load_base(path, ModelOptions(dtype="float32", device="cpu", **options))


IDS = (torch.arange(40) * 7919 % 3000 + 5).view(2, 20)


@pytest.mark.parametrize("family", MIXTURES)
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_divided_experts_give_what_fused_ones_do(family: str, load_in_4bit: bool, tmp_path: Path):
    path = mixture(family, tmp_path / "model")
    model, report = loaded(path, load_in_4bit=load_in_4bit)
    expected = twin(path, model)(input_ids=IDS).logits
    found = model(input_ids=IDS).logits
    assert (found - expected).norm() <= 2e-6 * expected.norm()
    if load_in_4bit:
        assert report.coverage >= 0.97
        held = {name for name, p in model.named_parameters() if isinstance(p.data, NF4Tensor)}
        assert held == quantizable(model)


def test_what_stays_in_16_bits_and_what_takes_no_adapter(tmp_path: Path):
    model, _ = loaded(mixture("qwen2_moe", tmp_path / "model"))
    paths = adaptable(model)
    assert not any(".experts." in path for path in paths)
    assert any(path.endswith("shared_expert.gate_proj") for path in paths)
    assert not any(path.endswith((".gate", "shared_expert_gate")) for path in paths)
    assert sum(isinstance(module, Expert) for module in model.modules()) == 8


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_gradients_pass_through_experts_and_routers(family: str, tmp_path: Path):
    path = mixture(family, tmp_path / "model")
    model, _ = loaded(path)
    other = twin(path, model)
    grads = []
    for each in (model, other):
        embedded = each.get_input_embeddings()(IDS).detach().requires_grad_()
        logits = each(inputs_embeds=embedded).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
        grads.append(embedded.grad)
    found, expected = grads
    assert (found - expected).norm() <= 1e-5 * expected.norm()


# PEFT looks for patterns among modules alone before it says so; it applies them
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
@pytest.mark.parametrize("target_experts", [False, True])
@pytest.mark.parametrize(
    "family",
    ["qwen3_moe", "deepseek_v3", "gpt_oss"]
    + [
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("mixtral", "olmoe", "qwen2_moe", "granitemoe")
    ],
)
def test_a_mixture_is_trained_opened_by_peft_and_merged(
    family: str, target_experts: bool, tmp_path: Path
):
    path = mixture(family, tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    lines = [{"instruction": f"say {i}", "output": f"it is {i}"} for i in range(6)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = halfbyte.train(
        model=str(path),
        data=str(rows),
        output_dir=str(tmp_path / "run"),
        dtype="float32",
        learning_rate=1e-2,
        max_steps=3,
        lora_dropout=0.0,
        num_samples=0,
        eval_split=0,
        target_experts=target_experts,
    )
    said = run.info()["found"]
    assert ("experts" in said) is not target_experts
    model, _ = halfbyte.load(run.path, dtype="float32", device="cpu")
    expected = model(input_ids=IDS).logits
    base = twin(path, model)
    before = base(input_ids=IDS).logits.detach()
    opened = peft.PeftModel.from_pretrained(base, str(run.path / "adapter")).eval()
    found = opened(input_ids=IDS).logits
    assert (found - before).norm() > 1e-3 * before.norm()
    assert (found - expected).norm() <= 5e-6 * expected.norm()
    receipt = halfbyte.merge(run.path, tmp_path / "merged")
    assert receipt
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (merged(input_ids=IDS).logits - expected).norm() <= 5e-6 * expected.norm()


def test_a_missing_expert_is_named(tmp_path: Path):
    from safetensors.torch import load_file, save_file

    path = mixture("qwen3_moe", tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    gone = "model.layers.1.mlp.experts.3.up_proj.weight"
    del tensors[gone]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(HalfbyteError) as error:
        loaded(path)
    assert f"missing: {gone}" in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_rows_of_a_mixture_keep_apart_and_a_leak_is_seen(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = mixture("qwen3_moe", tmp_path / "model")
    model, _ = load_base(path, ModelOptions(dtype=dtype, device="cpu"))  # pyright: ignore[reportArgumentType]
    assert self_test(model).packing

    def leaking(model: Any, ids: torch.Tensor, position: torch.Tensor, length: int) -> torch.Tensor:
        found = model.base_model(input_ids=ids[None], use_cache=False)
        return found.last_hidden_state[0]

    monkeypatch.setattr(selftest, "_packed", leaking)
    assert not self_test(model).packing


@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoe"])
def test_experts_that_stay_in_a_file_train_the_same_bytes(
    family: str, tmp_path: Path, own_cache: Path
):
    path = mixture(family, tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"instruction": "say it", "output": "it is said"}) + "\n")
    adapters = []
    for streaming in ("never", "always"):
        run = halfbyte.train(
            model=str(path),
            data=str(rows),
            output_dir=str(tmp_path / streaming),
            dtype="float32",
            max_steps=2,
            num_samples=0,
            eval_split=0,
            rehearse=False,
            weight_streaming=streaming,
        )
        adapters.append((run.path / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]

"""Adapters as PEFT's files, in and out: plain, rsLoRA, DoRA, patterns, whole modules; PEFT itself
is the oracle."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import halfbyte
from halfbyte import nf4
from halfbyte.adapters import lora, peft_files
from halfbyte.adapters.lora import AdapterConfig
from halfbyte.adapters.modules_to_save import make_modules_trainable, trainable_modules
from halfbyte.adapters.peft_files import adapter_off
from halfbyte.errors import ModelError, UsageError
from halfbyte.exporters.merge import surviving_share
from halfbyte.files.safetensors import Checkpoint, write_safetensors


def lively(model: nn.Module) -> None:
    """Random values where an adapter begins with zeros, and off ones where it begins with norms."""
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_magnitude" in name:
            p.data *= 1 + 0.1 * torch.randn_like(p)
        elif "lora_" in name:
            nn.init.normal_(p, std=0.1)
        elif p.requires_grad:
            p.data += 0.02 * torch.randn_like(p)


def gradients(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradients of a weighted sum of them, by PEFT's file names."""
    logits = model(input_ids=ids).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def test_rank_and_alpha_patterns_are_pefts_both_ways(tiny_llama: LlamaForCausalLM, tmp_path: Path):
    """Layers of other ranks and alphas: read from PEFT's file, made from options, written for PEFT;
    its logits."""
    patterns: dict[str, Any] = {
        "rank_pattern": {"down_proj": 6, r"layers\.0\.self_attn\.q_proj": 2},
        "alpha_pattern": {"v_proj": 5, "layers.1.mlp.down_proj": 9},
    }
    base = copy.deepcopy(tiny_llama)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **patterns
    )
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config).eval()
    torch.manual_seed(0)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    peft_files.load_adapter(ours, tmp_path / "theirs")
    ids = torch.arange(15)[None]
    expected = theirs(input_ids=ids).logits
    torch.testing.assert_close(ours.eval()(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    peft_files.save_adapter(ours, tmp_path / "ours", "base")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    made = copy.deepcopy(base)
    lora.attach_lora(made, AdapterConfig(4, 8, **patterns))
    shapes = {
        name: (layer.adapter.r, layer.adapter.alpha) for name, layer in lora.lora_layers(made)
    }
    assert shapes == {
        name: (layer.adapter.r, layer.adapter.alpha) for name, layer in lora.lora_layers(ours)
    }
    assert shapes["model.layers.1.mlp.down_proj"] == (6, 9) and shapes[
        "model.layers.0.self_attn.q_proj"
    ] == (2, 8)


def test_adapter_files_are_pefts_both_ways(tiny_llama: LlamaForCausalLM, tmp_path: Path):
    ours, twin = tiny_llama, copy.deepcopy(tiny_llama)
    ids = torch.randint(0, 160, (1, 20))
    lora.attach_lora(ours, AdapterConfig(4, 8), "all-linear")
    for _, layer in lora.lora_layers(ours):
        nn.init.normal_(layer.lora_B, std=0.1)
    peft_files.save_adapter(ours, tmp_path / "ours", "base")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(twin), str(tmp_path / "ours")).eval()
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    peft_files.load_adapter(twin, tmp_path / "theirs")
    with torch.no_grad():
        assert torch.equal(twin(input_ids=ids).logits, expected)


def test_misfits_are_listed_at_once(tiny_llama: LlamaForCausalLM, tmp_path: Path):
    lora.attach_lora(tiny_llama, AdapterConfig(4, 8), "q_proj,v_proj")
    peft_files.save_adapter(tiny_llama, tmp_path, "base")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    fresh = LlamaForCausalLM(tiny_llama.config)
    with pytest.raises(ModelError) as caught:
        peft_files.load_adapter(fresh, tmp_path)
    assert caught.value.found.count("in the file") == 8
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({**config, "layers_to_transform": [0]})
    )
    with pytest.raises(ModelError, match="layers_to_transform"):
        peft_files.load_adapter(fresh, tmp_path)


KINDS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "everything": {
        "use_dora": True,
        "use_rslora": True,
        "modules_to_save": ["lm_head", "embed_tokens", "norm"],
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_is_pefts_both_ways(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, kind: str
):
    """PEFT's adapter read by us, and ours read by PEFT: the same logits and gradients, fp32."""
    base, ids = tiny_llama, torch.arange(3, 18)[None]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **KINDS[kind]
    )
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)
    lively(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    expected, expected_grads = gradients(theirs, ids)

    ours = copy.deepcopy(base)
    peft_files.load_adapter(ours, tmp_path / "theirs")
    logits, grads = gradients(ours, ids)
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    theirs_by_name = {
        name.removeprefix("base_model.model.")
        .replace(".default", "")
        .replace(".modules_to_save", ""): grad
        for name, grad in expected_grads.items()
    }
    mine_by_name = {
        name.replace("lora_A", "lora_A.weight")
        .replace("lora_B", "lora_B.weight")
        .replace("magnitude_vector", "magnitude_vector.weight"): grad
        for name, grad in grads.items()
    }
    assert mine_by_name.keys() == theirs_by_name.keys()
    for name, grad in mine_by_name.items():
        other = theirs_by_name[name]
        assert (grad - other).norm() <= 1e-4 * other.norm(), name

    peft_files.save_adapter(ours, tmp_path / "ours", "base")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(
        again(input_ids=ids).logits, logits, rtol=0, atol=2e-5 * float(expected.abs().max())
    )
    written = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert written["use_dora"] == config.use_dora and written["use_rslora"] == config.use_rslora
    assert written["modules_to_save"] == (
        sorted(config.modules_to_save) if config.modules_to_save else None
    )

    with torch.no_grad(), adapter_off(ours):
        torch.testing.assert_close(
            ours(input_ids=ids).logits, base(input_ids=ids).logits, rtol=0, atol=0
        )
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, logits), "the adapter is on again"


def test_dora_begins_as_its_base_and_scales_rows_to_its_magnitudes():
    torch.manual_seed(0)
    for weight in (torch.randn(48, 64), nf4.quantize(torch.randn(48, 64))):
        layer = nn.Linear(64, 48)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        plain = copy.deepcopy(layer)
        made = lora.LoraLinear.from_linear(
            layer, AdapterConfig(4, 8, use_dora=True), 0, lora.DropoutClock(), torch.Generator()
        )
        x = torch.randn(7, 64)
        torch.testing.assert_close(made(x), plain(x), rtol=1e-6, atol=1e-6)
        nn.init.normal_(made.lora_B, std=0.3)
        with torch.no_grad():
            merged = made.merged(made.base_weight().float())
        torch.testing.assert_close(merged.norm(dim=1), made.lora_magnitude_vector)
        torch.testing.assert_close(
            made.train()(x), x @ merged.t() + made.bias, rtol=1e-4, atol=1e-4
        )
        before = made.eval()(x)
        with torch.no_grad():
            made.lora_A.mul_(2)  # norms at rest are found anew when what they depend on changes
        assert not torch.allclose(made(x), before)
        merged = made.merged(made.base_weight().float()).detach()
        torch.testing.assert_close(made(x), x @ merged.t() + made.bias, rtol=1e-4, atol=1e-4)
        assert 0 <= surviving_share(made, halfbyte.TrainConfig(model="m", data="d")) <= 1.5


def test_whole_modules_compute_in_the_type_they_had(tiny_llama: LlamaForCausalLM):
    model = tiny_llama.to(torch.bfloat16)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    make_modules_trainable(model, ["lm_head", "embed_tokens", "model.norm"])
    assert [path for path, _ in trainable_modules(model)] == [
        "model.embed_tokens",
        "model.norm",
        "lm_head",
    ]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, expected)
    model(input_ids=ids).logits.float().square().sum().backward()
    for _, module in trainable_modules(model):
        for p in module.parameters():
            assert p.dtype == torch.float32 and p.grad is not None and p.grad.dtype == torch.float32


def test_whole_modules_that_cannot_be_are_refused_by_name(tiny_llama: LlamaForCausalLM):
    with pytest.raises(UsageError, match="lm_heads"):
        make_modules_trainable(tiny_llama, ["lm_heads"])
    tied = copy.deepcopy(tiny_llama)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    with pytest.raises(UsageError) as caught:
        make_modules_trainable(tied, ["lm_head"])
    assert (
        "embed_tokens" in caught.value.what and "lm_head,embed_tokens" in caught.value.ways_out[0]
    )
    make_modules_trainable(tied, ["lm_head", "embed_tokens"])
    assert tied.lm_head.weight is tied.model.embed_tokens.weight, "one parameter, trained once"
    tiny_llama.model.layers[0].mlp.up_proj.weight = nn.Parameter(
        nf4.quantize(tiny_llama.model.layers[0].mlp.up_proj.weight.data), requires_grad=False
    )
    with pytest.raises(UsageError, match="4 bits"):
        make_modules_trainable(tiny_llama, ["up_proj"])


ROWS = [
    {"prompt": f"{word} is", "completion": f" a word of {len(word)} letters"}
    for word in "one three seven".split()
]


def trained(stories: Path, home: Path, name: str, **options: Any) -> halfbyte.Run:
    data = home / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in ROWS))
    settings: dict[str, Any] = {
        "gradient_accumulation_steps": 3,
        "learning_rate": 1e-2,
        "num_samples": 0,
        "lora_r": 4,
    }
    return halfbyte.train(
        str(stories), data, output_dir=str(home / name), **{**settings, **options}
    )


def test_dora_and_whole_modules_are_trained_resumed_and_merged(stories: Path, tmp_path: Path):
    """Everything changes, a resume ends with the same bytes, the plan holds them, the merge is the
    run."""
    options = {
        "use_dora": True,
        "modules_to_save": "lm_head,embed_tokens",
        "lora_dropout": 0.1,
        "load_in_4bit": True,
        "kept_activations": "all",
    }
    whole = trained(stories, tmp_path, "whole", max_steps=6, **options)
    again = {**options, "save_steps": 3, "max_steps": 6}
    cut = tmp_path / "cut"

    def stop(row: dict[str, Any], total: int) -> None:
        if row["step"] == 4:
            raise KeyboardInterrupt

    from halfbyte.progress import Reporter

    with pytest.raises(KeyboardInterrupt):
        trained(stories, tmp_path, "cut", reporter=Reporter(on_step=stop), **again)
    resumed = trained(
        stories,
        tmp_path,
        "cut",
        resume_from_checkpoint="auto",
        **{**again, "kept_activations": "none"},
    )
    assert resumed.path == cut
    files = [run.adapter / "adapter_model.safetensors" for run in (whole, resumed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = whole.read("metrics.jsonl")
    assert rows[-1]["loss"] < rows[0]["loss"]
    model, _ = halfbyte.load(whole.path)
    with adapter_off(model):
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        base_norms = layer.weight.dequantize().float().norm(dim=1)
    assert not torch.allclose(layer.lora_magnitude_vector, base_norms, rtol=1e-4), (
        "magnitudes were trained"
    )
    (_, embeddings), *_ = list(trainable_modules(model))
    assert not torch.equal(embeddings.originals["weight"].float(), embeddings.weight), (
        "and whole modules"
    )
    receipt = halfbyte.merge(whole.path, tmp_path / "merged")
    assert receipt.greedy_agreement == 1.0 and receipt.comparisons["trained"].kl < 1e-6
    original = halfbyte.merge(whole.path, tmp_path / "original", onto="original")
    assert original.greedy_agreement == 1.0


def test_training_goes_on_from_an_adapter_of_peft_and_peft_from_ours(stories: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(stories)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"v_proj": 2},
        use_dora=True,
    )
    theirs: Any = peft.get_peft_model(base, config)
    lively(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    given = {
        "adapter_name_or_path": str(tmp_path / "theirs"),
        "load_in_4bit": False,
        "dtype": "float32",
    }
    with pytest.raises(UsageError, match="lora_r"):
        trained(stories, tmp_path, "no", max_steps=1, lora_r=4, **given)
    with pytest.raises(UsageError, match="target_modules"):
        trained(
            stories, tmp_path, "no", max_steps=1, lora_r=3, target_modules="all-linear", **given
        )
    data = tmp_path / "rows.jsonl"
    settings = {"max_steps": 1, "num_samples": 0, "learning_rate": 1e-30, **given}
    still = halfbyte.train(str(stories), data, output_dir=str(tmp_path / "still"), **settings)
    ids = torch.arange(12)[None]
    model, _ = halfbyte.load(still.path)
    with torch.no_grad():
        expected = theirs.eval()(input_ids=ids).logits
        torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    config_written = json.loads((still.adapter / "adapter_config.json").read_text())
    assert (config_written["r"], config_written["lora_alpha"], config_written["use_dora"]) == (
        3,
        5,
        True,
    )
    onward = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(stories), str(still.adapter), is_trainable=True
    )
    torch.testing.assert_close(onward(input_ids=ids).logits, expected, rtol=0, atol=1e-4)
    assert any(p.requires_grad for p in onward.parameters())


def test_a_resume_needs_the_adapter_no_more(stories: Path, tmp_path: Path):
    first = trained(stories, tmp_path, "first", max_steps=1, modules_to_save="lm_head,embed_tokens")
    begun = {"adapter_name_or_path": str(first.path), "modules_to_save": "embed_tokens, lm_head"}
    whole = trained(stories, tmp_path, "whole", max_steps=4, save_steps=2, **begun)
    cut = trained(stories, tmp_path, "cut", max_steps=4, save_steps=2, **begun)
    shutil.rmtree(cut.path / "checkpoints" / "step-00000004")
    shutil.rmtree(cut.adapter)
    first.path.rename(tmp_path / "gone")
    trained(
        stories, tmp_path, "cut", max_steps=4, save_steps=2, resume_from_checkpoint="auto", **begun
    )
    files = [run.adapter / "adapter_model.safetensors" for run in (whole, cut)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    "key,value",
    [("r", None), ("lora_alpha", 2.5), ("rank_pattern", {"(": 2}), ("lora_dropout", "x")],
)
def test_numbers_no_adapter_has_are_refused_by_name(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, key: str, value: Any
):
    lora.attach_lora(tiny_llama, AdapterConfig(4, 8), "q_proj")
    peft_files.save_adapter(tiny_llama, tmp_path, "base")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(ModelError) as caught:
        peft_files.read_adapter_config(tmp_path)
    assert key in caught.value.found


def test_composite_modules_and_older_checkpoints_are_merged(stories: Path, tmp_path: Path):
    """An MLP trained whole is in the merge; a buffer that models compute today is carried along."""
    base = tmp_path / "base"
    shutil.copytree(stories, base)
    entries = Checkpoint(base)
    tensors = {name: entries.read(name) for name in entries}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    for file in base.glob("*.safetensors*"):
        file.unlink()
    write_safetensors(base / "model.safetensors", tensors)
    options = {
        "load_in_4bit": False,
        "target_modules": "q_proj",
        "modules_to_save": "mlp",
        "learning_rate": 1e-1,
    }
    run = trained(base, tmp_path, "run", max_steps=2, **options)
    receipt = halfbyte.merge(run.path, tmp_path / "merged")
    assert receipt.greedy_agreement == 1.0
    merged = Checkpoint(tmp_path / "merged")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged.read(name), tensors[name])
    assert torch.equal(merged.read("model.layers.0.self_attn.rotary_emb.inv_freq"), torch.ones(4))


def test_an_adapter_of_another_base_is_refused_unless_said_so(stories: Path, tmp_path: Path):
    run = trained(stories, tmp_path, "run", max_steps=1)
    other = {"bnb_4bit_quant_type": "fp4", "max_steps": 1, "adapter_name_or_path": str(run.path)}
    data = tmp_path / "rows.jsonl"
    with pytest.raises(ModelError, match="not the one this adapter was trained on"):
        halfbyte.train(str(stories), data, output_dir=str(tmp_path / "no"), num_samples=0, **other)
    said = halfbyte.train(
        str(stories),
        data,
        output_dir=str(tmp_path / "yes"),
        num_samples=0,
        allow_other_base=True,
        **other,
    )
    assert said.config().lora_r == 4, "the adapter's own"


def test_twenty_steps_agree_with_pefts(stories: Path, tmp_path: Path):
    """Equal initial adapter, rows, order and fp32 arithmetic: PEFT and torch's AdamW, step by step,
    and we."""
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(stories)
    theirs: Any = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    )
    theirs.save_pretrained(tmp_path / "start")
    data = tmp_path / "rows.jsonl"
    rows = [[1, *range(10 + i, 30 + 2 * i)] for i in range(20)]
    data.write_text("\n".join(json.dumps({"input_ids": row}) for row in rows))
    seen: list[float] = []
    run = halfbyte.train(
        str(stories),
        data,
        output_dir=str(tmp_path / "run"),
        adapter_name_or_path=str(tmp_path / "start"),
        load_in_4bit=False,
        dtype="float32",
        optim="adamw_torch",
        learning_rate=2e-3,
        lr_scheduler_type="constant",
        warmup_ratio=0.0,
        gradient_accumulation_steps=2,
        num_train_epochs=2.0,
        max_grad_norm=1.0,
        num_samples=0,
    )
    losses = [row["loss"] for row in run.read("metrics.jsonl")]
    from halfbyte.data.dataset import schedule_of
    from halfbyte.progress import Reporter
    from halfbyte.training.setup import read_rows

    data = read_rows(run.config(), stories, Reporter())
    schedule = schedule_of(run.config(), data)
    steps = [step for epoch in range(2) for step in schedule.epoch(epoch)]
    assert len(steps) == len(losses) == 20
    optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0
    )
    theirs.train()
    for step in steps:
        chosen = [data.train.rows[i] for micro in step for i in micro]
        total, count = torch.zeros(()), sum(len(row.input_ids) - 1 for row in chosen)
        for row in chosen:
            ids = torch.tensor([row.input_ids])
            logits = theirs(input_ids=ids).logits[0, :-1].float()
            total = total + nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        (total / count).backward()
        nn.utils.clip_grad_norm_([p for p in theirs.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(total / count))
    assert losses[-1] < 0.9 * losses[0]
    for mine, other in zip(losses, seen, strict=True):
        assert abs(mine - other) <= 1e-4 * other

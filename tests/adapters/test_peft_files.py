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
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

import halfbyte
from halfbyte.adapters import lora, peft_files
from halfbyte.adapters.lora import AdapterConfig, ends_with
from halfbyte.adapters.modules_to_save import trainable_modules
from halfbyte.adapters.peft_files import adapter_off
from halfbyte.errors import ModelError, UsageError
from halfbyte.files import hub
from halfbyte.files.safetensors import Checkpoint, write_safetensors
from halfbyte.model.architecture import build_empty
from halfbyte.model.targets import adaptable

from ..helpers import SIZES, perturb_zeros, train_adapter


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


UNDONE: dict[str, Any] = {
    "init_lora_weights": "pissa",
    "alora_invocation_tokens": [20, 21],
    "trainable_token_indices": [3],
    "target_parameters": ["experts"],
    "layer_replication": [[0, 2]],
    "lora_bias": True,
    "bias": "lora_only",
    "use_qalora": True,
    "kasa_config": {"a": 1},
    "a_method_of_tomorrow": {"on": True},
    "use_what_comes": True,
}


@pytest.mark.parametrize("key", UNDONE)
def test_what_makes_another_model_of_an_adapter_is_refused_by_name(
    tiny_llama: LlamaForCausalLM, tmp_path: Path, key: str
):
    lora.attach_lora(tiny_llama, AdapterConfig(4, 8), "q_proj,v_proj")
    peft_files.save_adapter(tiny_llama, tmp_path, "base")
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, key: UNDONE[key]}))
    with pytest.raises(ModelError) as caught:
        peft_files.load_adapter(LlamaForCausalLM(tiny_llama.config), tmp_path)
    assert key in caught.value.found


def test_what_changes_nothing_of_an_adapter_is_taken(tiny_llama: LlamaForCausalLM, tmp_path: Path):
    """Which layers were chosen is in their tensors; beginnings that left the base alone are over;
    numbers of methods that are off."""
    lora.attach_lora(tiny_llama, AdapterConfig(4, 8), "q_proj,v_proj")
    peft_files.save_adapter(tiny_llama, tmp_path, "base")
    file = tmp_path / "adapter_config.json"
    fine = {
        "layers_to_transform": [0, 1],
        "exclude_modules": ["k_proj"],
        "init_lora_weights": "orthogonal",
        "eva_config": {"rho": 2.0},
        "qalora_group_size": 16,
        "a_size_of_tomorrow": 8,
        "lora_alpha": 8.0,
    }
    file.write_text(json.dumps({**json.loads(file.read_text()), **fine}))
    fresh = LlamaForCausalLM(tiny_llama.config)
    peft_files.load_adapter(fresh, tmp_path)
    assert {layer.adapter.alpha for _, layer in lora.lora_layers(fresh)} == {8}
    assert peft_files.adapter_config(fresh, "base")["lora_alpha"] == 8


def test_whole_modules_trained_apart_are_not_thrown_together(
    tiny_config: LlamaConfig, tmp_path: Path
):
    """PEFT trains copies of a tied head and embedding, which drift apart; one tensor of ours cannot
    be both."""
    tiny_config.tie_word_embeddings = True
    base = LlamaForCausalLM(tiny_config)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["lm_head", "embed_tokens"],
        task_type="CAUSAL_LM",
    )
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), config)
    for drift in (0.0, 0.1):
        for name, p in theirs.named_parameters():
            if "lm_head.modules_to_save" in name:
                p.data += drift
        theirs.save_pretrained(tmp_path / str(drift))
        ours = copy.deepcopy(base)
        if drift:
            with pytest.raises(ModelError, match="apart") as caught:
                peft_files.load_adapter(ours, tmp_path / str(drift))
            assert "lm_head" in caught.value.what and "embed_tokens" in caught.value.what
        else:
            peft_files.load_adapter(ours, tmp_path / str(drift))


APART: dict[str, dict[str, Any]] = {
    "both whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "the head": {"modules_to_save": ["lm_head"]},
    "the embedding": {"modules_to_save": ["embed_tokens"]},
    "an adapter on the head": {"target_modules": ["q_proj", "lm_head"]},
}


@pytest.mark.parametrize(
    "kind",
    [k if k != "the embedding" else pytest.param(k, marks=pytest.mark.slow) for k in APART],
)
def test_what_was_trained_apart_from_its_tie_is_two_tensors(
    kind: str, stories: Path, tmp_path: Path
):
    """On a tied base PEFT trains copies; answers, merges and further training have both."""
    config = peft.LoraConfig(
        r=4, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **APART[kind]}
    )
    theirs: Any = peft.get_peft_model(LlamaForCausalLM.from_pretrained(stories), config).eval()
    perturb_zeros(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
    exact: dict[str, Any] = {"load_in_4bit": False, "dtype": "float32"}

    def same(model: Any) -> None:
        with torch.no_grad():
            found = model(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    same(halfbyte.load(tmp_path / "theirs", **exact)[0])
    halfbyte.merge(tmp_path / "theirs", tmp_path / "onto 4 bits")
    begun = {"adapter_name_or_path": str(tmp_path / "theirs"), "learning_rate": 1e-30, **exact}
    if kind == "an adapter on the head":
        halfbyte.merge(tmp_path / "theirs", tmp_path / "merged", onto="original")
        same(LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32))
        with pytest.raises(ModelError, match="the output head"):
            train_adapter(stories, tmp_path, "run", max_steps=1, **begun)
        return
    run = train_adapter(stories, tmp_path, "run", max_steps=1, **begun)
    assert not run.config().tie_word_embeddings
    same(halfbyte.load(run.path)[0])
    halfbyte.merge(run.path, tmp_path / "merged")
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not torch.equal(merged.lm_head.weight, merged.get_input_embeddings().weight)
    same(merged)
    base = LlamaForCausalLM.from_pretrained(stories)
    same(peft.PeftModel.from_pretrained(base, str(run.adapter)).eval())
    with pytest.raises(UsageError, match="tie_word_embeddings"):
        train_adapter(stories, tmp_path, "no", max_steps=1, tie_word_embeddings=True, **begun)


@pytest.mark.parametrize(
    "named",
    [
        ["embed_tokens"],
        pytest.param(["lm_head"], marks=pytest.mark.slow),
        pytest.param(["lm_head", "embed_tokens"], marks=pytest.mark.slow),
    ],
)
def test_ties_that_peft_keeps_stay(named: list[str], stories: Path, tmp_path: Path):
    """With ``ensure_weight_tying`` it names one of two modules and writes both (unsloth 9331)."""
    config = peft.LoraConfig(
        r=4,
        task_type="CAUSAL_LM",
        target_modules=["q_proj"],
        modules_to_save=named,
        ensure_weight_tying=True,
    )
    theirs: Any = peft.get_peft_model(LlamaForCausalLM.from_pretrained(stories), config).eval()
    perturb_zeros(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    exact: dict[str, Any] = {"load_in_4bit": False, "dtype": "float32"}
    begun = {"adapter_name_or_path": str(tmp_path / "theirs"), "learning_rate": 1e-30}
    run = train_adapter(stories, tmp_path, "run", max_steps=1, **begun, **exact)
    assert run.config().tie_word_embeddings
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        for model in (halfbyte.load(tmp_path / "theirs", **exact)[0], halfbyte.load(run.path)[0]):
            assert model.lm_head.weight is model.get_input_embeddings().weight
            found = model(input_ids=ids).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_head_is_trained_by_itself_where_its_tie_is_taken_off(stories: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="also those") as caught:
        train_adapter(stories, tmp_path, "no", max_steps=3, modules_to_save="lm_head")
    assert any("--tie_word_embeddings false" in way for way in caught.value.ways_out)
    run = train_adapter(
        stories,
        tmp_path,
        "run",
        max_steps=3,
        modules_to_save="lm_head",
        tie_word_embeddings=False,
        weight_streaming="always",
    )
    model, _ = halfbyte.load(run.path)
    before = LlamaForCausalLM.from_pretrained(stories).lm_head.weight
    assert torch.equal(model.get_input_embeddings().weight.float(), before.bfloat16().float())
    assert not torch.allclose(model.lm_head.trained()["weight"], before, atol=1e-3)
    halfbyte.merge(run.path, tmp_path / "merged")
    full = train_adapter(
        stories,
        tmp_path,
        "full",
        max_steps=3,
        full=True,
        load_in_4bit=False,
        tie_word_embeddings=False,
    )
    again = LlamaForCausalLM.from_pretrained(full.adapter)
    assert not torch.equal(again.lm_head.weight, again.get_input_embeddings().weight)


def test_an_adapter_of_the_head_is_not_trained_in_silence(stories: Path):
    with pytest.raises(UsageError, match="the output head"):
        lora.target_names(LlamaForCausalLM.from_pretrained(stories), "q_proj,lm_head")


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
    perturb_zeros(theirs)
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
    whole = train_adapter(stories, tmp_path, "whole", max_steps=6, **options)
    again = {**options, "save_steps": 3, "max_steps": 6}
    cut = tmp_path / "cut"

    def stop(row: dict[str, Any], total: int) -> None:
        if row["step"] == 4:
            raise KeyboardInterrupt

    from halfbyte.progress import Reporter

    with pytest.raises(KeyboardInterrupt):
        train_adapter(stories, tmp_path, "cut", reporter=Reporter(on_step=stop), **again)
    resumed = train_adapter(
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


@pytest.mark.parametrize(
    "key,value",
    [
        ("r", None),
        ("lora_alpha", -2.5),
        ("r", 2.5),
        ("rank_pattern", {"(": 2}),
        ("lora_dropout", "x"),
    ],
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
    run = train_adapter(base, tmp_path, "run", max_steps=2, **options)
    receipt = halfbyte.merge(run.path, tmp_path / "merged")
    assert receipt.greedy_agreement == 1.0
    merged = Checkpoint(tmp_path / "merged")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(merged.read(name), tensors[name])
    assert torch.equal(merged.read("model.layers.0.self_attn.rotary_emb.inv_freq"), torch.ones(4))


def test_an_adapter_of_a_base_with_added_tokens(tmp_path: Path):
    """PEFT writes embeddings that were resized under three names; on the base they were resized
    from they do not fit, and the way out says which base does."""
    place = hub.resolve("demo")
    base = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(place)
    tokenizer.add_tokens(["<new1>", "<new2>"])
    base.resize_token_embeddings(len(tokenizer))
    base.save_pretrained(tmp_path / "resized")
    tokenizer.save_pretrained(tmp_path / "resized")
    whole = ["embed_tokens", "lm_head"]
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=whole, task_type="CAUSAL_LM"
    )
    theirs: Any = peft.get_peft_model(base, config).eval()
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    with pytest.raises(ModelError, match="does not fit") as caught:
        halfbyte.load(tmp_path / "adapter", base=str(place), load_in_4bit=False)
    assert f"resize_token_embeddings({len(tokenizer)})" in caught.value.ways_out[0]
    model, _ = halfbyte.load(
        tmp_path / "adapter", base=str(tmp_path / "resized"), load_in_4bit=False, dtype="float32"
    )
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(
        model(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )


def test_a_layer_of_a_list_is_no_other_that_is_numbered():
    """Gemma 3n's projections are called 0, 1, 2, as its decoder layers are, and PEFT reads ends of
    names; coefficients that its blocks clamp by themselves stay as they are."""
    kinds = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model(
        "gemma3n_text",
        **{**SIZES, "num_hidden_layers": 4},
        num_kv_shared_layers=1,
        laurel_rank=4,
        altup_num_inputs=2,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        sliding_window=16,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=2 * kinds,
    )
    model = build_empty(config)
    names = adaptable(model)
    assert not any("coefs" in name for name in names)
    adapted = peft_files.shortest_targets(model, names)
    found = [n for n, _ in model.named_modules() if any(ends_with(n, name) for name in adapted)]
    assert sorted(found) == sorted(names)
    assert "0" not in adapted and any(name.endswith("altup_projections.0") for name in adapted)

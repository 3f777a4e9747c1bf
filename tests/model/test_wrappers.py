"""Text models inside wrappers with a vision tower: beside transformers' and PEFT's own."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor

import halfbyte
from halfbyte.adapters.lora import target_names
from halfbyte.config.options import ModelOptions
from halfbyte.errors import DataError, ModelError
from halfbyte.files import hub
from halfbyte.files.model_config import read_config
from halfbyte.model.architecture import build_empty
from halfbyte.model.targets import adaptable, quantizable
from halfbyte.model.wrappers import left_out, unread
from halfbyte.planning.plan import plan
from halfbyte.progress import no_progress
from halfbyte.quantization.load import load_base
from halfbyte.quantization.tensor import NF4Tensor
from halfbyte.quantization.writer import quantize
from halfbyte.run.load import load

from ..helpers import SIZES, give_tokenizer, logits, train_adapter

IMAGES = {"image_token_id": 3000, "video_token_id": 3001}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "num_heads": 2,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}


def _config(kind: str) -> Any:
    match kind:
        case "qwen3_vl":
            rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
            text = {**SIZES, "rope_parameters": {**rope, "mrope_interleaved": True}}
            vision = {**QWEN_VISION, "deepstack_visual_indexes": [0]}
            return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **IMAGES)
        case "qwen3_5":
            text = {**SIZES, **LINEAR_ATTENTION}
            return transformers.Qwen3_5Config(text_config=text, vision_config=QWEN_VISION, **IMAGES)
        case "gemma3":
            text = {
                **SIZES,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            }
            return transformers.Gemma3Config(
                text_config=text,
                vision_config=VISION,
                mm_tokens_per_image=4,
                image_token_index=3000,
            )
        case "mistral3":
            return transformers.Mistral3Config(
                text_config=transformers.MistralConfig(**SIZES, sliding_window=None),
                vision_config=transformers.PixtralVisionConfig(**VISION),
                image_token_index=3000,
            )
        case _:
            raise ValueError(kind)


def _checkpoint(kind: str, home: Path) -> Path:
    path = home / kind
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForImageTextToText.from_config(_config(kind))
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.08)
    model.save_pretrained(path)
    give_tokenizer(path)
    (path / "preprocessor_config.json").write_text('{"size": 28}')
    return path


def _in_the_files_names(model: Any) -> dict[str, Tensor]:
    """What a model of ours computes with, by names below its text model."""
    found = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        data = p.data.dequantize(torch.float32) if isinstance(p.data, NF4Tensor) else p.data
        found[name.replace("model.language_model.", "").removeprefix("model.")] = data
    return found


def _twin(kind: Any, path: Path, ours: Any) -> Any:
    """transformers' model with the weights that 4 bits hold."""
    held = _in_the_files_names(ours)
    theirs = kind.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            key = name.replace("model.language_model.", "").removeprefix("model.")
            if key in held and not any(t in name for t in ("vision", "visual", "projector")):
                p.copy_(held[key])
    return theirs


AUTOMATIC = {
    "qwen3_vl": (transformers.AutoModelForImageTextToText,),
    "qwen3_5": (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM),
    "gemma3": (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM),
    "mistral3": (transformers.AutoModelForImageTextToText,),
}
QUICK = {"max_steps": 2, "judge": False, "rehearse": False}
SLOW = ("gemma3", "mistral3")


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in AUTOMATIC],
)
def test_a_wrapper_trains_as_a_text_model_and_every_class_opens_what_comes_out(
    kind: str, tmp_path: Path
):
    path = _checkpoint(kind, tmp_path)
    run = train_adapter(path, tmp_path, "run", dtype="float32", **QUICK)
    ours, _ = load(run.path, dtype="float32")
    expected = logits(ours)
    for automatic in AUTOMATIC[kind]:
        theirs = _twin(automatic, path, ours)
        before = logits(theirs)
        adapted: Any = peft.PeftModel.from_pretrained(theirs, str(run.adapter))
        found = logits(adapted)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert (found - before).abs().max() > 100 * (found - expected).abs().max()
    halfbyte.merge(run.path, tmp_path / "merged", onto="trained")
    merged: Any = AUTOMATIC[kind][0].from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged) - expected).abs().max() <= 1e-4 * expected.abs().max()
    # towers byte for byte, nothing lost, and what prepares images beside them
    with (
        safe_open(path / "model.safetensors", "pt") as base,
        safe_open(tmp_path / "merged" / "model.safetensors", "pt") as result,
    ):
        names = list(base.keys())
        assert sorted(names) == sorted(result.keys())
        towers = [n for n in names if any(t in n for t in ("vision", "visual", "projector"))]
        assert towers
        assert all(torch.equal(base.get_tensor(n), result.get_tensor(n)) for n in towers)
    assert (tmp_path / "merged" / "preprocessor_config.json").read_text() == '{"size": 28}'


def test_a_tower_is_not_built_not_counted_and_not_adapted(tmp_path: Path):
    path = _checkpoint("gemma3", tmp_path)
    model = build_empty(read_config(path))
    assert set(unread(model)) == {"model.vision_tower", "model.multi_modal_projector"}
    assert all(".language_model." in name for name in quantizable(model))
    assert all(".language_model." in name for name in adaptable(model))
    assert "SiglipVisionModel" in left_out(model)
    loaded, report = load_base(hub.resolve(str(path)), ModelOptions(dtype="float32"))
    assert report.coverage == 1.0
    planned = plan(str(path), max_length=64)
    own = sum(p.numel() for p in loaded.parameters())
    assert planned.parameters - planned.lora_parameters == own


def test_an_adapter_that_was_trained_on_the_other_class_is_opened(tmp_path: Path):
    """PEFT's on the text class, on the wrapper it stands in."""
    path = _checkpoint("qwen3_5", tmp_path)
    theirs: Any = transformers.AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32
    )
    torch.manual_seed(1)
    adapted: Any = peft.get_peft_model(
        theirs, peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    ours, _ = load(tmp_path / "adapter", base=str(path), dtype="float32", load_in_4bit=False)
    assert (logits(ours) - logits(adapted)).abs().max() <= 1e-4


def test_rows_with_images_are_refused_by_name(tmp_path: Path):
    path = _checkpoint("qwen3_vl", tmp_path)
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    with pytest.raises(DataError, match="image"):
        halfbyte.train(
            model=str(path), data=str(tmp_path / "rows.jsonl"), output_dir=str(tmp_path / "run")
        )


def test_a_head_inside_the_text_model_is_refused_by_name():
    text = {**SIZES, "num_local_experts": 4, "intermediate_size_mlp": 128, "no_rope_layers": [1, 0]}
    vision = {**VISION, "vision_output_dim": 64, "projector_input_dim": 64}
    config = transformers.Llama4Config(
        text_config=text, vision_config={**vision, "intermediate_size": 128}
    )
    with pytest.raises(ModelError, match="output head inside its text model"):
        build_empty(config)


def test_an_adapter_of_a_tower_is_refused_by_the_name_it_has(tmp_path: Path):
    path = _checkpoint("qwen3_vl", tmp_path)
    theirs: Any = transformers.AutoModelForImageTextToText.from_pretrained(path)
    adapted: Any = peft.get_peft_model(theirs, peft.LoraConfig(target_modules=["qkv", "q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ModelError, match=r"adapts model\.visual\.blocks\.0\.attn\.qkv"):
        load(tmp_path / "adapter", base=str(path), load_in_4bit=False)


@pytest.mark.parametrize("kind", ["qwen3_5", "gemma3"])
def test_patterns_are_taken_by_the_paths_of_either_class(kind: str, tmp_path: Path):
    model = build_empty(_config(kind))
    found = [
        target_names(model, pattern + r".*\.mlp\.(gate|up|down)_proj")
        for pattern in (r"model\.language_model\.layers", r"model\.layers")
    ]
    assert found[0] == found[1] and len(found[0]) == 6


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_vl"])
def test_towers_stay_in_16_bits_in_a_quantized_model_that_others_open(kind: str, tmp_path: Path):
    path = _checkpoint(kind, tmp_path)
    quantize(path, ModelOptions(), tmp_path / "made", no_progress)
    theirs, before = (
        transformers.AutoModelForImageTextToText.from_pretrained(place).model.visual
        for place in (tmp_path / "made", path)
    )
    expected = dict(before.named_parameters())
    for name, p in theirs.named_parameters():
        assert torch.equal(p.float(), expected[name].to(p.dtype).float()), name

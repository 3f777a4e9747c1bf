"""Configuration objects of transformers, PEFT and TRL where ours are wanted; real ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.config.build import build
from halfbyte.config.hf_objects import config_of, options_of
from halfbyte.config.options import TrainConfig
from halfbyte.engine.lr_schedule import warmup_steps
from halfbyte.errors import DoesNotFit, UsageError

peft: Any = pytest.importorskip("peft")


trl: Any = pytest.importorskip("trl")


def four_bit(**settings: Any) -> Any:
    from transformers import BitsAndBytesConfig

    given = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    return BitsAndBytesConfig(**{**given, **settings})


def sft(**settings: Any) -> Any:
    return trl.SFTConfig("out", **{"use_cpu": True, "report_to": [], **settings})


def test_the_articles_objects_say_what_they_say():
    lora = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules="all-linear",
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    args = sft(
        num_train_epochs=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=16,
        learning_rate=2e-4,
        bf16=True,
        gradient_checkpointing=True,
        optim="paged_adamw_8bit",
        logging_steps=10,
        save_strategy="steps",
        save_steps=100,
        max_length=512,
    )
    config = config_of(
        TrainConfig,
        ("model", "rows.jsonl", four_bit(bnb_4bit_use_double_quant=True), lora, args),
        {},
    )
    ours = TrainConfig(
        model="model",
        data="rows.jsonl",
        output_dir="out",
        max_length=512,
        dtype="bfloat16",
        logging_steps=10,
        warmup_steps=0,
        warmup_ratio=0.0,
        assistant_only_loss=False,
        device="cpu",
        activation_offloading="never",
        eval_split=0,
    )
    assert config.model_dump() == ours.model_dump()


def test_what_peft_trains_as_copies_is_not_tied():
    """Unless it is told to keep ties; what has no such module stays as its model has it."""
    for named, kept, tied in (
        (["lm_head"], False, False),
        (["embed_tokens", "lm_head"], False, False),
        (["embed_tokens", "lm_head"], True, True),
        (["norm"], False, True),
        (None, False, True),
    ):
        lora = peft.LoraConfig(
            r=4, target_modules="all-linear", modules_to_save=named, ensure_weight_tying=kept
        )
        config = config_of(TrainConfig, ("model", "rows.jsonl", lora), {})
        assert config.tie_word_embeddings is tied, named


def test_every_setting_is_taken_or_refused():
    assert options_of((four_bit(bnb_4bit_quant_type="fp4"),), ())["bnb_4bit_quant_type"] == "fp4"
    assert options_of((four_bit(), sft(fp16=False, bf16=True)), ())["dtype"] == "bfloat16"
    lora = peft.LoraConfig(
        r=4,
        target_modules=["v_proj", "q_proj"],
        use_rslora=True,
        use_dora=True,
        modules_to_save=["lm_head"],
        rank_pattern={"v_proj": 2},
    )
    found = options_of((lora,), ())
    assert found["target_modules"] == "q_proj,v_proj" and found["use_rslora"] and found["use_dora"]
    assert found["modules_to_save"] == "lm_head" and found["rank_pattern"] == {"v_proj": 2}
    args = sft(
        warmup_steps=0.1,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
        save_steps=0.5,
        max_steps=7,
    )
    found = options_of((args,), ())
    assert (found["warmup_ratio"], found["lr_scheduler_type"], found["optim"]) == (
        0.1,
        "cosine",
        "adamw_torch",
    )
    assert "save_steps" not in found and found["max_steps"] == 7
    found = options_of((sft(max_length=None, lr_scheduler_type="constant", warmup_steps=9),), ())
    assert found["max_length"] > 10**6
    config = build(TrainConfig, {"model": "m", "data": "d", **found})
    assert warmup_steps(config, 100) == 0, "its schedule has none"
    for things, what in (
        ((peft.LoraConfig(target_modules="all-linear", bias="all"),), "bias"),
        ((peft.LoraConfig(target_modules="all-linear", init_lora_weights="pissa"),), "pissa"),
        ((peft.LoraConfig(target_modules="all-linear", inference_mode=True),), "inference_mode"),
        ((peft.LoraConfig(),), "target_modules"),
        ((sft(neftune_noise_alpha=5.0),), "neftune"),
        ((sft(optim="sgd"),), "sgd"),
        ((sft(dataloader_drop_last=True),), "dataloader_drop_last"),
        ((sft(train_sampling_strategy="group_by_length"),), "train_sampling_strategy"),
        ((sft(dataset_text_field="content"),), "dataset_text_field"),
        ((sft(router_aux_loss_coef=0.01),), "router_aux_loss_coef"),
        ((sft(packing=True, packing_strategy="wrapped"),), "packing_strategy"),
        ((peft.LoraConfig(target_modules="all-linear", kasa_config=peft.KasaConfig()),), "kasa"),
        ((four_bit(llm_int8_skip_modules=["q_proj"]),), "q_proj"),
        ((four_bit(llm_int8_skip_modules=[]),), "llm_int8_skip_modules []"),
        ((peft.LoHaConfig(),), "LoHaConfig"),
        ((peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"),), "SEQ_CLS"),
        ((trl.RewardConfig("out", use_cpu=True, report_to=[]),), "RewardConfig"),
        ((sft(model_init_kwargs={"revision": "x"}),), "model_init_kwargs"),
        (("a", "b", "c"), "one name too many"),
    ):
        with pytest.raises(UsageError) as caught:
            options_of(things)
        assert what in f"{caught.value.what} {caught.value.found}", what


def test_a_setting_of_a_trainer_that_nothing_knows_is_refused_where_it_is_set():
    """Those that a class made from it adds were read by none, in silence."""

    class Arguments(trl.SFTConfig):
        def __init__(self, embedding_learning_rate: float | None = None, **options):
            super().__init__("out", use_cpu=True, bf16=False, report_to=[], **options)
            self.embedding_learning_rate = embedding_learning_rate

    assert options_of((Arguments(learning_rate=3e-4),), ())["learning_rate"] == 3e-4
    with pytest.raises(UsageError) as caught:
        options_of((Arguments(embedding_learning_rate=1e-5),), ())
    assert "embedding_learning_rate=1e-05" in caught.value.found


def test_plan_train_and_load_take_them(stories: Path, tmp_path: Path):
    plan = halfbyte.plan(str(stories), four_bit(), max_length=512)
    assert plan.fits and plan.check() is None
    with pytest.raises(DoesNotFit):
        halfbyte.plan(str(stories), four_bit(), fit_to="1MiB").check()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "\n".join(json.dumps({"prompt": "a", "completion": f" b{i}"}) for i in range(4))
    )
    args = trl.SFTConfig(str(tmp_path / "run"), max_steps=1, use_cpu=True, report_to=[], bf16=True)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    run = halfbyte.train(stories, rows, four_bit(), lora, args, num_samples=0)
    assert (run.config().lora_r, run.config().dtype, run.config().bnb_4bit_use_double_quant) == (
        2,
        "bfloat16",
        False,
    )
    ours = TrainConfig(model=str(stories), data="", max_length=256)
    assert halfbyte.plan(ours).fits and not halfbyte.plan(ours, fit_to="1MiB").fits
    assert config_of(TrainConfig, (ours, lora), {"max_steps": 3}).lora_r == 2
    with pytest.raises(UsageError, match="BitsAndBytesConfig"):
        halfbyte.load(stories, lora)
    model, _ = halfbyte.load(stories, four_bit(bnb_4bit_quant_type="fp4"))
    assert model.model.layers[0].mlp.up_proj.weight.quant_type == "fp4"

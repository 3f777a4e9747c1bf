"""The main job in process: splits, checkpointing, packing and resume change nothing; other tools
load the results."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
)

import halfbyte
from halfbyte import nf4
from halfbyte.adapters.lora import AdapterConfig, lora_layers
from halfbyte.config.build import build
from halfbyte.config.options import ModelOptions, TrainConfig
from halfbyte.data.batches import collate
from halfbyte.engine.learner import Learner
from halfbyte.engine.selftest import Abilities
from halfbyte.errors import (
    BusyError,
    Interrupted,
    ModelError,
    NonFiniteError,
    StorageError,
    UsageError,
    VerificationError,
)
from halfbyte.files import hub
from halfbyte.files.safetensors import INDEX
from halfbyte.memory.recompute import KEEPS
from halfbyte.model.attention import packed
from halfbyte.ops import cpu
from halfbyte.progress import Reporter
from halfbyte.quantization.load import load_base
from halfbyte.run import checkpoint
from halfbyte.run.directory import Run
from halfbyte.training.setup import build_learner, read_rows
from halfbyte.training.step import stepper_for

from ..helpers import reliable_options


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


TALKS = [
    ("What is two and two?", "Four."),
    ("Name a colour.", "Blue is one."),
    ("Say hello.", "Hello, my friend!"),
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"prompt": f"{q} {i}\n", "completion": f"{a} {i}"})
        for i in range(6)
        for q, a in TALKS
    ]
    path.write_text("\n".join(lines))
    return path


def options(base: Path, rows: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(base),
        "data": str(rows),
        "output_dir": str(out),
        "dtype": "float32",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 4,
        "learning_rate": 5e-3,
        "lora_r": 8,
        **changes,
    }


def digest(run: Run) -> str:
    return hashlib.sha256((run.adapter / "adapter_model.safetensors").read_bytes()).hexdigest()


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.adapter / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def trained(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run that several tests look at."""
    home = tmp_path_factory.mktemp("trained")
    path = home / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"instruction": q, "output": a}) for q, a in TALKS * 4))
    return halfbyte.train(**options(stories, path, home / "run", max_steps=8))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_kept_does_not_change_a_bit(stories: Path, rows: Path, tmp_path: Path, dtype: str):
    """With dropout, in every setting, and where a resumed run keeps something else than it did
    before."""
    settings = {"lora_dropout": 0.1, "dtype": dtype, "save_steps": 2}
    whole = halfbyte.train(
        **options(stories, rows, tmp_path / "whole", gradient_checkpointing=False, **settings)
    )
    for keep in KEEPS:
        run = halfbyte.train(
            **options(stories, rows, tmp_path / keep, kept_activations=keep, **settings)
        )
        assert digest(run) == digest(whole), keep
    assert "kept activations: all" in run.info()["found"]["recomputed"]
    if cpu.paths():
        assert run.info()["found"]["fused"] == "fused: 11 norms, 5 MLPs, 5 rotary embeddings"
    last = checkpoint.newest(run.checkpoints)[0]
    assert last is not None
    shutil.rmtree(last.path)
    shutil.rmtree(run.adapter)
    changed = options(stories, rows, run.path, kept_activations="none", **settings)
    assert digest(halfbyte.train(**changed, resume_from_checkpoint="auto")) == digest(whole)


@pytest.mark.slow
def test_any_split_into_micro_batches_is_the_same_training(
    stories: Path, rows: Path, tmp_path: Path
):
    """Without dropout; sums in another order: fp32 rounding, grown over two steps of AdamW."""
    runs = []
    for batch, accumulation in ((6, 1), (1, 6), (3, 2)):
        changes = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
        }
        settings = options(
            stories, rows, tmp_path / f"{batch}", lora_dropout=0.0, max_steps=2, **changes
        )
        runs.append(halfbyte.train(**settings))
    for other in runs[1:]:
        for a, b in zip(runs[0].metrics(), other.metrics(), strict=True):
            assert a["tokens"] == b["tokens"] and a["supervised_tokens"] == b["supervised_tokens"]
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_checkpointed_equals_not(stories: Path, rows: Path, tmp_path: Path):
    """Recomputation repeats the same bits, dropout masks included."""
    plain = halfbyte.train(**options(stories, rows, tmp_path / "a", gradient_checkpointing=False))
    saved = halfbyte.train(**options(stories, rows, tmp_path / "b", gradient_checkpointing=True))
    assert digest(plain) == digest(saved)


def test_a_packed_step_equals_rows_run_alone(stories: Path, rows: Path, tmp_path: Path):
    """The same rows in one sequence, or one by one through the fallback: loss and gradients within
    fp32 rounding."""
    results = []
    for packing in (True, False):
        config = TrainConfig(**options(stories, rows, tmp_path, lora_dropout=0.0))
        data = read_rows(config, stories, Reporter()).train
        stepper = stepper_for(config, stories, Run(tmp_path))
        stepper.learner.abilities = Abilities(packing, True, 0.0, 0.0)
        batch = [collate(data.rows, range(5)), collate(data.rows, range(5, 8))]
        with packed(stepper.learner.model, packing):
            row = stepper.run(0, batch)
        results.append((row["loss"], row["grad_norm"]))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"packing": True, "max_length": 128},
        pytest.param({"optim": "adamw_torch"}, marks=pytest.mark.slow),
    ],
)
def test_resumed_equals_unbroken(
    stories: Path, rows: Path, tmp_path: Path, changes: dict[str, Any]
):
    """Stopped after step 3 of 8, across an epoch, with dropout: equal adapter and optimizer, each
    step logged once."""
    common = {"max_steps": 8, "save_steps": 3, "save_total_limit": 9, **changes}
    straight = halfbyte.train(**options(stories, rows, tmp_path / "straight", **common))
    broken = tmp_path / "broken"

    def stop(row: dict[str, Any], total: int) -> None:
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        halfbyte.train(
            TrainConfig(**options(stories, rows, broken, **common)), reporter=Reporter(on_step=stop)
        )
    again = options(stories, rows, broken, resume_from_checkpoint="auto", **common)
    resumed = halfbyte.train(**again)
    assert digest(straight) == digest(resumed)
    last = "checkpoints/step-00000008/optimizer.safetensors"
    assert (straight.path / last).read_bytes() == (resumed.path / last).read_bytes()
    assert [row["step"] for row in resumed.metrics()] == list(range(1, 9))
    assert [r["loss"] for r in resumed.metrics()] == [r["loss"] for r in straight.metrics()]
    before = digest(resumed)
    assert digest(halfbyte.train(**again)) == before, "a finished run resumed trains no further"


@pytest.mark.slow
def test_resumed_equals_unbroken_at_every_step(stories: Path, rows: Path, tmp_path: Path):
    """Packing, accumulation 3, dropout, two epochs: a stop after any step leads to the same
    bytes."""
    common = {
        "max_steps": 8,
        "save_steps": 1,
        "packing": True,
        "max_length": 128,
        "save_total_limit": 9,
    }
    straight = halfbyte.train(**options(stories, rows, tmp_path / "straight", **common))
    for last in range(1, 8):
        broken = tmp_path / f"broken{last}"
        shutil.copytree(straight.path, broken)
        shutil.rmtree(broken / "adapter")
        for step in range(last + 1, 9):
            shutil.rmtree(broken / f"checkpoints/step-{step:08d}")
        again = options(stories, rows, broken, resume_from_checkpoint="auto", **common)
        assert digest(halfbyte.train(**again)) == digest(straight), last


def test_resume_refuses_another_training(stories: Path, rows: Path, tmp_path: Path):
    halfbyte.train(**options(stories, rows, tmp_path / "run", max_steps=1))
    with pytest.raises(ModelError, match="another training") as caught:
        halfbyte.train(
            **options(
                stories,
                rows,
                tmp_path / "run",
                max_steps=1,
                learning_rate=1.0,
                resume_from_checkpoint="auto",
            )
        )
    assert "learning_rate: 0.005 then, 1.0 now" in caught.value.found
    with pytest.raises(BusyError, match="already holds a run"):
        halfbyte.train(**options(stories, rows, tmp_path / "run", max_steps=1))


def test_a_command_that_failed_early_can_be_mended_and_repeated(
    stories: Path, rows: Path, tmp_path: Path
):
    with pytest.raises(UsageError, match="is no module"):
        halfbyte.train(**options(stories, rows, tmp_path, modules_to_save="nothing"))
    assert not (tmp_path / "adapter").exists()
    halfbyte.train(**options(stories, rows, tmp_path, max_steps=1))


def test_damaged_checkpoints_do_not_count(stories: Path, rows: Path, tmp_path: Path):
    run = halfbyte.train(**options(stories, rows, tmp_path / "run", max_steps=4, save_steps=2))
    newest = run.checkpoints / "step-00000004"
    data = bytearray((newest / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "adapter_model.safetensors").write_bytes(bytes(data))
    found, damaged = checkpoint.newest(run.checkpoints)
    assert found is not None and found.step == 2
    assert len(damaged) == 1 and "step-00000004/adapter_model.safetensors" in damaged[0]


def test_a_signal_saves_and_leaves(stories: Path, rows: Path, tmp_path: Path):
    import os
    import signal

    def hang_up(row: dict[str, Any], total: int) -> None:
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    config = TrainConfig(**options(stories, rows, tmp_path / "run", max_steps=6))
    with pytest.raises(Interrupted) as caught:
        halfbyte.train(config, reporter=Reporter(on_step=hang_up))
    assert caught.value.exit_code == 143
    found, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert found is not None and found.step == 2


def test_a_second_trainer_is_turned_away(tmp_path: Path):
    run = Run(tmp_path)
    with run.locked(), pytest.raises(BusyError, match="another process") as caught, run.locked():
        pass
    assert "pid" in caught.value.found
    with run.locked():
        pass


def test_a_rate_that_no_model_survives_ends_with_the_rows(
    stories: Path, rows: Path, tmp_path: Path
):
    with pytest.raises(NonFiniteError, match="made parameters infinite") as caught:
        halfbyte.train(
            **options(
                stories, rows, tmp_path / "run", learning_rate=1e30, max_steps=50, warmup_ratio=0.0
            )
        )
    assert "rows.jsonl:" in caught.value.where


def test_full_fine_tuning_is_the_reference(stories: Path, rows: Path, tmp_path: Path):
    run = halfbyte.train(
        **options(
            stories,
            rows,
            tmp_path / "run",
            full=True,
            load_in_4bit=False,
            max_steps=6,
            learning_rate=1e-3,
        )
    )
    losses = [row["loss"] for row in run.metrics()]
    assert losses[-1] < losses[0]
    model, tokenizer = halfbyte.load(run.path)
    theirs = AutoModelForCausalLM.from_pretrained(run.adapter)
    ids = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, theirs(input_ids=ids).logits)


def probe(tokenizer: Any) -> torch.Tensor:
    return torch.tensor(
        [
            tokenizer("Once upon a time, there was a big dog. It said: what is two and two?")[
                "input_ids"
            ]
        ]
    )


def test_loss_falls_and_the_run_directory_is_complete(trained: Run):
    losses = [row["loss"] for row in trained.metrics()]
    assert losses[-1] < losses[0] - 0.3
    names = {path.name for path in trained.path.iterdir()}
    assert {"LOCK", "run.json", "metrics.jsonl", "quant.json", "checkpoints", "adapter"} <= names
    assert set(trained.metrics()[0]) >= {
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_s",
        "memory_bytes",
    }
    quant = json.loads((trained.path / "quant.json").read_text())
    assert quant["coverage"] == 1.0 and all(
        0.003 < t["relative_mse"] < 0.02 for t in quant["tensors"]
    )


@torch.no_grad()
def test_peft_gives_our_logits(trained: Run, stories: Path):
    """On the same unquantized base in fp32: within 1e-4."""
    ours, tokenizer = halfbyte.load(trained.path, load_in_4bit=False)
    base = AutoModelForCausalLM.from_pretrained(stories)
    theirs = peft.PeftModel.from_pretrained(base, str(trained.adapter)).eval()
    ids = probe(tokenizer)
    torch.testing.assert_close(
        ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=1e-4
    )


@torch.no_grad()
@pytest.mark.parametrize("onto", ["trained", "original"])
def test_merged_models_give_our_logits(trained: Run, tmp_path: Path, onto: str):
    receipt = halfbyte.merge(trained.path, tmp_path / "merged", onto=onto)
    assert receipt.kl < 1e-6 and receipt.greedy_agreement > 0.99
    ours, tokenizer = halfbyte.load(trained.path, load_in_4bit=onto == "trained")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = probe(tokenizer)
    torch.testing.assert_close(
        ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=1e-4
    )
    assert hub.load_tokenizer(tmp_path / "merged").chat_template


def test_a_spoiled_merge_is_refused(trained: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from halfbyte.adapters.lora import LoraLinear

    honest = LoraLinear.merged
    monkeypatch.setattr(
        LoraLinear,
        "merged",
        lambda self, weight, dtype: (2 * weight.float() - honest(self, weight)).to(dtype),
    )
    with pytest.raises(VerificationError, match="not the adapter on its base"):
        halfbyte.merge(trained.path, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@torch.no_grad()
def test_a_bitsandbytes_checkpoint_opens_bit_for_bit(stories: Path, tmp_path: Path):
    """Written by transformers + bitsandbytes, sharded; the same bytes here, and the same logits in
    fp32."""
    q = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        stories, quantization_config=q, device_map={"": "cpu"}, dtype=torch.float32
    )
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    shutil.copy(stories / "tokenizer.json", tmp_path)
    shutil.copy(stories / "tokenizer_config.json", tmp_path)
    assert (tmp_path / INDEX).exists()
    ours, report = load_base(tmp_path, ModelOptions(dtype="float32"))
    assert report.coverage == 1.0
    for name, module in theirs.named_modules():
        weight = ours.get_parameter(f"{name}.weight") if hasattr(module, "weight") else None
        if isinstance(weight, nf4.NF4Tensor):
            state: Any = module.weight.quant_state
            assert torch.equal(weight.packed, module.weight.data.view(-1)), name
            assert torch.equal(weight.absmax, state.absmax), name
    ids = torch.randint(3, 500, (1, 24), generator=torch.Generator().manual_seed(0))
    theirs.train()  # their evaluation path computes in bf16
    torch.testing.assert_close(
        ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=0, atol=1e-4
    )


def test_an_unwritable_output_is_found_first(stories: Path, rows: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write to"):
        halfbyte.train(**options(stories, rows, tmp_path / "file" / "run"))


def test_train_evaluate_train(stories: Path, rows: Path, tmp_path: Path):
    """Gradients after an evaluation equal those before it, bit for bit, on a whole model."""
    model, _ = load_base(stories, ModelOptions(dtype="float32"))
    from halfbyte.adapters.lora import attach_lora

    attach_lora(model, AdapterConfig(4, 8, 0.1))
    ids = torch.arange(3, 40)[None]

    def gradients() -> list[torch.Tensor]:
        model.train()
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [
            layer.lora_B.grad.clone()
            for _, layer in lora_layers(model)
            if layer.lora_B.grad is not None
        ]

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    assert len(before) == 35 and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.slow
def test_fp16_keeps_small_gradients_and_loses_no_step(stories: Path, rows: Path, tmp_path: Path):
    """As on a card without bf16: a scale too large is halved for the same rows, and is in the log;
    a resume goes on with it, to the same bytes; the losses are those of fp32."""
    from halfbyte.engine.learner import LossScale

    common: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 2,
        "lora_dropout": 0.1,
        "num_samples": 0,
    }
    exact = halfbyte.train(**options(stories, rows, tmp_path / "fp32", dtype="float32", **common))
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossScale.__init__, "__defaults__", (2.0**24, 0))
        settings = options(stories, rows, tmp_path / "fp16", dtype="float16", **common)
        run = halfbyte.train(TrainConfig(**settings), Reporter(say=said.append))
    lines = run.read("metrics.jsonl")
    assert [row["step"] for row in lines] == [1, 2, 3, 4, 5, 6]
    scales = [row["loss_scale"] for row in lines]
    assert scales[0] < 2**24 and sum("overflow in fp16" in line for line in said) == round(
        math.log2(2**24 / scales[-1])
    )
    for mine, theirs in zip(lines, exact.read("metrics.jsonl"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=5e-3)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-2)
        assert "loss_scale" not in theirs
    before = digest(run)
    shutil.rmtree(run.path / "checkpoints" / "step-00000006")
    shutil.rmtree(run.adapter)
    again = halfbyte.train(TrainConfig(**settings, resume_from_checkpoint="auto"))
    assert digest(again) == before
    assert [row["loss_scale"] for row in again.read("metrics.jsonl")] == scales


@pytest.mark.parametrize("option", ["learning_rate", "weight_decay"])
def test_options_are_finite(option: str, tmp_path: Path):
    for value in (float("inf"), "inf", "nan"):
        with pytest.raises(UsageError, match=option):
            build(TrainConfig, {"model": "m", "data": "d", option: value})


def test_parameters_that_became_infinite_are_no_result(reliable_inputs: Path, tmp_path: Path):
    """No checkpoint holds them, and nothing says that it is finished."""
    out = tmp_path / "run"
    with pytest.raises(NonFiniteError, match="made parameters infinite"):
        halfbyte.train(**reliable_options(reliable_inputs, out, weight_decay=1e38))
    assert not (out / "adapter").exists() and not list(out.glob("checkpoints/*"))


def test_a_training_that_skipped_most_steps_is_no_success(
    reliable_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    honest = Learner.clip
    calls = iter(range(100))
    monkeypatch.setattr(
        Learner,
        "clip",
        lambda self: honest(self) * (1.0 if next(calls) < 3 else float("nan")),
    )
    options = reliable_options(reliable_inputs, tmp_path / "run", rehearse=False)
    with pytest.raises(NonFiniteError, match="of 8 steps were not finite") as caught:
        halfbyte.train(**options, on_nonfinite="skip")
    assert caught.value.exit_code == 7 and (tmp_path / "run/adapter").is_dir()


def test_what_is_not_trained_as_elsewhere_is_noted(tmp_path: Path):
    """Losses of routers, and DoRA's dropout: both differed from transformers and PEFT in
    silence."""
    sizes: dict[str, Any] = {"vocab_size": 160, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    moe = GraniteMoeConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)
    moe.output_router_logits, moe.router_aux_loss_coef = True, 0.5
    GraniteMoeForCausalLM(moe).save_pretrained(tmp_path / "moe")
    options = {"model": "m", "data": "d", "output_dir": str(tmp_path), "load_in_4bit": False}
    for dropout, wanted in ((0.1, {"router losses", "DoRA's dropout"}), (0.0, {"router losses"})):
        config = build(TrainConfig, {**options, "use_dora": True, "lora_dropout": dropout})
        notes: dict[str, str] = {}
        build_learner(config, tmp_path / "moe", Reporter(), notes)
        assert notes.keys() & {"router losses", "DoRA's dropout"} == wanted
        assert "router_aux_loss_coef 0.5" in notes["router losses"]

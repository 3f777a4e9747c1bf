"""The main job in process: splits, checkpointing, packing and resume change nothing; other tools
load the results."""

import copy
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import halfbyte
from halfbyte import nf4
from halfbyte.adapters.lora import lora_layers
from halfbyte.config.options import ModelOptions, TrainConfig
from halfbyte.data.batches import collate
from halfbyte.engine.lr_schedule import learning_rate
from halfbyte.engine.selftest import Abilities
from halfbyte.errors import (
    BusyError,
    Interrupted,
    ModelError,
    NonFiniteError,
    StorageError,
    VerificationError,
)
from halfbyte.files import hub
from halfbyte.files.safetensors import INDEX
from halfbyte.memory.recompute import KEEPS
from halfbyte.model import attention
from halfbyte.model.attention import packed
from halfbyte.ops import cpu
from halfbyte.progress import Reporter
from halfbyte.quantization.load import load_base
from halfbyte.run import checkpoint
from halfbyte.run.directory import Run
from halfbyte.training.setup import read_rows
from halfbyte.training.step import stepper_for

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


# --- what must not change the result --------------------------------------------------------------


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
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
    "changes", [{}, {"packing": True, "max_length": 128}, {"optim": "adamw_torch"}]
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
    with pytest.raises(ModelError, match="8-bit AdamW"):
        halfbyte.train(
            **options(stories, rows, tmp_path, full=True, load_in_4bit=False, dtype="bfloat16")
        )
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


def test_non_finite_loss_stops_before_the_update(stories: Path, rows: Path, tmp_path: Path):
    with pytest.raises(NonFiniteError, match="not updated") as caught:
        halfbyte.train(
            **options(
                stories, rows, tmp_path / "run", learning_rate=1e30, max_steps=50, warmup_ratio=0.0
            )
        )
    assert "rows.jsonl:" in caught.value.where


def test_schedules():
    config = TrainConfig(model="m", data="d", learning_rate=1.0, warmup_steps=2)
    assert [learning_rate(config, s, 6) for s in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = config.model_copy(update={"lr_scheduler_type": "cosine"})
    assert learning_rate(cosine, 4, 6) == pytest.approx(0.5)
    constant = config.model_copy(update={"lr_scheduler_type": "constant"})
    assert learning_rate(constant, 5, 6) == 1.0


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


# --- what others load -----------------------------------------------------------------------------


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
    assert receipt.max_logit_difference < 1e-4 and receipt.greedy_agreement > 0.99
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
        LoraLinear, "merged", lambda self, weight: 2 * weight - honest(self, weight)
    )
    with pytest.raises(VerificationError, match="not the model that was trained"):
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


# --- loading: what is refused ---------------------------------------------------------------------


@pytest.fixture
def copy_of_stories(stories: Path, tmp_path: Path) -> Path:
    target = tmp_path / "model"
    shutil.copytree(stories, target)
    for path in (target, *target.iterdir()):
        path.chmod(0o755)
    return target


def edit(model: Path, change: Any) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


FIRST = "model.layers.0.self_attn.q_proj.weight"


def test_every_misfit_in_one_error(copy_of_stories: Path):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["surplus.weight"] = torch.ones(2)
        tensors[FIRST] = torch.ones(3, 3)

    edit(copy_of_stories, spoil)
    with pytest.raises(ModelError, match="do not fit LlamaForCausalLM") as caught:
        load_base(copy_of_stories, ModelOptions())
    for part in ("missing: model.norm.weight", "unexpected: surplus.weight", f"{FIRST}: [3, 3]"):
        assert part in caught.value.found


@pytest.mark.parametrize("name", [FIRST, "model.norm.weight"])
def test_nan_names_tensor_and_file(copy_of_stories: Path, name: str):
    edit(copy_of_stories, lambda tensors: tensors[name].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(ModelError, match=f"{name} is not finite") as caught:
        load_base(copy_of_stories, ModelOptions())
    assert caught.value.where.endswith("model.safetensors") and caught.value.exit_code == 6


def test_truncated_and_damaged_files(copy_of_stories: Path):
    file = copy_of_stories / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1000])
    with pytest.raises(ModelError, match="truncated"):
        load_base(copy_of_stories, ModelOptions())
    for damaged in (
        b"",
        whole[:5],
        b"\xff" * 64,
        whole + b"x",
        whole.replace(b'"F32"', b'"F99"', 1),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match="not an intact safetensors file"):
            load_base(copy_of_stories, ModelOptions())


def test_foreign_code_pickles_and_formats_are_refused(copy_of_stories: Path):
    config = copy_of_stories / "config.json"
    original = json.loads(config.read_text())
    config.write_text(
        json.dumps({**original, "model_type": "mystery", "auto_map": {"AutoConfig": "x.Y"}})
    )
    with pytest.raises(ModelError, match="not a causal language model") as caught:
        load_base(copy_of_stories, ModelOptions())
    assert "never run" in caught.value.found
    config.write_text(
        json.dumps({**original, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )
    with pytest.raises(ModelError, match="format that is not read"):
        load_base(copy_of_stories, ModelOptions())
    config.write_text(json.dumps(original))
    (copy_of_stories / "model.safetensors").rename(copy_of_stories / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickled weights only"):
        load_base(copy_of_stories, ModelOptions())


def test_an_unwritable_output_is_found_first(stories: Path, rows: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write to"):
        halfbyte.train(**options(stories, rows, tmp_path / "file" / "run"))


def test_train_evaluate_train(stories: Path, rows: Path, tmp_path: Path):
    """Gradients after an evaluation equal those before it, bit for bit, on a whole model."""
    model, _ = load_base(stories, ModelOptions(dtype="float32"))
    from halfbyte.adapters.lora import AdapterConfig, attach_lora

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


# --- fp16 -----------------------------------------------------------------------------------------


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


def test_scaled_gradients_are_nearer_than_unscaled_ones(tiny_llama: Any):
    """Gradients so small that fp16 has no number for them, of a loss that is divided by many
    tokens."""
    from halfbyte.data.batches import collate
    from halfbyte.data.renderer import TokenizedExample
    from halfbyte.engine.learner import Learner
    from halfbyte.engine.selftest import Abilities

    found = []
    for dtype, scale in ((torch.float32, 1.0), (torch.float16, 1.0), (torch.float16, 65536.0)):
        model = copy.deepcopy(tiny_llama).to(dtype)
        model.config.dtype = dtype
        config = TrainConfig(
            model="m", data="d", load_in_4bit=False, lora_dropout=0.0, gradient_checkpointing=False
        )
        learner = Learner(model, config, Abilities(True, True, 0.0, 0.0), lambda what, line: None)
        learner.scale.value = scale
        batch = collate([TokenizedExample("row", list(range(20)), [True] * 20)], [0])
        with attention.packed(model):
            learner.accumulate(batch, 3_000_000, 0, 0)
        learner.config = config.model_copy(update={"max_grad_norm": 0.0})
        learner.clip()
        found.append(torch.cat([buffer.double() for buffer in learner.gradients]))
    exact, unscaled, scaled = found
    assert (scaled - exact).norm() < 0.01 * exact.norm() < 0.2 * (unscaled - exact).norm()

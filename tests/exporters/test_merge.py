"""The merge's receipt, what requantizing erases, and the cards that tell of it."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import halfbyte
from halfbyte.adapters.lora import AdapterConfig, DropoutClock, LoraLinear
from halfbyte.cli import run as cli
from halfbyte.config.options import ModelOptions
from halfbyte.errors import StorageError, UsageError, VerificationError
from halfbyte.exporters.merge import surviving_share
from halfbyte.files.safetensors import read_header
from halfbyte.quantization.bnb_format import quantized_names
from halfbyte.quantization.tensor import quantize
from halfbyte.run.directory import Run


@pytest.mark.slow
def test_a_run_on_an_unquantized_or_a_4_bit_base_merges_too(trained_run: Run, tmp_path: Path):
    """Requantized it is in 4 bits, whatever it was trained on; a 4-bit base held in 16 bits merges
    as it is stored."""
    data = trained_run.info()["data"]["source"]
    assert cli(["quantize", "demo", "-o", str(tmp_path / "q")]) == 0
    assert cli(["quantize", str(tmp_path / "q"), "-o", str(tmp_path / "again")]) == 2, (
        "it is in 4 bits already"
    )
    options: dict[str, Any] = {
        "max_steps": 2,
        "num_samples": 0,
        "load_in_4bit": False,
        "data": data,
    }
    for model in ("demo", str(tmp_path / "q")):
        out = tmp_path / model.rpartition("/")[2]
        out = out.with_name(f"{out.name}-run")
        found = halfbyte.train(
            model=model, output_dir=str(out), rank_pattern={"v_proj": 4}, **options
        )
        card = (found.adapter / "README.md").read_text()
        assert (
            "as it is in 4 bits" not in card
            and "rank_pattern" in card
            and str(tmp_path) not in card
        )
        receipt = halfbyte.merge(out, out.with_name("m"), requantize=True, min_survival=0)
        assert list(receipt.comparisons) == ["trained", "trained, requantized"]
        assert receipt.comparisons["trained, requantized"].kl > receipt.comparisons["trained"].kl
        entries = read_header(out.with_name("m") / "model.safetensors")
        assert quantized_names(set(entries))
        assert str(tmp_path) not in (out.with_name("m") / "README.md").read_text()
        shutil.rmtree(out.with_name("m"))
    with pytest.raises(UsageError, match="matches no adapted layer"):
        halfbyte.train(
            model="demo", output_dir=str(tmp_path / "x"), rank_pattern={"nosuch": 4}, **options
        )


def test_without_room_for_the_other_merge_it_is_not_compared(
    trained_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    module = sys.modules["halfbyte.exporters.merge"]
    honest = module.write_merged

    def write(base: Path, target: Path, model: Any, onto: str, progress: Any) -> None:
        if onto == "original":
            raise StorageError("the disk is full, as the test wants it")
        honest(base, target, model, onto, progress)

    monkeypatch.setattr(module, "write_merged", write)
    said: list[str] = []
    receipt = halfbyte.merge(trained_run.path, tmp_path / "m", say=said.append)
    assert list(receipt.comparisons) == ["trained"] and any("not compared" in line for line in said)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    with pytest.raises(StorageError, match="full"):
        halfbyte.merge(trained_run.path, tmp_path / "o", onto="original")


def test_requantizing_is_refused_with_the_figure_and_done_where_it_is_accepted(
    trained_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(VerificationError, match="erases too much") as caught:
        halfbyte.merge(trained_run.path, tmp_path / "m", requantize=True)
    assert caught.value.exit_code == 8 and "proj" in caught.value.where
    assert not list(tmp_path.iterdir()), "nothing is left"
    command = [
        "merge",
        str(trained_run.path),
        "-o",
        str(tmp_path / "m"),
        "--requantize",
        "--min_survival",
        "0",
        "--json",
    ]
    assert cli(command) == 0
    found = json.loads(capsys.readouterr().out)
    least, middle, most = found["surviving"]
    assert least <= middle <= most < 0.9
    after, before = found["comparisons"]["trained, requantized"], found["comparisons"]["trained"]
    assert after["kl"] > before["kl"] and found["recommended"] == "trained"
    assert "onto trained, requantized (this one)" in (tmp_path / "m/README.md").read_text()
    entries = read_header(tmp_path / "m/model.safetensors")
    assert quantized_names(set(entries)), "it is stored in 4 bits"
    assert "of the adapter's effect survive" in (tmp_path / "m/README.md").read_text()
    model, tokenizer = halfbyte.load(tmp_path / "m")
    assert (
        tokenizer.chat_template
        and torch.isfinite(model(input_ids=torch.arange(9)[None]).logits).all()
    )


@pytest.mark.parametrize("in_4bit", [True, False])
def test_what_survives_rounding(in_4bit: bool):
    """All of a change that is large beside the distance of levels, next to nothing of one that is
    small."""
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    linear = nn.Linear(256, 64, bias=False)
    held = quantize(weight).with_dtype(torch.float32) if in_4bit else weight
    linear.weight = nn.Parameter(held, requires_grad=False)
    layer = LoraLinear.from_linear(
        linear, AdapterConfig(8, 8), 0, DropoutClock(), torch.Generator().manual_seed(0)
    )
    shares = []
    for size in (1e-4, 3.0):
        torch.nn.init.normal_(layer.lora_B, std=1.0, generator=torch.Generator().manual_seed(1))
        base = layer.base_weight().float()
        layer.lora_B.data *= size / float((layer.merged(base) - base).std())
        shares.append(surviving_share(layer, ModelOptions()))
    assert shares[1] > 0.95
    if in_4bit:
        assert abs(shares[0]) < 0.05, "every weight falls back onto its level"
    layer.lora_B.data.zero_()
    assert surviving_share(layer, ModelOptions()) == 1.0

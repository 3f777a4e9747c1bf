"""Tests of `exporters.exact`: a merge that is right in its bits, and the power to tell wrong ones
from it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import halfbyte
from halfbyte.adapters.lora import LoraLinear, lora_layers
from halfbyte.config.options import ModelOptions
from halfbyte.errors import VerificationError
from halfbyte.exporters import merge as merging
from halfbyte.exporters.exact import recompute
from halfbyte.exporters.write import write_merged
from halfbyte.files import hub
from halfbyte.files.safetensors import Checkpoint, read_header, read_tensor, write_safetensors
from halfbyte.progress import no_progress
from halfbyte.run.directory import Run

Merged = Callable[..., Tensor]
HONEST: Merged = LoraLinear.merged
FIRST = "model.layers.0.self_attn.q_proj"


def missing(layer: LoraLinear, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """One layer's adapter is left out."""
    return weight.to(dtype) if layer.layer_index == 0 else HONEST(layer, weight, dtype)


def rescaled(layer: LoraLinear, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale is off by five percent."""
    wide = weight.float()
    return (wide + 1.05 * (HONEST(layer, weight, torch.float32) - wide)).to(dtype)


def transposed(layer: LoraLinear, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to one square layer is transposed."""
    if layer.layer_index >= 7 or weight.shape[0] != weight.shape[1]:
        return HONEST(layer, weight, dtype)
    wide = weight.float()
    return (wide + (HONEST(layer, weight, torch.float32) - wide).T).to(dtype)


def without_rslora(layer: LoraLinear, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """rsLoRA's scale is taken for LoRA's."""
    wide = weight.float()
    change = HONEST(layer, weight, torch.float32) - wide
    return (wide + change / layer.adapter.r**0.5).to(dtype)


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory: pytest.TempPathFactory, trained_run: Run) -> Run:
    """A run of six steps only, on the rows of another."""
    return halfbyte.train(
        model="demo",
        data=trained_run.info()["data"]["source"],
        output_dir=str(tmp_path_factory.mktemp("six") / "run"),
        max_steps=6,
        gradient_accumulation_steps=1,
        per_device_train_batch_size=8,
        num_samples=0,
        use_rslora=True,
        judge=False,
    )


@pytest.fixture(scope="module")
def running(six_steps: Run) -> Any:
    return halfbyte.load(six_steps.path)[0]


@pytest.mark.parametrize("wrong", [missing, rescaled, transposed, without_rslora])
def test_a_wrong_sum_is_found_six_steps_after_the_start(
    six_steps: Run,
    running: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: Merged,
):
    base, options = hub.resolve("demo"), ModelOptions()
    for onto in ("trained", "original"):
        with monkeypatch.context() as patch:
            patch.setattr(LoraLinear, "merged", wrong)
            (tmp_path / onto).mkdir()
            write_merged(base, tmp_path / onto, running, onto, no_progress)
        given = (base, six_steps.adapter, running, onto, options, no_progress)
        with pytest.raises(VerificationError, match="not the adapter on its base") as caught:
            recompute(tmp_path / onto, *given)
        assert "are not the sum" in caught.value.found


def test_a_wrong_merge_is_refused(six_steps: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LoraLinear, "merged", missing)
    with pytest.raises(VerificationError, match="not the adapter on its base"):
        halfbyte.merge(six_steps.path, tmp_path / "m")
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_another_adapter_is_refused(
    six_steps: Run, trained_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    honest = merging._Merger._build

    def build(self: Any, onto: str, running: Any) -> Any:
        file = trained_run.adapter / "adapter_model.safetensors"
        entries = read_header(file)
        for name, layer in lora_layers(running):
            key = f"base_model.model.{name}.lora_B.weight"
            layer.lora_B.data.copy_(read_tensor(entries[key], key))
        return honest(self, onto, running)

    monkeypatch.setattr(merging._Merger, "_build", build)
    with pytest.raises(VerificationError, match="not the adapter on its base"):
        halfbyte.merge(six_steps.path, tmp_path / "m")


@pytest.mark.parametrize("onto", ["trained", "original"])
def test_a_right_one_is_recomputed_to_the_bit(six_steps: Run, tmp_path: Path, onto: str):
    receipt = halfbyte.merge(six_steps.path, tmp_path / "m", onto=onto)
    again = receipt.recomputed
    assert again.tensors == len(Checkpoint(tmp_path / "m").entries)
    assert (
        again.adapted
        == 7 * json.loads((tmp_path / "m/config.json").read_text())["num_hidden_layers"]
    )
    least, middle, most = again.surviving
    assert 0.5 < least <= middle <= most < 1.5
    assert receipt.kl <= 4 * receipt.noise


def test_a_tensor_that_was_not_adapted_must_be_the_bases(
    six_steps: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    honest = merging.write_merged

    def write(base: Path, target: Path, model: Any, onto: str, progress: Any) -> None:
        honest(base, target, model, onto, progress)
        found = Checkpoint(target)
        tensors = {name: found.read(name) for name in found}
        tensors["model.norm.weight"] *= 1.01
        tensors["stranger"] = torch.ones(3)
        del tensors["model.layers.0.input_layernorm.weight"]
        write_safetensors(target / "model.safetensors", tensors)

    monkeypatch.setattr(merging, "write_merged", write)
    with pytest.raises(VerificationError) as caught:
        halfbyte.merge(six_steps.path, tmp_path / "m")
    for part in (
        "missing: model.layers.0.input_layernorm.weight",
        "unexpected: stranger",
        "model.norm.weight",
    ):
        assert part in caught.value.found

"""`optimize` on models that accelerate has placed: part by part, some of it on disk. Its hooks go
on working, and what they hold is left alone by name."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import big_modeling
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import halfbyte
from halfbyte.ops import cpu

from ..helpers import small_config

peft: Any = pytest.importorskip("peft")
placing: Any = big_modeling

IDS = torch.arange(3, 40)[None]
PARTS = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
PARTS |= {"lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "cpu"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("placed")
    torch.manual_seed(0)
    LlamaForCausalLM(small_config(num_hidden_layers=2)).save_pretrained(path)
    return path


def by_from_pretrained(placed: Any) -> Callable[[Path, Path], Any]:
    def load(path: Path, away: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, device_map=placed, offload_folder=away)

    return load


def by_dispatch(**how: Any) -> Callable[[Path, Path], Any]:
    def load(path: Path, away: Path) -> Any:
        model = AutoModelForCausalLM.from_pretrained(path)
        return placing.dispatch_model(model, main_device="cpu", offload_dir=str(away), **how)

    return load


HOW: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "auto": (by_from_pretrained("auto"), "fused: 5 norms"),
    "one device": (by_from_pretrained({"": "cpu"}), "fused: 5 norms"),
    "part by part": (by_from_pretrained(PARTS), "fused: 5 norms"),
    "hooks everywhere": (by_dispatch(device_map={"": "cpu"}, force_hooks=True), "hooks"),
    "a layer on disk": (by_dispatch(device_map={**PARTS, "model.layers.1": "disk"}), "hooks"),
}
"""How a model is placed, and a part of what `optimize` says of it."""


@pytest.mark.skipif(cpu.active() is None, reason="without the C++ library nothing is replaced")
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("placed", HOW)
def test_a_placed_model_learns_as_before(
    placed: str, checkpointed: bool, checkpoint: Path, tmp_path: Path
):
    place, expected = HOW[placed]

    def made() -> Any:
        torch.manual_seed(1)
        lora = peft.LoraConfig(
            r=4,
            target_modules=["q_proj", "down_proj"],
            layers_to_transform=[0] if placed == "a layer on disk" else None,
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        )
        model = peft.get_peft_model(place(checkpoint, tmp_path / "away"), lora)
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        return model.train()

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        model(input_ids=IDS, labels=IDS).loss.backward()
        found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = gradients(made())
        lines: list[str] = []
        found = gradients(halfbyte.optimize(made(), say=lines.append))
    assert expected in " ".join(lines)
    assert wanted.keys() == found.keys() and len(wanted) >= 4
    for name, value in wanted.items():
        assert float((found[name] - value).norm() / value.norm()) < 1e-5, name


def on_disk(model: Any, away: Path) -> None:
    placed = {**PARTS, "model.layers.1": "disk"}
    placing.dispatch_model(model, placed, main_device="cpu", offload_dir=str(away))


def offloaded(model: Any, away: Path) -> None:
    placing.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.skipif(cpu.active() is None, reason="without the C++ library nothing is replaced")
@pytest.mark.parametrize(("put_away", "said"), [(on_disk, "hooks"), (offloaded, "left as it is")])
def test_adapters_that_were_put_away_with_their_layers_are_no_error(
    put_away: Callable[[Any, Path], None], said: str, checkpoint: Path, tmp_path: Path
):
    """Placed after the adapter was made, accelerate holds it, too; such a model answers."""

    def made() -> Any:
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint), lora)
        put_away(model.get_base_model(), tmp_path / "away")
        return model.train()

    lines: list[str] = []
    model = halfbyte.optimize(made(), say=lines.append)
    assert said in " ".join(lines)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, made()(input_ids=IDS).logits)

"""Empty models: parameters on the meta device, of this thread's modules alone."""

import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GraniteMoeConfig, LlamaConfig, RwkvConfig

import halfbyte
from halfbyte.model.architecture import build_empty, router_losses
from halfbyte.model.meta import _parameters_on_meta


def test_parameters_are_empty_and_buffers_are_not(tiny_config: LlamaConfig):
    model = build_empty(tiny_config)
    assert all(p.is_meta for p in model.parameters())
    assert not any(b.is_meta for b in model.buffers()) and list(model.buffers())


def test_other_threads_make_modules_as_ever():
    """While one thread builds, and whichever ends first."""
    own, found = nn.Module.register_parameter, {}
    inside, go_on = threading.Event(), threading.Event()

    def build() -> None:
        with _parameters_on_meta():
            inside.set()
            go_on.wait(10)
            found["mine"] = nn.Linear(2, 2).weight.device.type

    thread = threading.Thread(target=build)
    thread.start()
    inside.wait(10)
    found["theirs"] = nn.Linear(2, 2).weight.device.type
    go_on.set()
    thread.join()
    assert found == {"mine": "meta", "theirs": "cpu"}
    assert nn.Module.register_parameter is own


def test_models_are_loaded_in_several_threads(stories: Path):
    wrong: list[Exception] = []
    halfbyte.load(str(stories))
    before = torch.get_default_dtype()

    def load() -> None:
        try:
            model: Any = halfbyte.load(str(stories))[0]
            assert not any(p.is_meta for p in model.parameters())
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and torch.get_default_dtype() == before


def test_a_loss_of_routers_is_said_not_to_be_trained_on(tiny_config: LlamaConfig):
    """Silently left out once, though the model's configuration asked for it."""
    quiet = router_losses(GraniteMoeConfig(router_aux_loss_coef=0.5))
    assert "router_aux_loss_coef 0.5" in quiet and "output_router_logits" not in quiet
    asked = GraniteMoeConfig(router_aux_loss_coef=0.5, output_router_logits=True)
    assert "output_router_logits" in router_losses(asked)
    assert not router_losses(GraniteMoeConfig(router_aux_loss_coef=0.0))
    assert not router_losses(tiny_config)


def test_rwkv_changes_no_weight_for_the_range_of_fp16():
    """It halves some of its weights every six layers, in place: not those in 4 bits."""
    config = RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=7, context_length=64)
    assert config.rescale_every
    assert build_empty(config).config.rescale_every == 0
    assert config.rescale_every, "its own configuration stays as it is"

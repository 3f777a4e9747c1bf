"""How long dequantized weights stay changes no bit, and streams that fill buffers ahead never
race."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from halfbyte import nf4, ops
from halfbyte.config.options import TrainConfig
from halfbyte.engine.learner import Learner
from halfbyte.engine.reductions import REDUCTIONS
from halfbyte.engine.selftest import Abilities, checkpoint_layers
from halfbyte.errors import UsageError
from halfbyte.ops import cpu, dequantized
from halfbyte.ops.dequantized import BUFFERS, DequantBuffer, LayerBuffer, PrefetchBuffer

from ..helpers import small_config
from ..memory.test_recompute import adapted, gradients
from ..tools.streams import COMPUTING, Stream, watched

SHAPES = [(48, 64), (32, 64), (96, 48), (64, 96)]


def passes(
    dequant_buffer: DequantBuffer, weights: list[nf4.NF4Tensor], steps: int = 3
) -> list[Tensor]:
    """Forward through all weights, then back, again and again; the second weight is used twice in a
    row."""
    found = []
    with dequant_buffer.in_use(), cpu.using("torch"):
        for step in range(steps):
            for weight in [weights[0], weights[1], weights[1], *weights[2:]]:
                x = torch.full((3, weight.shape[1]), 1.0 + step)
                found.append(ops.linear_4bit(x, weight.parts, weight.shape[0]))
            for weight in reversed(weights):
                dy = torch.full((3, weight.shape[0]), 2.0 + step)
                found.append(ops.linear_4bit_input_grad(dy, weight.parts, weight.shape[1]))
    return found


@pytest.fixture(autouse=True)
def buffers_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantized, "_buffers", {})


@pytest.fixture
def weights() -> list[nf4.NF4Tensor]:
    torch.manual_seed(0)
    return [nf4.quantize(torch.randn(shape)) for shape in SHAPES]


class AsReference(torch.utils._python_dispatch.TorchDispatchMode):
    """Lets a `streams.StreamWatch` around it see what an operation's reference does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reference = {"linear_4bit": "_linear", "linear_4bit_input_grad": "_input_grad"}.get(
            func.__name__.split(".")[0]
        )
        return (
            getattr(ops.fourbit, reference)(*args) if reference else func(*args, **(kwargs or {}))
        )


def test_weights_come_ahead_and_nothing_races(weights: list[nf4.NF4Tensor]):
    with cpu.using("torch"):
        expected = passes(DequantBuffer(), weights)
    with watched() as watch, AsReference():
        found = passes(PrefetchBuffer(), weights)
    assert watch.races == []
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    here, ahead = (
        sum(call == ("dequantize_4bit", stream) for call in watch.calls) for stream in (0, 1)
    )
    # of a step's 9 products 6 need a weight that neither buffer holds, and 4 where the step before
    # ended with the first
    assert (here, ahead) == (6, 2 * 4)


@pytest.mark.parametrize("forgetful", ["computing", "side"])
def test_without_an_event_there_are_races(
    weights: list[nf4.NF4Tensor], forgetful: str, monkeypatch: pytest.MonkeyPatch
):
    """The watch finds them, and no wait is there for nothing."""
    original = Stream.wait_event

    def sometimes(self: Stream, event: Any) -> None:
        if (self.number == COMPUTING) != (forgetful == "computing"):
            original(self, event)

    monkeypatch.setattr(Stream, "wait_event", sometimes)
    with watched() as watch, AsReference():
        passes(PrefetchBuffer(), weights)
    assert watch.races


@pytest.mark.parametrize("ending", ["larger buffers", "the end"])
@pytest.mark.parametrize("waits", [True, False])
def test_memory_is_given_back_when_nothing_is_on_its_way_to_it(
    weights: list[nf4.NF4Tensor], ending: str, waits: bool, monkeypatch: pytest.MonkeyPatch
):
    if not waits:
        monkeypatch.setattr(Stream, "wait_stream", lambda self, other: None)
    with watched() as watch, AsReference(), cpu.using("torch"):
        dequant_buffer = PrefetchBuffer()
        with dequant_buffer.in_use():
            # the last of those that are repeated begins to bring another
            for number in [2, 0, 1, 2, 0, 1, *([3] if ending == "larger buffers" else [])]:
                weight = weights[number]
                ops.linear_4bit(torch.ones(1, weight.shape[1]), weight.parts, weight.shape[0])
        del dequant_buffer
    assert bool(watch.races) != waits


@pytest.mark.parametrize("kind", ["ahead", "layer"])
def test_a_model_learns_the_same_bits(kind: str):
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(small_config())
    for module in list(model.model.modules()):
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(nf4.quantize(module.weight.data), requires_grad=False)
    adapted(model)
    layers = 2
    counts = {}
    with cpu.using("torch"):
        checkpoint_layers(model, "none", packing=True)
        expected = gradients(model)
        for name in ("product", kind):
            dequant_buffer = BUFFERS[name]()
            with watched() as watch, AsReference():
                for _ in range(2):
                    with dequant_buffer.in_use():
                        found = gradients(model)
                    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert watch.races == []
            counts[name] = [
                sum(c == ("dequantize_4bit", stream) for c in watch.calls) for stream in (0, 1)
            ]
    # forward 7, again 6 (the last is not needed), backward 7, but the first layer's first three
    # need no gradient
    assert counts["product"] == [2 * (20 * layers - 3), 0]
    if kind == "layer":
        assert counts["layer"] == [2 * 14 * layers, 0]
    else:
        assert counts["ahead"][1] > 0.45 * counts["product"][0] > counts["ahead"][0] * 0.8


def test_where_it_has_no_use_it_is_refused():
    def learner(**options: Any) -> Learner:
        model: Any = LlamaForCausalLM(small_config())
        config = TrainConfig(model="none", data="none", **options)
        return Learner(model, config, Abilities(True, True, 0.0, 0.0), lambda name, line: None)

    with cpu.using("torch"):
        one = learner(dequantized_weights="layer")
        assert isinstance(one.dequant_buffer, LayerBuffer)
        (change,) = [r for r in REDUCTIONS if r.option == "dequantized_weights"]
        assert change.while_running(one, []) == {"dequantized_weights": "product"}
        assert type(one.dequant_buffer) is DequantBuffer
        assert change.while_running(one, []) is None
        with pytest.raises(UsageError, match="no second stream"):
            learner(dequantized_weights="ahead")
        with pytest.raises(UsageError, match="no layer is run again"):
            learner(dequantized_weights="layer", gradient_checkpointing=False)
        with pytest.raises(UsageError, match="no weight is in 4 bits"):
            learner(dequantized_weights="layer", load_in_4bit=False)
    if cpu.active() is not None:
        with pytest.raises(UsageError, match="as it multiplies"):
            learner(dequantized_weights="layer")

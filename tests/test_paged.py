"""What leaves memory and comes back: the same numbers, whatever lies where."""

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from streams import Stream, watched
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import halfbyte
from halfbyte.cli import run
from halfbyte.config.options import ModelOptions, TrainConfig
from halfbyte.data.batches import collate
from halfbyte.data.renderer import TokenizedExample
from halfbyte.engine import learner, paged_optimizers
from halfbyte.engine.adamw8bit import AdamW8bit
from halfbyte.engine.learner import Learner
from halfbyte.engine.paged_optimizers import PagedAdamW, PagedAdamW8bit
from halfbyte.engine.selftest import Abilities
from halfbyte.errors import DoesNotFit, Interrupted, ModelError, StorageError
from halfbyte.files import hub
from halfbyte.files.safetensors import TensorFile, read_header, read_tensor, write_safetensors
from halfbyte.memory import recompute
from halfbyte.memory.mapped_files import ScratchFile, resident_bytes
from halfbyte.memory.offload import OffloadPool
from halfbyte.memory.paged_arrays import Pages
from halfbyte.memory.recompute import KEEPS, Recompute
from halfbyte.memory.streaming import LayerStreamer
from halfbyte.model import attention
from halfbyte.model.fusion import fuse, tile_mlps
from halfbyte.ops import cpu
from halfbyte.planning.memory_plan import MemoryPlan
from halfbyte.progress import Reporter, no_progress
from halfbyte.quantization import writer
from halfbyte.quantization.bnb_format import quantized_names
from halfbyte.quantization.cache import _identity
from halfbyte.quantization.load import load_base
from halfbyte.quantization.tensor import NF4Tensor
from halfbyte.run.directory import Run
from halfbyte.training.trainer import Trainer, run_training
from halfbyte.training.trainer import train as train_config

MIB = 1 << 20


# --- memory ---------------------------------------------------------------------------------------


def test_a_room_takes_memory_while_it_is_used_and_keeps_its_values(tmp_path: Path):
    file = ScratchFile(8 * MIB, tmp_path)
    assert not list(tmp_path.iterdir()), "the file has no name"
    values = file.tensor(MIB, 6 * MIB // 4, torch.float32)
    assert not values.any()
    values.copy_(torch.arange(len(values)))
    assert 6 * MIB <= file.resident_bytes() <= 8 * MIB
    file.release()
    assert file.resident_bytes() == 0
    file.will_need(0, 8 * MIB)
    assert torch.equal(values, torch.arange(len(values)).float())
    file.release(MIB, 4 * MIB)
    assert file.resident_bytes() <= 4 * MIB


def test_a_full_disk_is_told_before_anything_is_written(tmp_path: Path):
    with pytest.raises(StorageError, match="cannot lay"):
        ScratchFile(1 << 60, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("staged", [False, True])
def test_windows_are_read_written_and_let_go(tmp_path: Path, staged: bool):
    pages = Pages(
        {"a": (1000, torch.float32), "b": (50, torch.uint8)}, torch.device("cpu"), tmp_path, staged
    )
    pages.arrays()["a"].copy_(torch.arange(1000))
    cuts = [
        {"a": (first, min(first + 300, 1000)), "b": (first // 20, min(first + 300, 1000) // 20)}
        for first in range(0, 1000, 300)
    ]
    for number, (cut, window) in enumerate(zip(cuts, pages.windows(cuts), strict=True)):
        assert window["a"].tolist() == list(range(*cut["a"]))
        window["a"].neg_()
        window["b"].fill_(number + 1)
    assert torch.equal(pages.arrays()["a"], -torch.arange(1000).float())
    assert pages.arrays()["b"].tolist() == [1] * 15 + [2] * 15 + [3] * 15 + [4] * 5
    pages.release()
    if staged:
        assert pages.resident_bytes() == 2 * (300 * 4 + 15), "two windows"
    else:
        assert pages.resident_bytes() == 0


@pytest.mark.parametrize("staged", [None, True])
def test_slots_elsewhere_give_back_what_they_were_given(tmp_path: Path, staged: bool | None):
    pool = OffloadPool(3, tmp_path, staged)
    given = [torch.randn(2, 5), torch.randn(2, 5), torch.randn(10)]
    held = [pool.put(t) for t in given]
    for one, tensor in reversed(list(zip(held, given, strict=True))):
        assert torch.equal(one.take(), tensor)
    more = pool.put(torch.ones(7))
    assert torch.equal(more.take(), torch.ones(7))
    del one, held, more
    assert len(pool.free) == 3
    larger = pool.put(torch.ones(40))
    assert torch.equal(larger.take(), torch.ones(40))


@pytest.mark.parametrize("forgotten", [None, "wait_event", "wait_stream"])
def test_copies_of_windows_and_slots_race_with_nothing(
    tmp_path: Path, forgotten: str | None, monkeypatch: pytest.MonkeyPatch
):
    """As on a GPU, with a stream of their own; without its waits the watch finds races."""
    if forgotten is not None:
        monkeypatch.setattr(Stream, forgotten, lambda self, other: None)
    with watched() as monitor:
        pages = Pages({"a": (1000, torch.float32)}, torch.device("cpu"), staged=True)
        pages._stream = torch.cuda.Stream()
        cuts = [{"a": (first, first + 250)} for first in range(0, 1000, 250)]
        for _ in range(2):
            for window in pages.windows(cuts):
                window["a"].add_(1)
        assert pages.arrays()["a"].eq(2).all()
        pool = OffloadPool(3, tmp_path, staged=True)
        pool._stream = torch.cuda.Stream()
        for _ in range(2):
            held = [pool.put(torch.full((4, 5), float(i))) for i in range(3)]
            while held:
                assert held.pop().take().mul(2).eq(2 * len(held)).all()
    assert bool(monitor.races) == (forgotten is not None), monitor.races


# --- optimizers -----------------------------------------------------------------------------------


def parameters(seed: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    """Large and small, of odd sizes, one of several windows."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    shapes: list[tuple[int, ...]] = [
        (5000,),
        (3,),
        (70, 64),
        (1, 1),
        (4096,),
        (130, 257),
        (draw.randrange(1, 9000),),
    ]
    draw.shuffle(shapes)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def steps(
    optimizer: torch.optim.Optimizer, params: list[nn.Parameter], count: int, seed: int = 0
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        for number, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) * 10.0 ** (number - 3)
        optimizer.step()


def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.02, "weight_decay": 0.1}]


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_optimizers, "WINDOW", {"cpu": 2048, "cuda": 2048})


@pytest.fixture(params=[False, True], ids=["mapped", "staged"])
def staging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Windows copied to and fro as on a GPU, on a CPU."""
    if request.param:
        monkeypatch.setattr(
            paged_optimizers,
            "Pages",
            lambda arrays, device, directory: Pages(arrays, device, directory, staged=True),
        )
    return request.param


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("seed", range(4))
def test_paged_8bit_adamw_is_the_unpaged_one_to_the_bit(
    seed: int, kernels: str, small_windows: None, staging: bool, tmp_path: Path
):
    ours, theirs = parameters(seed), parameters(seed)
    paged = PagedAdamW8bit(groups(ours), lr=0.01, directory=tmp_path)
    plain = AdamW8bit(groups(theirs), lr=0.01)
    with cpu.using(kernels):
        steps(paged, ours, 5)
        steps(plain, theirs, 5)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    mine, other = paged.state_tensors(), plain.state_tensors()
    assert mine.keys() == other.keys() and all(
        torch.equal(mine[name], other[name]) for name in mine
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_paged_adamw_is_torchs_to_the_bit(
    seed: int, dtype: torch.dtype, small_windows: None, staging: bool, tmp_path: Path
):
    ours, theirs = parameters(seed, dtype), parameters(seed, dtype)
    paged = PagedAdamW(groups(ours), lr=0.01, directory=tmp_path)
    plain = torch.optim.AdamW(groups(theirs), lr=0.01, weight_decay=0.01)
    steps(paged, ours, 4)
    steps(plain, theirs, 4)
    for params, optimizer in (
        (ours, paged),
        (theirs, plain),
    ):  # one takes no part, as where it is frozen meanwhile
        for p in params:
            p.grad = torch.ones_like(p)
        params[2].grad = None
        optimizer.step()
    steps(paged, ours, 2, 1)
    steps(plain, theirs, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", [PagedAdamW8bit, PagedAdamW])
def test_states_leave_memory_midway_and_pass_between_modes(
    kind: Any, small_windows: None, tmp_path: Path
):
    """Paged out after two steps; saved from one mode and loaded into the other; never brought back
    by loading."""
    reference, moved, other = parameters(7), parameters(7), parameters(7)
    plain = kind(groups(reference), lr=0.01, paged=False, directory=tmp_path)
    paged = kind(groups(moved), lr=0.01, paged=False, directory=tmp_path)
    steps(plain, reference, 2)
    steps(paged, moved, 2)
    assert not paged.paged and paged.resident_bytes() > 0
    paged.page_out()
    assert paged.paged and paged.resident_bytes() == 0 and not paged.resident_tensors()
    steps(plain, reference, 2, 1)
    steps(paged, moved, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip(reference, moved, strict=True))
    for source in (plain, paged):
        again = kind(groups(other), lr=0.5, directory=tmp_path)
        with torch.no_grad():
            for p, q in zip(other, reference, strict=True):
                p.copy_(q)
        again.load_state_dict(source.state_dict())
        assert again.paged and again.resident_bytes() == 0
        straight = [nn.Parameter(p.detach().clone()) for p in reference]
        unpaged = kind(groups(straight), lr=0.5, paged=False, directory=tmp_path)
        unpaged.load_state_dict(source.state_dict())
        steps(again, other, 2, 2)
        steps(unpaged, straight, 2, 2)
        assert all(torch.equal(a, b) for a, b in zip(other, straight, strict=True))


@pytest.mark.parametrize("kind", [PagedAdamW8bit, PagedAdamW])
def test_resident_states_fall_by_nine_tenths(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Also at the highest, which is inside of a step."""
    params = [nn.Parameter(torch.zeros(1 << 20)) for _ in range(12)]
    optimizer = kind(params, directory=tmp_path)
    held = (
        sum(t.nbytes for t in optimizer.state_dict()["arenas"][0].values())
        if kind is PagedAdamW8bit
        else 2 * 4 * 12 * MIB
    )
    highest, whole = 0, Pages._mapped

    def watched(self: Pages, cuts: Any) -> Any:
        nonlocal highest
        for window in whole(self, cuts):
            yield window
            highest = max(highest, self.resident_bytes())

    monkeypatch.setattr(Pages, "_mapped", watched)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert 0 < highest <= 0.1 * held
    assert optimizer.resident_bytes() == 0


def test_paged_states_need_contiguous_parameters(tmp_path: Path):
    p = nn.Parameter(torch.zeros(100, 100).t())
    for kind in (PagedAdamW8bit, PagedAdamW):
        with pytest.raises(ValueError, match="contiguous"):
            kind([p], directory=tmp_path)


# --- gradients ------------------------------------------------------------------------------------


def tiny_learner(config: LlamaConfig, path: Path, **options: Any) -> Learner:
    torch.manual_seed(0)
    if not (path / "config.json").exists():
        LlamaForCausalLM(config).save_pretrained(path)
    given: dict[str, Any] = {
        "dtype": "float32",
        "lora_dropout": 0.2,
        "lora_r": 4,
        "kept_activations": "none",
        **options,
    }
    train = TrainConfig(
        model=str(path), data="none", output_dir=str(path / "out"), allow_low_coverage=True, **given
    )
    model, _ = load_base(path, train)
    fuse(model)
    made = Learner(model, train, Abilities(True, True, 0.0, 0.0), lambda what, line: None)
    for p in made.trained:
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    return made


def rows(*lengths: int) -> list[TokenizedExample]:
    draw = random.Random(0)
    return [
        TokenizedExample(
            str(i), [draw.randrange(3, 150) for _ in range(n)], [j > 1 for j in range(n)]
        )
        for i, n in enumerate(lengths)
    ]


def gradient(made: Learner, batch: Any) -> tuple[list[Tensor], float]:
    with attention.packed(made.model):
        losses = made.accumulate(batch, batch.supervised, 5, 1)
    found = [p.grad.clone() for p in made.trained if p.grad is not None]
    made.forget()
    return found, float(sum(losses))


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("keep", ["none", "all"])
@pytest.mark.parametrize("change", ["passes", "tiles", "both"])
def test_a_step_in_parts_has_the_gradients_of_the_whole(
    tiny_config: LlamaConfig, tmp_path: Path, change: str, keep: str, kernels: str
):
    """In fp32 with dropout: a sum of n terms in another order differs by at most n roundings of the
    terms' absolute sum (Higham 2002, 4.2), here 103 tokens' or 103 * 2^-24 of it. Held to that
    share of the sum itself, which is less; and to a hundredth of what a wrong mask would make."""
    batch = collate(rows(9, 30, 16, 41, 7), range(5))
    with cpu.using(kernels):
        made = tiny_learner(tiny_config, tmp_path, kernels=kernels, kept_activations=keep)
        expected, loss = gradient(made, batch)
        if change != "tiles":
            made.tokens_per_pass = 46
            assert [len(part.rows) for _, part in made.parts(batch)] == [2, 1, 1, 1]
        if change != "passes":
            tiled = made.tile(16)
            assert tiled == (cpu.active() is not None)
            if not tiled:
                pytest.skip("MLPs are fused, and tiled, by the library alone")
        found, again = gradient(made, batch)
        other, _ = gradient(tiny_learner(tiny_config, tmp_path, kernels=kernels, seed=1), batch)
    assert abs(again - loss) <= 1e-5 * abs(loss)
    for mine, theirs, wrong in zip(found, expected, other, strict=True):
        error = float((mine - theirs).norm() / theirs.norm())
        assert error <= 103 * 2.0**-24
        assert error <= 0.01 * float((wrong - theirs).norm() / theirs.norm())


@pytest.mark.skipif(not cpu.paths(), reason="MLPs are fused, and tiled, by the library alone")
@pytest.mark.parametrize("keep", KEEPS)
def test_tiles_cost_no_product(
    tiny_config: LlamaConfig, tmp_path: Path, keep: Any, monkeypatch: pytest.MonkeyPatch
):
    """A tiled MLP is run twice, forward and backward, as an untiled one; what it gives is not
    computed again."""
    from halfbyte.adapters import lora

    made, tokens = tiny_learner(tiny_config, tmp_path, kept_activations=keep), [0]
    product = lora._product

    def counting(x: Tensor, *rest: Any) -> Tensor:
        tokens[0] += x.shape[-2]
        return product(x, *rest)

    monkeypatch.setattr(lora, "_product", counting)
    batch = collate(rows(64), [0])
    tile_mlps(made.model, 16)
    gradient(made, batch)
    attends = 4 if KEEPS.index(keep) == 0 else 1 if keep == "attention" else 0
    assert tokens[0] == 64 * 2 * ((4 + 3) + attends + 3)


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("layers", [-1, 0, 1, 2])
def test_gradients_are_the_same_bits_whatever_is_kept_where(
    tiny_config: LlamaConfig, tmp_path: Path, keep: Any, layers: int
):
    batch = collate(rows(9, 30), range(2))
    expected, _ = gradient(tiny_learner(tiny_config, tmp_path / "m"), batch)
    more: dict[str, Any] = {
        "kept_activations": keep,
        "kept_layers": layers,
        "activation_offloading": "always",
    }
    made = tiny_learner(tiny_config, tmp_path / "m", **more)
    for _ in range(2):
        found, _ = gradient(made, batch)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_learner_takes_less_memory_midway_for_the_same_bits(
    tiny_config: LlamaConfig, tmp_path: Path
):
    batch = collate(rows(9, 30), range(2))
    made = tiny_learner(tiny_config, tmp_path, kept_activations="all")
    expected, _ = gradient(made, batch)
    for change in (made.keep_less, made.offload, made.page_out):
        assert change(), change
        found, _ = gradient(made, batch)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        assert not change(), "there is nothing more of it"
    assert isinstance(made.recompute, Recompute) and made.recompute.keep == "none"


# --- weights in a file ----------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("shard", [1 << 40, 20_000])
@pytest.mark.parametrize("double_quant", [True, False])
def test_streamed_weights_are_the_loaded_ones(
    tiny_config: LlamaConfig,
    tmp_path: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    shard: int,
    double_quant: bool,
):
    monkeypatch.setattr(writer, "SHARD", shard)
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config).bfloat16().save_pretrained(tmp_path / "m")
    options: dict[str, Any] = {"bnb_4bit_use_double_quant": double_quant}
    plain, expected = load_base(tmp_path / "m", ModelOptions(**options))
    for _ in range(2):  # made, then found
        model, report = load_base(
            tmp_path / "m", ModelOptions(weight_streaming="always", **options)
        )
        assert report.as_dict() == expected.as_dict()
        ids = torch.arange(20)[None]
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    (entry,) = (cache / "bases").iterdir()
    assert (len(list(entry.glob("*.safetensors"))) == 1) == (shard > 1 << 30)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, NF4Tensor) and weight.streamed is not None
    assert len(list((cache / "bases").iterdir())) == 1


def test_the_cache_is_a_checkpoint_that_bitsandbytes_opens(
    tiny_config: LlamaConfig, tmp_path: Path, cache: Path
):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    tiny_config.intermediate_size = (
        128  # bitsandbytes' CPU kernel takes blocks that cross rows for others
    )
    LlamaForCausalLM(tiny_config).bfloat16().save_pretrained(tmp_path / "m")
    ours, _ = load_base(tmp_path / "m", ModelOptions(weight_streaming="always", dtype="bfloat16"))
    (entry,) = (cache / "bases").iterdir()
    theirs = AutoModelForCausalLM.from_pretrained(
        entry, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    name = "model.layers.1.mlp.down_proj"
    state = theirs.get_submodule(name).weight.quant_state
    mine = ours.get_submodule(name).weight
    assert torch.equal(theirs.get_submodule(name).weight.view(-1), mine.packed) and state.nested
    assert torch.equal(state.absmax, mine.absmax)
    unpacked = bitsandbytes.functional.dequantize_4bit(theirs.get_submodule(name).weight, state)
    assert torch.equal(unpacked, mine.dequantize(unpacked.dtype))
    ids = torch.arange(20)[None]
    a, b = ours(input_ids=ids).logits.float(), theirs(input_ids=ids).logits.float()
    assert float((a - b).norm() / b.norm()) < 0.05, "they round to bf16 in other places"


def test_a_quantized_model_trains_as_the_one_it_was_made_from(
    orders: Path,
    unpaged: dict[str, str],
    tmp_path: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
):
    assert run(["quantize", "demo", "-o", str(tmp_path / "q"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["coverage"] == 1.0
        and 0 < max(each["relative_mse"] for each in found["tensors"]) < 0.02
    )
    assert (tmp_path / "q/tokenizer.json").is_file() and (
        tmp_path / "q/chat_template.jinja"
    ).is_file()
    assert train(tmp_path / "a", orders, model=str(tmp_path / "q")) == unpaged
    assert (
        train(tmp_path / "b", orders, model=str(tmp_path / "q"), weight_streaming="always")
        == unpaged
    )
    assert not cache.exists(), "it is streamed from where it lies"
    assert run(["quantize", "demo", "-o", str(tmp_path / "q")]) == 2, "never over something"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_changed_source_is_quantized_anew_and_a_damaged_entry_refused(
    tiny_config: LlamaConfig, tmp_path: Path, cache: Path
):
    model = LlamaForCausalLM(tiny_config).bfloat16()
    model.save_pretrained(tmp_path / "m")
    streamed = ModelOptions(weight_streaming="always")
    _, first = load_base(tmp_path / "m", streamed)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 1
    model.save_pretrained(tmp_path / "m")
    _, second = load_base(tmp_path / "m", streamed)
    assert first.digest != second.digest
    file = cache / "bases" / second.digest / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-5000, os.SEEK_END)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 16]))
    with pytest.raises(ModelError, match="damaged; they are removed"):
        load_base(tmp_path / "m", streamed)
    _, again = load_base(tmp_path / "m", streamed)
    assert again.digest == second.digest


def test_a_tensor_file_refuses_a_full_disk_and_leaves_nothing(tmp_path: Path):
    with (
        pytest.raises(StorageError, match="cannot write"),
        TensorFile(tmp_path / "x.safetensors", {"a": (torch.uint8, (1 << 60,))}, {}),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_travel_holds_two_groups(tmp_path: Path):
    file = tmp_path / "bytes"
    file.write_bytes(bytes(range(256)) * 4096 * 8)  # 8 MiB
    streamer = LayerStreamer()
    layers = [streamer.tensor(number, file, number * MIB, MIB) for number in range(8)]
    whole = resident_bytes(layers[0], 8 * MIB)
    for number in [*range(8), *reversed(range(8))]:
        streamer.use(number)
        assert int(layers[number].long().sum()) == 255 * 128 * 4096
        assert resident_bytes(layers[0], 8 * MIB) <= whole + 3 * MIB
    assert streamer.nbytes == 8 * MIB


# --- runs -----------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "paged": {"paging": "always"},
    "offloaded": {"activation_offloading": "always"},
    "streamed": {"weight_streaming": "always"},
    "all of it": {
        "paging": "always",
        "activation_offloading": "always",
        "weight_streaming": "always",
    },
    "kept in some": {"kept_activations": "all", "kept_layers": 3},
    "auto": {"kept_activations": "auto"},
}


def train(out: Path, data: Path, **more: Any) -> dict[str, str]:
    options: dict[str, Any] = {
        "max_steps": 5,
        "num_samples": 0,
        "gradient_accumulation_steps": 2,
        **more,
    }
    options = {
        "per_device_train_batch_size": 2,
        "kept_activations": "none",
        "optim": "adamw_8bit",
        **options,
    }
    if more.get("paging"):
        options["optim"] = "paged_adamw_8bit"
    halfbyte.train(**{"model": "demo", "data": str(data), "output_dir": str(out), **options})
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {
        name: files[name]["sha256"]
        for name in ("adapter_model.safetensors", "optimizer.safetensors")
    }


@pytest.fixture(scope="module")
def orders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("orders") / "rows.jsonl"
    lines = [{"prompt": f"{i} teas " * (1 + i % 5), "completion": f"{i} cups"} for i in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def unpaged(orders: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return train(tmp_path_factory.mktemp("unpaged"), orders)


@pytest.mark.parametrize("way", WAYS)
def test_a_run_ends_with_the_same_bytes_whatever_lies_where(
    way: str, orders: Path, unpaged: dict[str, str], tmp_path: Path, cache: Path
):
    assert train(tmp_path / "run", orders, **WAYS[way]) == unpaged
    measured = [
        json.loads(line) for line in (tmp_path / "run/memory.jsonl").read_text().splitlines()
    ]
    steady = [row for row in measured if row["phase"] == "step"][-1]
    assert ("paged" in steady) == ("paging" in WAYS[way])
    if "paged" in steady:
        assert steady["paged"]["of them in memory"] <= 0.1 * steady["paged"]["optimizer states"]
    assert not [path for path in (tmp_path / "run").iterdir() if "tmp" in path.name]


def test_a_run_resumes_in_another_mode_with_the_same_bytes(
    orders: Path, unpaged: dict[str, str], tmp_path: Path, cache: Path
):
    """Stopped after each step, gone on in the next mode."""
    modes = [{}, WAYS["all of it"], {"optim": "paged_adamw_8bit"}, WAYS["streamed"], WAYS["paged"]]
    out = tmp_path / "run"
    for step, mode in enumerate(modes):
        stop = {"save_steps": 1, "resume_from_checkpoint": "auto"}
        options: dict[str, Any] = {
            "model": "demo",
            "data": str(orders),
            "output_dir": str(out),
            "max_steps": 5,
            **stop,
        }
        options |= {
            "num_samples": 0,
            "gradient_accumulation_steps": 2,
            "per_device_train_batch_size": 2,
        }
        options |= {"kept_activations": "none", "optim": "adamw_8bit"}
        if mode.get("paging"):
            options["optim"] = "paged_adamw_8bit"
        config, honest = TrainConfig(**{**options, **mode}), Trainer.save

        def then_stop(trainer: Trainer, honest: Any = honest) -> None:
            honest(trainer)
            trainer.interrupts.signal = 15

        with pytest.MonkeyPatch.context() as patch:
            if step < 4:
                patch.setattr(Trainer, "save", then_stop)
            with pytest.raises(Interrupted) if step < 4 else contextlib.nullcontext():
                run_training(config, Run(out))
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    files = json.loads((newest / "manifest.json").read_text())["files"]
    assert (
        newest.name == "step-00000005"
        and {name: files[name]["sha256"] for name in unpaged} == unpaged
    )


def test_the_same_weights_keep_their_own_configuration(
    tiny_config: LlamaConfig, tmp_path: Path, cache: Path
):
    """An entry of the cache is weights alone: what else a directory says is read from it."""
    torch.manual_seed(1)
    for name, theta, end in (("a", 10_000.0, 5), ("b", 500_000.0, 7)):
        tiny_config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
        torch.manual_seed(1)
        model = LlamaForCausalLM(tiny_config).bfloat16()
        model.generation_config.eos_token_id = end
        model.save_pretrained(tmp_path / name)
    ids = torch.arange(20)[None]
    for _ in range(2):
        for name, end in (("a", 5), ("b", 7)):
            streamed, _ = load_base(tmp_path / name, ModelOptions(weight_streaming="always"))
            plain, _ = load_base(tmp_path / name, ModelOptions())
            assert torch.equal(streamed(input_ids=ids).logits, plain(input_ids=ids).logits)
            assert streamed.generation_config.eos_token_id == end
    assert len(list((cache / "bases").iterdir())) == 1


@pytest.mark.parametrize("harm", ["truncated", "missing", "no facts"])
def test_any_damage_of_the_cache_is_mended_by_repeating(
    tiny_config: LlamaConfig, tmp_path: Path, cache: Path, harm: str
):
    LlamaForCausalLM(tiny_config).bfloat16().save_pretrained(tmp_path / "m")
    streamed = ModelOptions(weight_streaming="always")
    _, first = load_base(tmp_path / "m", streamed)
    entry = cache / "bases" / first.digest
    if harm == "truncated":
        os.truncate(entry / "model.safetensors", 9000)
    elif harm == "missing":
        (entry / "model.safetensors").unlink()
    else:
        (entry / writer.FACTS).write_text("{}")
    if harm != "no facts":
        with pytest.raises(ModelError, match="are damaged; they are removed"):
            load_base(tmp_path / "m", streamed)
    assert load_base(tmp_path / "m", streamed)[1].digest == first.digest


def test_a_cache_that_cannot_be_written_names_the_way_out(
    tiny_config: LlamaConfig, tmp_path: Path, monkeypatch: Any
):
    LlamaForCausalLM(tiny_config).bfloat16().save_pretrained(tmp_path / "m")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HALFBYTE_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="HALFBYTE_CACHE"):
        load_base(tmp_path / "m", ModelOptions(weight_streaming="always"))


def test_two_builders_make_one_entry_and_leftovers_go(
    tiny_config: LlamaConfig, tmp_path: Path, cache: Path
):
    LlamaForCausalLM(tiny_config).bfloat16().save_pretrained(tmp_path / "m")
    streamed = ModelOptions(weight_streaming="always")
    identity = _identity(tmp_path / "m", streamed)
    leftover = cache / "bases" / f".{identity[:32]}.tmp"  # of a process that was killed
    leftover.mkdir(parents=True)
    (leftover / "half").write_text("a")
    script = "import sys, halfbyte; halfbyte.load(sys.argv[1], weight_streaming='always')"
    (tmp_path / "m" / "tokenizer.json").write_bytes(
        (hub.resolve("demo") / "tokenizer.json").read_bytes()
    )
    builders = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "m")]) for _ in range(3)
    ]
    assert [builder.wait() for builder in builders] == [0, 0, 0]
    (made,) = (cache / "bases").iterdir()
    assert load_base(tmp_path / "m", streamed)[1].digest == made.name


def test_a_checkpoint_stored_in_other_units_is_streamed(
    tiny_config: LlamaConfig, tmp_path: Path, cache: Path
):
    """bitsandbytes can store codes as bf16 numbers of two bytes (for FSDP)."""
    torch.manual_seed(1)
    LlamaForCausalLM(tiny_config).bfloat16().save_pretrained(tmp_path / "m")
    writer.quantize(tmp_path / "m", ModelOptions(), tmp_path / "q", no_progress)
    entries = read_header(tmp_path / "q/model.safetensors")
    tensors = {name: read_tensor(entry, name) for name, entry in entries.items()}
    for name in quantized_names(set(entries)):
        tensors[name] = tensors[name].view(-1).view(torch.bfloat16).view(-1, 1)
    write_safetensors(tmp_path / "q/model.safetensors", tensors)
    (tmp_path / "q" / writer.FACTS).unlink()
    plain, _ = load_base(tmp_path / "q", ModelOptions())
    streamed, _ = load_base(tmp_path / "q", ModelOptions(weight_streaming="always"))
    ids = torch.arange(20)[None]
    assert torch.equal(streamed(input_ids=ids).logits, plain(input_ids=ids).logits)


# --- a step that cannot run out -------------------------------------------------------------------


class Exhausting:
    """Lets memory run out in the passes whose numbers are given, in the middle of their backward
    pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *numbers: int) -> None:
        self.passes, self.numbers = 0, numbers
        honest = learner.Learner.loss
        layer = recompute._Layer.backward

        def loss(made: Learner, batch: Any) -> Tensor:
            self.passes += not next(made.model.parameters()).is_meta  # a plan's pass is none
            return honest(made, batch)

        def backward(ctx: Any, *grads: Tensor) -> Any:
            result = layer(ctx, *grads)
            if self.passes in self.numbers and not grads[0].is_meta:
                raise MemoryError("no memory, as the test wants it")
            return result

        monkeypatch.setattr(learner.Learner, "loss", loss)
        monkeypatch.setattr(recompute._Layer, "backward", staticmethod(backward))


def test_memory_that_runs_out_in_a_step_costs_that_step_once_more(
    orders: Path, unpaged: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three times: what changes no bit is done first, so the run ends with the same bytes."""
    Exhausting(monkeypatch, 1, 3, 8)
    more: dict[str, Any] = {
        "optim": "paged_adamw_8bit",
        "kept_activations": "all",
        "rehearse": False,
    }
    assert train(tmp_path / "run", orders, **more) == unpaged
    info = json.loads((tmp_path / "run/run.json").read_text())
    assert (
        info["config"]["paging"] == "always" and info["config"]["activation_offloading"] == "always"
    )
    assert info["config"]["kept_activations"] == "none" and not info["changes"]
    said = [json.loads(line) for line in (tmp_path / "run/memory.jsonl").read_text().splitlines()]
    assert [row["change"] for row in said if row["phase"] == "less"] == [
        {"paging": "always"},
        {"kept_activations": "none"},
        {"activation_offloading": "always"},
    ]


def test_a_step_is_split_where_nothing_else_is_left_and_the_run_says_so(
    orders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Exhausting(monkeypatch, 2, 5)
    said: list[str] = []
    options: dict[str, Any] = {
        "model": "demo",
        "data": str(orders),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
        "num_samples": 0,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 4,
        "activation_offloading": "never",
        "kept_activations": "none",
        "optim": "adamw_8bit",
        "rehearse": False,
        "save_steps": 2,
    }
    train_config(TrainConfig(**options), reporter=Reporter(said.append))
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[0]["passes"] == 1 < rows[1][
        "passes"
    ]
    info = json.loads((run / "run.json").read_text())
    assert info["config"]["tokens_per_pass"] > 0 and info["changes"][0]["step"] == 1
    assert "tokens_per_pass" in info["changes"][0]["change"]
    assert any("memory ran out" in line and "parts of at most" in line for line in said)
    monkeypatch.undo()
    shutil.rmtree(run / "checkpoints/step-00000004")  # as if it had been killed before
    shutil.rmtree(run / "adapter")
    train_config(TrainConfig(**options, resume_from_checkpoint="auto"))
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert again[3]["loss"] == rows[3]["loss"] and again[3]["passes"] == rows[3]["passes"], (
        "the split is kept"
    )


def test_a_resume_from_before_a_split_runs_whole_steps_again(
    orders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options: dict[str, Any] = {
        "model": "demo",
        "data": str(orders),
        "output_dir": str(tmp_path / "run"),
        "max_steps": 4,
    }
    options |= {
        "num_samples": 0,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 4,
    }
    options |= {
        "activation_offloading": "never",
        "kept_activations": "none",
        "optim": "adamw_8bit",
        "save_steps": 1,
    }
    options |= {"rehearse": False, "save_total_limit": 9}
    whole = tmp_path / "whole"
    train_config(TrainConfig(**{**options, "output_dir": str(whole)}))
    Exhausting(monkeypatch, 3)
    train_config(TrainConfig(**options))
    monkeypatch.undo()
    out = tmp_path / "run"
    info = json.loads((out / "run.json").read_text())
    assert info["changes"][0]["step"] == 2 and info["config"]["tokens_per_pass"]
    for later in ("step-00000003", "step-00000004"):
        shutil.rmtree(out / "checkpoints" / later)
    shutil.rmtree(out / "adapter")
    said: list[str] = []
    train_config(
        TrainConfig(**options, resume_from_checkpoint="auto"), reporter=Reporter(said.append)
    )
    assert any("it will end with the same bytes as an unbroken run" in line for line in said)
    info = json.loads((out / "run.json").read_text())
    assert not info["changes"] and not info["config"]["tokens_per_pass"]
    name = "checkpoints/step-00000004/adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_rehearsal_that_runs_out_goes_on_with_less(
    orders: Path, unpaged: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Exhausting(monkeypatch, 1, 2)
    assert (
        train(tmp_path / "run", orders, optim="paged_adamw_8bit", kept_activations="all") == unpaged
    )


def test_a_state_that_cannot_be_put_back_ends_the_run(
    orders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from halfbyte.run import checkpoint

    calls, honest = [0], checkpoint.restore

    def restore(*arguments: Any) -> int:
        calls[0] += 1
        if calls[0] == 1:
            raise MemoryError("no memory, as the test wants it")
        return honest(*arguments)

    monkeypatch.setattr(checkpoint, "restore", restore)
    first = train(tmp_path / "a", orders)
    assert calls[0] == 2, "it was tried again"
    monkeypatch.setattr(checkpoint, "restore", honest)
    assert first == train(tmp_path / "b", orders)

    def never(*arguments: Any) -> int:
        raise MemoryError("no memory, as the test wants it")

    monkeypatch.setattr(checkpoint, "restore", never)
    with pytest.raises(DoesNotFit, match="put back after the rehearsal"):
        train(tmp_path / "c", orders)
    assert not list((tmp_path / "c/checkpoints").glob("step-*")), "nothing of it was saved"


def test_room_is_made_before_memory_runs_out(
    orders: Path, unpaged: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is left decides: enough, and nothing is done; too little once, and the first remedy is
    taken."""
    module, needs, honest = sys.modules["halfbyte.training.trainer"], [], MemoryPlan.live_bytes

    def live_bytes(plan: MemoryPlan, tokens: int) -> int:
        needs.append((honest(plan, tokens), plan))
        return needs[-1][0]

    monkeypatch.setattr(MemoryPlan, "live_bytes", live_bytes)
    monkeypatch.setattr(module, "headroom", lambda device: 1 << 40)
    more: dict[str, Any] = {"optim": "paged_adamw_8bit", "kept_activations": "all"}
    assert train(tmp_path / "enough", orders, **more) == unpaged
    rows = [
        json.loads(line) for line in (tmp_path / "enough/memory.jsonl").read_text().splitlines()
    ]
    assert not [row for row in rows if row["phase"] == "less"]
    answers = iter([1 << 40, 1000])
    monkeypatch.setattr(module, "headroom", lambda device: next(answers, 1 << 40))
    assert train(tmp_path / "short", orders, **more) == unpaged
    rows = [json.loads(line) for line in (tmp_path / "short/memory.jsonl").read_text().splitlines()]
    (less,) = [row for row in rows if row["phase"] == "less"]
    assert less["change"] == {"paging": "always"} and "are left" in less["why"]
    for (
        need,
        plan,
    ) in needs:  # what a pass needs and what stays are no more than everything there is at the peak
        assert 0 < need <= plan.tensor_bytes - plan.bytes_of("4-bit codes", "adapters", "gradients")


def test_a_full_disk_leaves_the_other_remedies(
    orders: Path, unpaged: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from halfbyte.memory.mapped_files import ScratchFile

    def full(self: ScratchFile, size: int, directory: Path) -> None:
        raise StorageError("the disk is full, as the test wants it")

    Exhausting(monkeypatch, 1)
    monkeypatch.setattr(ScratchFile, "__init__", full)
    more: dict[str, Any] = {
        "optim": "paged_adamw_8bit",
        "kept_activations": "all",
        "rehearse": False,
    }
    assert train(tmp_path / "run", orders, **more) == unpaged
    config = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert config["paging"] == "auto" and config["kept_activations"] == "none"


@pytest.mark.parametrize("kind", [PagedAdamW8bit, PagedAdamW])
def test_a_page_out_that_is_interrupted_changes_nothing(
    kind: Any, small_windows: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """At each of its copies in turn."""
    for moment in range(1, 8):
        reference, interrupted = parameters(7), parameters(7)
        plain = kind(groups(reference), lr=0.01, paged=False, directory=tmp_path)
        other = kind(groups(interrupted), lr=0.01, paged=False, directory=tmp_path)
        steps(plain, reference, 2)
        steps(other, interrupted, 2)
        count, honest = [0], Tensor.copy_

        def copy(
            self: Tensor, *rest: Any, count: Any = count, honest: Any = honest, moment: int = moment
        ) -> Tensor:
            count[0] += 1
            if count[0] == moment:
                raise KeyboardInterrupt
            return honest(self, *rest)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Tensor, "copy_", copy)
            other.page_out()
        steps(plain, reference, 2, 1)
        steps(other, interrupted, 2, 1)
        assert all(torch.equal(a, b) for a, b in zip(reference, interrupted, strict=True))


def test_a_state_without_a_parameter_starts_it_from_zero(small_windows: None, tmp_path: Path):
    ours, theirs = parameters(3), parameters(3)
    paged = PagedAdamW(ours, lr=0.01, directory=tmp_path)
    plain = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.01)
    steps(paged, ours, 2)
    steps(plain, theirs, 2)
    for optimizer in (paged, plain):
        state = optimizer.state_dict()
        del state["state"][1]
        optimizer.load_state_dict(state)
    steps(paged, ours, 2, 1)
    steps(plain, theirs, 2, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", [PagedAdamW8bit, PagedAdamW])
def test_groups_may_be_added(kind: Any, tmp_path: Path):
    ours, theirs = parameters(5), parameters(5)
    paged, plain = (
        kind(ours[:3], directory=tmp_path),
        kind(theirs[:3], directory=tmp_path, paged=False),
    )
    for optimizer, params in ((paged, ours), (plain, theirs)):
        optimizer.add_param_group({"params": params[3:], "lr": 0.02})
        steps(optimizer, params, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"paging": "always", "optim": "adamw_8bit"}, "paged optimizer|paged_adamw_8bit"),
        (
            {"activation_offloading": "always", "gradient_checkpointing": False},
            "gradient_checkpointing",
        ),
        ({"tokens_per_tile": 3}, "at least 16"),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        TrainConfig(model="demo", data="none", **options)


def test_memory_that_does_not_come_back_ends_the_run(
    orders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Exhausting(monkeypatch, *range(1, 1000))
    with pytest.raises(DoesNotFit, match="out of memory in this phase: step 1"):
        train(tmp_path / "run", orders, rehearse=False)
    kinds = [json.loads(line) for line in (tmp_path / "run/memory.jsonl").read_text().splitlines()]
    assert len([row for row in kinds if row["phase"] == "less"]) >= 2


# --- slow proofs ----------------------------------------------------------------------------------

FIFTY = "import json, sys, halfbyte; halfbyte.train(**json.loads(sys.argv[1]))"


@pytest.mark.slow
def test_fifty_steps_killed_again_and_again_in_every_mode(
    orders: Path, tmp_path: Path, cache: Path
):
    """kill -9 at random moments, each resume in the next mode: the bytes of a run that was never
    disturbed, and of undisturbed runs in each mode."""
    whole = train(tmp_path / "whole", orders, max_steps=50)
    for way, more in WAYS.items():
        assert train(tmp_path / way.replace(" ", "-"), orders, max_steps=50, **more) == whole, way
    draw, killed, modes = random.Random(0), 0, list(WAYS.values())
    common: dict[str, Any] = {
        "model": "demo",
        "data": str(orders),
        "max_steps": 50,
        "num_samples": 0,
        "save_steps": 3,
    }
    common |= {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "resume_from_checkpoint": "auto",
    }
    out = tmp_path / "killed"
    for attempt in range(40):
        options = {**common, "output_dir": str(out), **modes[attempt % len(modes)]}
        process = subprocess.Popen(
            [sys.executable, "-c", FIFTY, json.dumps(options)], stderr=subprocess.DEVNULL
        )
        before = (
            len((out / "metrics.jsonl").read_text().splitlines())
            if (out / "metrics.jsonl").exists()
            else 0
        )
        while process.poll() is None:  # until it has made some steps, then a moment more
            time.sleep(0.05)
            now = (
                len((out / "metrics.jsonl").read_text().splitlines())
                if (out / "metrics.jsonl").exists()
                else 0
            )
            if now >= before + 8 and killed < 8:
                time.sleep(draw.random() * 0.4)
                process.kill()
                killed += process.wait() != 0
        if process.returncode == 0:
            break
    files = json.loads((out / "checkpoints/step-00000050/manifest.json").read_text())["files"]
    assert killed >= 4 and {name: files[name]["sha256"] for name in whole} == whole
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")], (
        "nothing is left behind"
    )


LARGER = """
import json, resource, sys
import halfbyte.training.trainer
import transformers.models.llama.modeling_llama
from halfbyte.memory.process import _status
resource.setrlimit(resource.RLIMIT_DATA, (_status()["VmData"] + int(sys.argv[1]),) * 2)
halfbyte.train(**json.loads(sys.argv[2]))
"""


@pytest.mark.slow
def test_a_base_larger_than_memory_takes_a_step(orders: Path, tmp_path: Path, cache: Path):
    """0.6 GB of 4-bit weights in a process that may take 500 MiB in all; bench/paging.py does it
    with 35 GB."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "paging", Path(__file__).parents[1] / "bench/paging.py"
    )
    assert spec is not None and spec.loader is not None
    paging = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
    try:
        spec.loader.exec_module(paging)
    finally:
        sys.path.pop(0)
    shape = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    }
    paging.SIZES["small"] = {**shape, "vocab_size": 4000}
    base = paging.make_packed("small", tmp_path)
    packed = sum(file.stat().st_size for file in base.glob("*.safetensors")) - 2 * 2 * 4000 * 2048
    options: dict[str, Any] = {
        "model": str(base),
        "data": str(orders),
        "output_dir": str(tmp_path / "run"),
    }
    options |= {
        "max_steps": 1,
        "num_samples": 0,
        "gradient_accumulation_steps": 1,
        "dtype": "bfloat16",
        "lora_r": 8,
    }
    arguments = [sys.executable, "-c", LARGER, str(500 * MIB), json.dumps(options)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 1 and packed > 600e6
    config = json.loads((tmp_path / "run/run.json").read_text())["config"]
    assert config["weight_streaming"] == "always", "by itself, as it does not fit otherwise"

"""Tests of `quantization.cache`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.config.options import ModelOptions
from halfbyte.errors import ModelError, StorageError
from halfbyte.files import hub
from halfbyte.files.safetensors import read_header, read_tensor, write_safetensors
from halfbyte.progress import no_progress
from halfbyte.quantization import writer
from halfbyte.quantization.bnb_format import quantized_names
from halfbyte.quantization.cache import _identity
from halfbyte.quantization.load import load_base
from halfbyte.quantization.tensor import NF4Tensor


@pytest.mark.parametrize("shard", [1 << 40, 20_000])
@pytest.mark.parametrize("double_quant", [True, False])
def test_streamed_weights_are_the_loaded_ones(
    tiny_config: LlamaConfig,
    tmp_path: Path,
    own_cache: Path,
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
    (entry,) = (own_cache / "bases").iterdir()
    assert (len(list(entry.glob("*.safetensors"))) == 1) == (shard > 1 << 30)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert isinstance(weight, NF4Tensor) and weight.streamed is not None
    assert len(list((own_cache / "bases").iterdir())) == 1


def test_the_cache_is_a_checkpoint_that_bitsandbytes_opens(
    tiny_config: LlamaConfig, tmp_path: Path, own_cache: Path
):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    tiny_config.intermediate_size = (
        128  # bitsandbytes' CPU kernel takes blocks that cross rows for others
    )
    LlamaForCausalLM(tiny_config).bfloat16().save_pretrained(tmp_path / "m")
    ours, _ = load_base(tmp_path / "m", ModelOptions(weight_streaming="always", dtype="bfloat16"))
    (entry,) = (own_cache / "bases").iterdir()
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


def test_a_changed_source_is_quantized_anew_and_a_damaged_entry_refused(
    tiny_config: LlamaConfig, tmp_path: Path, own_cache: Path
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
    file = own_cache / "bases" / second.digest / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-5000, os.SEEK_END)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 16]))
    with pytest.raises(ModelError, match="damaged; they are removed"):
        load_base(tmp_path / "m", streamed)
    _, again = load_base(tmp_path / "m", streamed)
    assert again.digest == second.digest


def test_the_same_weights_keep_their_own_configuration(
    tiny_config: LlamaConfig, tmp_path: Path, own_cache: Path
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
    assert len(list((own_cache / "bases").iterdir())) == 1


@pytest.mark.parametrize("harm", ["truncated", "missing", "no facts"])
def test_any_damage_of_the_cache_is_mended_by_repeating(
    tiny_config: LlamaConfig, tmp_path: Path, own_cache: Path, harm: str
):
    LlamaForCausalLM(tiny_config).bfloat16().save_pretrained(tmp_path / "m")
    streamed = ModelOptions(weight_streaming="always")
    _, first = load_base(tmp_path / "m", streamed)
    entry = own_cache / "bases" / first.digest
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


@pytest.mark.slow
def test_two_builders_make_one_entry_and_leftovers_go(
    tiny_config: LlamaConfig, tmp_path: Path, own_cache: Path
):
    LlamaForCausalLM(tiny_config).bfloat16().save_pretrained(tmp_path / "m")
    streamed = ModelOptions(weight_streaming="always")
    identity = _identity(tmp_path / "m", streamed)
    leftover = own_cache / "bases" / f".{identity[:32]}.tmp"  # of a process that was killed
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
    (made,) = (own_cache / "bases").iterdir()
    assert load_base(tmp_path / "m", streamed)[1].digest == made.name


def test_a_checkpoint_stored_in_other_units_is_streamed(
    tiny_config: LlamaConfig, tmp_path: Path, own_cache: Path
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


def test_other_bytes_of_the_same_size_and_time_are_another_base(tmp_path: Path):
    """As where a file is exchanged by a tool that keeps times."""
    model = shutil.copytree(hub.resolve("demo"), tmp_path / "model")
    before = _identity(model, ModelOptions())
    file = model / "model.safetensors"
    times = file.stat()
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert file.stat().st_mtime_ns == times.st_mtime_ns
    assert _identity(model, ModelOptions()) != before
    assert _identity(model, ModelOptions()) == _identity(model, ModelOptions())

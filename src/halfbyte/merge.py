"""The adapter added into the weights, shard by shard, and the proof that the result is the model that was trained.

Onto what? In training the adapter corrected the *4-bit* weights, errors included; adding it to those (``trained``)
gives the model that was trained, stored in 16 or 32 bits. Adding it to the original weights (``original``) gives
another model, without quantization error but also without what the adapter learned to compensate. Either way the
merged model is opened again from disk and compared, on rows of the training data, with the adapter running on the
base it was merged onto; a merge that fails is not called done.

Merging into weights that are then quantized again is not offered: the rounding erases most of what the adapter adds.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import hub, nf4
from .architecture import Progress, checkpoint_names, no_progress
from .chat import Renderer
from .config import ModelOptions
from .errors import DataError, ModelError, StorageError, UsageError, VerificationError
from .forms import Example, read_examples
from .load import load, load_base
from .lora import LoraLinear
from .nf4 import NF4Tensor
from .run import ADAPTER_FACTS, Run

FP32_LIMIT = 3_000_000_000
"""Models up to this many parameters are compared in fp32 arithmetic, larger ones in the run's compute dtype."""

PROBE_ROWS, PROBE_TOKENS = 16, 256


@dataclass(frozen=True)
class Receipt:
    """How far the merged model is from the adapter running on the same base."""

    onto: str
    compute_dtype: str
    rows: int
    tokens: int
    max_logit_difference: float
    largest_logit: float
    greedy_agreement: float
    agreement_with_trained_run: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge(
    run: str | Path,
    output_dir: str | Path,
    *,
    onto: str = "trained",
    min_agreement: float = 0.99,
    device: str = "auto",
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda line: None,
) -> Receipt:
    """Write the merged model beside output_dir, verify it, and only then give it that name.

    Args:
        onto: "trained" or "original". min_agreement: share of probe positions where both must predict the same token.

    Raises:
        UsageError: output_dir is not empty. ModelError: the run or its base is refused.
        VerificationError: the merged model is not the adapted one; nothing is left in output_dir.
    """
    source, target = Run.open(run), Path(output_dir).expanduser()
    if onto not in ("trained", "original"):
        raise UsageError(f'onto must be "trained" or "original", got {onto!r}')
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} is not empty, or no directory", ways_out=["name a new directory with -o"])
    info, config = source.info(), source.config()
    if config.full:
        raise UsageError("a full fine-tuning has no adapter to merge", found=str(source.adapter))
    building = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    hub.check_writable(building)
    base = hub.resolve(info["base"]["path"])
    dtype = _compute_dtype(base, info)
    try:
        reference, tokenizer = load(
            source.path,
            dtype=dtype,
            device=device,
            load_in_4bit=config.load_in_4bit and onto == "trained",
            progress=progress,
        )
        _write(base, building, reference, onto, progress)
        _write_config(base, source.adapter, building)
        say(f"merged onto the {onto} base; comparing the result with the running adapter")
        probes = _probes(source, tokenizer, say)
        receipt = _verify(building, reference, probes, onto, dtype, device)
        if onto == "original" and config.load_in_4bit:
            del reference
            receipt = _with_trained_run(receipt, source, building, probes, dtype, device)
        if not receipt.max_logit_difference < float("inf") or receipt.greedy_agreement < min_agreement:
            raise VerificationError(
                "the merged model is not the model that was trained; it was removed",
                found=f"{receipt.greedy_agreement:.2%} of {receipt.tokens} positions predict the same token, "
                f"logits differ by up to {receipt.max_logit_difference:.3g}",
                expected=f"at least {min_agreement:.2%}",
                ways_out=["use the adapter unmerged", "or lower --min_agreement if you accept the difference"],
            )
        hub.write_json(building / "merge.json", receipt.as_dict())
        try:
            building.replace(target)  # an empty directory of that name gives way
        except OSError as error:
            raise StorageError(f"cannot put the merged model at {target}: {error.strerror}") from error
    finally:  # a failure or an interrupt: half a model is not left behind
        shutil.rmtree(building, ignore_errors=True)
    return receipt


def _compute_dtype(base: Path, info: dict[str, Any]) -> Any:
    elements = sum(entry.nbytes // entry.dtype.itemsize for entry in hub.Checkpoint(base).entries.values())
    return "float32" if elements <= FP32_LIMIT else info["compute_dtype"]


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(base: Path, target: Path, model: Any, onto: str, progress: Progress) -> None:
    """The base's shards with the adapter added; one shard in memory at a time."""
    checkpoint = hub.Checkpoint(base)
    stored = nf4.quantized_names(set(checkpoint.entries))
    if stored and onto == "original":
        raise ModelError(
            f"{base} holds 4-bit weights only; the original ones are not there to merge onto",
            ways_out=["merge --onto trained"],
        )
    names = [name for name in checkpoint if not any(name.startswith(f"{q}.") for q in stored)]
    targets = checkpoint_names(model, names)
    weight_map: dict[str, str] = {}
    shards: dict[str, list[str]] = {}
    for name in names:
        shards.setdefault(checkpoint.entries[name].file.name, []).append(name)
    total = 0
    for file in progress(list(shards), len(shards), "merging"):
        tensors = {name: _merged(checkpoint, name, targets[name], model, onto, name in stored) for name in shards[file]}
        hub.write_safetensors(target / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(t.nbytes for t in tensors.values())
    if list(shards) != [hub.SINGLE]:
        hub.write_json(target / hub.INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _merged(checkpoint: hub.Checkpoint, name: str, path: str, model: Any, onto: str, stored: bool) -> Tensor:
    """One tensor of the merged model, in the dtype it has on disk."""
    module_name, _, attribute = path.rpartition(".")
    module = model.get_submodule(module_name) if attribute == "weight" else None
    weight = module.weight if module is not None else None
    if stored:
        assert isinstance(weight, NF4Tensor)
        dtype = nf4.read_stored(checkpoint, name).dtype
    else:
        dtype = checkpoint.entries[name].dtype
    adapted, quantized = isinstance(module, LoraLinear), isinstance(weight, NF4Tensor)
    if not adapted and not quantized:
        return checkpoint.read(name)
    value = weight.dequantize(torch.float32) if isinstance(weight, NF4Tensor) else checkpoint.read(name).float()
    if isinstance(module, LoraLinear):
        value = value + module.delta().to(value.device)
    return value.to("cpu", dtype)


def _write_config(base: Path, adapter: Path, target: Path) -> None:
    config = hub.read_json(base / "config.json")
    config.pop("quantization_config", None)
    hub.write_json(target / "config.json", config)
    weights_of_adapter = {"adapter_model.safetensors", "adapter_config.json", ADAPTER_FACTS}
    try:
        for file in adapter.iterdir():
            if file.name not in weights_of_adapter:
                shutil.copyfile(file, target / file.name)
    except OSError as error:
        raise StorageError(f"cannot write to {target}: {error.strerror}") from error


# --- verifying --------------------------------------------------------------------------------------------------------


def _probes(source: Run, tokenizer: Any, say: Callable[[str], None]) -> list[list[int]]:
    """Token rows to compare on: rows of the training data, or sentences where it is gone."""
    renderer = Renderer(tokenizer, clock=source.clock())
    try:
        config = source.config()
        found = read_examples(
            source.info()["data"]["source"],
            config=config.dataset_config,
            split=config.dataset_train_split,
            skip_bad=config.skip_bad,
        )
        examples = found.rows[:PROBE_ROWS]
    except DataError as error:
        say(f"the training data is gone ({error.what}): comparing on one built-in sentence instead")
        question = [{"role": "user", "content": "What is the capital of France, and why do people travel there?"}]
        examples = [Example("probe", [*question, {"role": "assistant", "content": "Paris. They like its museums."}])]
    # whole rows, trained or not: a long question must not leave the merge without probes
    return [row.input_ids[:PROBE_TOKENS] for row in renderer.encode(examples)]


@torch.inference_mode()
def _logits(model: Any, probes: list[list[int]]) -> list[Tensor]:
    device = model.get_input_embeddings().weight.device
    return [
        model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu() for ids in probes
    ]


def _agreement(a: list[Tensor], b: list[Tensor]) -> float:
    same = sum(int((x.argmax(-1) == y.argmax(-1)).sum()) for x, y in zip(a, b, strict=True))
    return same / sum(x.shape[0] for x in a)


def _verify(target: Path, reference: Any, probes: list[list[int]], onto: str, dtype: Any, device: str) -> Receipt:
    expected = _logits(reference, probes)
    merged, _ = load_base(target, ModelOptions(load_in_4bit=False, dtype=dtype, device=device))
    got = _logits(merged, probes)
    return Receipt(
        onto=onto,
        compute_dtype=dtype,
        rows=len(probes),
        tokens=sum(map(len, probes)),
        max_logit_difference=max(float((x - y).abs().max()) for x, y in zip(expected, got, strict=True)),
        largest_logit=max(float(x.abs().max()) for x in expected),
        greedy_agreement=_agreement(expected, got),
    )


def _with_trained_run(
    receipt: Receipt, source: Run, target: Path, probes: list[list[int]], dtype: Any, device: str
) -> Receipt:
    """The receipt with how often the merged model agrees with the 4-bit model that was trained."""
    trained, _ = load(source.path, dtype=dtype, device=device)
    expected = _logits(trained, probes)
    del trained
    merged, _ = load_base(target, ModelOptions(load_in_4bit=False, dtype=dtype, device=device))
    return Receipt(**{**receipt.as_dict(), "agreement_with_trained_run": _agreement(expected, _logits(merged, probes))})

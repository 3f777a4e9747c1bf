"""The adapter added into the weights, shard by shard, and the proof that the result is the model
that was trained.

Onto what? In training the adapter corrected the *4-bit* weights, errors included; adding it to
those (``trained``) gives the model that was trained, stored in 16 or 32 bits. Adding it to the
original weights (``original``) gives another model, without quantization error but also without
what the adapter learned to compensate. Which is nearer to the model that was trained is measured,
not believed: both are written, opened again from disk and compared with the running adapter on the
same rows, held-out ones where there are any (KL divergence, greedy agreement, loss). The one that
was asked for is kept, and the better one recommended. A merge that is not the adapter on its base
is not called done.

Rounding the merged weights to 4 bits again erases part of what the adapter adds, often most of it:
an adapter's change is small beside the distance of two levels. ``requantize`` therefore measures,
layer by layer, the share that survives, and refuses below a threshold.
"""

import math
import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.lora import LoraLinear, lora_layers
from ..adapters.modules_to_save import trained_whole
from ..config.options import ModelOptions
from ..data.renderer import TokenizedExample
from ..errors import ModelError, StorageError, UsageError, VerificationError
from ..files import atomic, hub
from ..files.safetensors import INDEX, SINGLE, Checkpoint, write_safetensors
from ..model.architecture import FP32_LIMIT
from ..model.targets import checkpoint_names
from ..progress import Progress, no_progress
from ..quantization.bnb_format import quantized_names, read_stored, weight_names
from ..quantization.load import load_base
from ..quantization.tensor import NF4Tensor
from ..quantization.weights import quantize_as
from ..quantization.writer import quantize
from ..run.card import CARD, merged_card
from ..run.directory import ADAPTER_FACTS, Run
from ..run.load import load
from .verify import Comparison, _agreement, _compare, _logits, _loss, _probes


@dataclass(frozen=True)
class Receipt:
    """How far the merged model is from the adapter running on the same base, and from the model
    that was trained.

    rows_are: "held out", "of the training data", "of the data as it is now", or "built in".
    running_loss: of the run, adapter on the base as trained. max_logit_difference, largest_logit,
    greedy_agreement: of the merge, before it is requantized if it is. comparisons: with the run, by
    what is merged onto (with requantize, also of what came of it). recommended: the one with the
    least KL divergence. surviving: with requantize, the least, median and greatest share of the
    adapter's effect over its layers.
    """

    onto: str
    compute_dtype: str
    rows: int
    rows_are: str
    tokens: int
    max_logit_difference: float
    largest_logit: float
    greedy_agreement: float
    running_loss: float
    comparisons: dict[str, Comparison]
    recommended: str
    surviving: tuple[float, float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def merge(
    run: str | Path,
    output_dir: str | Path,
    *,
    onto: str = "trained",
    min_agreement: float = 0.99,
    requantize: bool = False,
    min_survival: float = 0.9,
    device: str = "auto",
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda line: None,
) -> Receipt:
    """Write the merged model beside output_dir, verify it, and only then give it that name.

    Args:
        onto: "trained" or "original".
        min_agreement: share of probe positions where both must predict the same token.
        requantize: write the merged weights in 4 bits.
        min_survival: the share of the adapter's effect that has to survive that, in the median
            layer.

    Raises:
        UsageError: output_dir is not empty.
        ModelError: the run or its base is refused.
        VerificationError: the merged model is not the adapted one, or too little survives; nothing
            is left in output_dir.
    """
    source, target = Run.open(run), Path(output_dir).expanduser().absolute()
    if onto not in ("trained", "original"):
        raise UsageError(f'onto must be "trained" or "original", got {onto!r}')
    if source.config().full:
        raise UsageError("a full fine-tuning has no adapter to merge", found=str(source.adapter))
    with atomic.new_directory(target) as building:
        merger = _Merger(source, building, device, progress, say)
        receipt = merger.run(onto, min_agreement)
        result = merger.built[onto]
        if requantize:
            result, shares, found = merger.requantized(onto, min_survival)
            comparisons = {**receipt.comparisons, f"{onto}, requantized": found}
            receipt = replace(receipt, surviving=shares, comparisons=comparisons)
            say(
                f"what is kept, in 4 bits, predicts {found.greedy_agreement:.2%} of the tokens as "
                "the run does"
            )
        atomic.write_json(result / "merge.json", receipt.as_dict())
        atomic.write_bytes(
            result / CARD, merged_card(source, source.info(), receipt.as_dict()).encode()
        )
        merger.keep(result)
    return receipt


class _Merger:
    """One run, merged onto what there is, in a directory of its own."""

    def __init__(
        self,
        source: Run,
        directory: Path,
        device: str,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self.source, self.directory, self.device = source, directory, device
        self.progress, self.say = progress, say
        self.config, info = source.config(), source.info()
        self.base = hub.resolve(info["base"]["path"])
        self.dtype = _compute_dtype(self.base, info)
        self.built: dict[str, Path] = {}
        self.rows: list[TokenizedExample] = []
        self.expected: list[Tensor] = []

    def run(self, onto: str, min_agreement: float) -> Receipt:
        """Merge onto every base there is, compare, and verify the one that was asked for.

        Raises:
            VerificationError: it is not the adapter running on its base.
        """
        others = ["trained", "original"] if self._has_both() else []
        running, _ = self._load()
        rows, rows_are = _probes(self.source, self.say)
        self.rows, self.expected = rows, _logits(running, rows)
        expected = self.expected
        self._build(onto, running)
        for other in others:
            if other != onto:
                try:
                    self._build(other, running)
                except StorageError as error:  # it would only have been compared
                    self.say(f"not compared with a merge onto the {other} base: {error.what}")
        reference = expected
        if onto == "original" and self.config.load_in_4bit:
            del running
            reference = _logits(self._load(load_in_4bit=False)[0], rows)
        self.say(f"merged onto the {onto} base; comparing the result with the running adapter")
        comparisons, got = {}, expected
        for name, path in self.built.items():
            merged, _ = load_base(
                path, ModelOptions(load_in_4bit=False, dtype=self.dtype, device=self.device)
            )
            found = _logits(merged, rows)
            del merged
            comparisons[name] = _compare(expected, found, rows)
            got = found if name == onto else got
        receipt = Receipt(
            onto=onto,
            compute_dtype=self.dtype,
            rows=len(rows),
            rows_are=rows_are,
            tokens=sum(len(row.input_ids) for row in rows),
            max_logit_difference=max(
                float((x - y).abs().max()) for x, y in zip(reference, got, strict=True)
            ),
            largest_logit=max(float(x.abs().max()) for x in reference),
            greedy_agreement=_agreement(reference, got),
            running_loss=_loss(expected, rows),
            comparisons=comparisons,
            recommended=min(comparisons, key=lambda name: comparisons[name].kl),
        )
        differ = round((1 - receipt.greedy_agreement) * receipt.tokens)
        # of few positions one may differ: two tokens that are as good as equally likely
        too_many = differ > math.ceil((1 - min_agreement) * receipt.tokens)
        if not receipt.max_logit_difference < float("inf") or too_many:
            raise VerificationError(
                "the merged model is not the model that was trained; it was removed",
                found=f"{receipt.greedy_agreement:.2%} of {receipt.tokens} positions predict the "
                "same token, "
                f"logits differ by up to {receipt.max_logit_difference:.3g}",
                expected=f"at least {min_agreement:.2%}",
                ways_out=[
                    "use the adapter unmerged",
                    "or lower --min_agreement if you accept the difference",
                ],
            )
        return receipt

    def _build(self, onto: str, running: Any) -> None:
        path = self.directory / onto
        try:
            path.mkdir()
            _write(self.base, path, running, onto, self.progress)
            _write_config(self.base, self.source.adapter, path)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        self.built[onto] = path

    def keep(self, result: Path) -> None:
        """Leave one of the merged models in the directory, and nothing else."""
        for file in list(result.iterdir()):
            file.rename(self.directory / file.name)
        for path in {*self.built.values(), result}:
            shutil.rmtree(path)

    def _load(self, **changes: Any) -> tuple[Any, Any]:
        options = {"dtype": self.dtype, "device": self.device, **changes}
        return load(self.source.path, progress=self.progress, **options)

    def _has_both(self) -> bool:
        """Whether the base the adapter was trained on and the original one are two."""
        stored = quantized_names(set(Checkpoint(self.base).entries))
        return self.config.load_in_4bit and not stored

    def requantized(
        self, onto: str, min_survival: float
    ) -> tuple[Path, tuple[float, float, float], Comparison]:
        """The merged model in 4 bits, how much of the adapter's effect survives it (least, median,
        greatest), and what became of the model.

        Raises:
            VerificationError: less than ``min_survival`` in the median layer.
        """
        options = ModelOptions(**{**self.config.holding(), "load_in_4bit": True})
        running, _ = self._load(**({} if onto == "trained" else {"load_in_4bit": False}))
        shares: dict[str, float] = {}
        layers = list(lora_layers(running))
        for name in self.progress(
            [name for name, _ in layers], len(layers), "measuring what survives"
        ):
            shares[name] = surviving_share(running.get_submodule(name), options)
        least, middle, most = (
            min(shares.values()),
            statistics.median(shares.values()),
            max(shares.values()),
        )
        worst = min(shares, key=lambda name: shares[name])
        line = (
            f"{middle:.1%} of the adapter's effect survive in the median layer ({least:.1%} to "
            f"{most:.1%})"
        )
        if middle < min_survival:
            raise VerificationError(
                f"rounding the merged weights to 4 bits erases too much of the adapter: {line}",
                where=worst,
                expected=f"at least {min_survival:.0%}",
                ways_out=[
                    "merge without --requantize: 16 bits keep all of it",
                    "keep base and adapter apart: every tool that opens 4-bit bases takes the "
                    "adapter",
                    "or lower --min_survival if you accept the loss",
                ],
            )
        self.say(f"requantized: {line}")
        path = self.directory / "4bit"
        quantize(self.built[onto], options, path, self.progress)
        held = ModelOptions(**{**options.holding(), "dtype": self.dtype, "device": self.device})
        held.weight_streaming = "never"
        model, _ = load_base(path, held)
        return (
            path,
            (least, middle, most),
            _compare(self.expected, _logits(model, self.rows), self.rows),
        )


def surviving_share(layer: LoraLinear, options: ModelOptions) -> float:
    """Share of an adapter's change D of a weight W that is left when the sum is rounded to 4 bits:
    the projection of Q(W + D) - Q(W) onto D, over D's square. 1: all of it, 0: none; beside it is
    noise, which has no direction.

    W is as it lies in the base; where that is rounded already, Q(W) is W.
    """
    weight = layer.base_weight().float()
    change = layer.merged(weight) - weight
    before = (
        weight
        if isinstance(layer.weight, NF4Tensor)
        else quantize_as(weight, options).dequantize(torch.float32)
    )
    after = quantize_as(weight + change, options).dequantize(torch.float32)
    power = float(change.double().square().sum())
    return float(((after - before).double() * change.double()).sum()) / power if power else 1.0


def _compute_dtype(base: Path, info: dict[str, Any]) -> Any:
    elements = sum(
        entry.nbytes // entry.dtype.itemsize for entry in Checkpoint(base).entries.values()
    )
    return "float32" if elements <= FP32_LIMIT else info["compute_dtype"]


# --- writing --------------------------------------------------------------------------------------


def _write(base: Path, target: Path, model: Any, onto: str, progress: Progress) -> None:
    """The base's shards with the adapter added; one shard in memory at a time."""
    checkpoint = Checkpoint(base)
    stored = quantized_names(set(checkpoint.entries))
    if stored and onto == "original":
        raise ModelError(
            f"{base} holds 4-bit weights only; the original ones are not there to merge onto",
            ways_out=["merge --onto trained"],
        )
    names = weight_names(checkpoint, stored)
    targets, whole = checkpoint_names(model, names), trained_whole(model)
    weight_map: dict[str, str] = {}
    shards: dict[str, list[str]] = {}
    for name in names:
        shards.setdefault(checkpoint.entries[name].file.name, []).append(name)
    total = 0
    for file in progress(list(shards), len(shards), "merging"):
        tensors = {
            name: _whole(checkpoint, name, whole[targets[name]])
            if targets[name] in whole
            else _merged(checkpoint, name, targets[name], model, onto, name in stored)
            for name in shards[file]
        }
        write_safetensors(target / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
        total += sum(t.nbytes for t in tensors.values())
    if list(shards) != [SINGLE]:
        atomic.write_json(
            target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _whole(checkpoint: Checkpoint, name: str, trained: Tensor) -> Tensor:
    """A parameter that was trained itself, in the dtype it has on disk."""
    return trained.detach().to("cpu", checkpoint.entries[name].dtype)


def _merged(
    checkpoint: Checkpoint, name: str, path: str, model: Any, onto: str, stored: bool
) -> Tensor:
    """One tensor of the merged model, in the dtype it has on disk."""
    module_name, _, attribute = path.rpartition(".")
    try:
        module = model.get_submodule(module_name)
    except AttributeError:  # older checkpoints hold buffers that models compute today
        return checkpoint.read(name)
    weight = module.weight if attribute == "weight" else None
    kept = read_stored(checkpoint, name) if stored else None
    dtype = checkpoint.entries[name].dtype if kept is None else kept.dtype
    rounded = weight if isinstance(weight, NF4Tensor) and onto == "trained" else kept
    adapted = module if isinstance(module, LoraLinear) and attribute == "weight" else None
    if adapted is None and rounded is None:
        return checkpoint.read(name)
    value = checkpoint.read(name).float() if rounded is None else rounded.dequantize(torch.float32)
    if adapted is not None:
        value = adapted.merged(value)
    return value.to("cpu", dtype)


def _write_config(base: Path, adapter: Path, target: Path) -> None:
    config = atomic.read_json(base / "config.json")
    config.pop("quantization_config", None)
    atomic.write_json(target / "config.json", config)
    weights_of_adapter = {"adapter_model.safetensors", "adapter_config.json", ADAPTER_FACTS}
    try:
        for file in adapter.iterdir():
            if file.name not in weights_of_adapter:
                shutil.copyfile(file, target / file.name)
    except OSError as error:
        raise StorageError(f"cannot write to {target}: {error.strerror}") from error

"""The adapter added into the weights, shard by shard, and the proof that the result is the model
that was trained.

Onto what? In training the adapter corrected the *4-bit* weights, errors included; adding it to
those (``trained``) gives the model that was trained, stored in 16 or 32 bits. Adding it to the
original weights (``original``) gives another model, without quantization error but also without
what the adapter learned to compensate. Which is better is measured, not believed: both are written
and judged, with the run and the models it was made of, on the same rows, held-out ones where there
are any. The one that was asked for is kept, and the best one recommended.

A merge is not called done before two judges agree: every tensor is computed again from the files
alone (`exporters.exact`), and the model, opened again, behaves as the run does up to what rounding
does to it (`exporters.verify`).

Rounding the merged weights to 4 bits again erases part of what the adapter adds, often most of it:
an adapter's change is small beside the distance of two levels. ``requantize`` therefore measures,
layer by layer, the share that survives, and refuses below a threshold.
"""

import contextlib
import shutil
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..adapters.lora import LoraLinear, lora_layers
from ..adapters.peft_files import adapter_off
from ..config.options import ModelOptions
from ..data.encoder import TokenizedExample
from ..engine.evaluate import RowLosses
from ..engine.judge import BASE, ORIGINAL, RUN
from ..errors import StorageError, UsageError, VerificationError
from ..files import atomic
from ..files.safetensors import Checkpoint
from ..memory.process import return_freed
from ..model.architecture import FP32_LIMIT
from ..model.defaults import with_plain_defaults
from ..model.experts import is_experts
from ..model.fp32 import model_in_fp32
from ..progress import Progress, no_progress
from ..quantization.bnb_format import quantized_names, read_stored
from ..quantization.load import load_base
from ..quantization.original import OriginalWeights
from ..quantization.tensor import NF4Tensor
from ..quantization.weights import quantize_as
from ..quantization.writer import quantize
from ..run.card import CARD, merged_card
from ..run.load import load
from ..run.source import MERGED, Source
from .exact import Recomputed, recompute
from .receipt import Receipt
from .verify import (
    HELD_OUT,
    NOISE_FACTOR,
    NOISE_FLOOR,
    Behaviour,
    Comparison,
    behaviour,
    compare,
    probes,
)
from .write import write_config, write_merged


@with_plain_defaults
def merge(
    run: str | Path,
    output_dir: str | Path,
    *,
    onto: str = "trained",
    max_noise: float = NOISE_FACTOR,
    min_agreement: float | None = None,
    requantize: bool = False,
    min_survival: float = 0.9,
    device: str = "auto",
    base: str | None = None,
    progress: Progress = no_progress,
    say: Callable[[str], None] = lambda line: None,
) -> Receipt:
    """Write the merged model beside output_dir, verify it, and only then give it that name.

    Args:
        run: a run directory, or an adapter that PEFT wrote.
        onto: "trained" or "original".
        max_noise: how many times the KL divergence that rounding alone causes is accepted; of a
            mixture of experts, that of the median position.
        min_agreement: share of positions at which the merged model has to predict the same token.
        base: the base's directory or Hub id, where it is not where the run says.
        requantize: write the merged weights in 4 bits.
        min_survival: the share of the adapter's effect that has to survive that, in the median
            layer.

    Raises:
        UsageError: output_dir is not empty.
        ModelError: the run or its base is refused.
        VerificationError: the merged model is not the adapted one, or too little survives; nothing
            is left in output_dir.
    """
    source = Source.open(run, device, base)
    target = Path(output_dir).expanduser().absolute()
    if onto not in ("trained", "original"):
        raise UsageError(f'onto must be "trained" or "original", got {onto!r}')
    if source.full:
        raise UsageError("a full fine-tuning has no adapter to merge", found=str(source.adapter))
    with atomic.new_directory(target) as building:
        merger = _Merger(source, building, device, progress, say)
        receipt = merger.run(onto, max_noise)
        _refuse_disagreement(receipt, min_agreement)
        result = merger.built[onto]
        if requantize:
            result, shares, found = merger.requantized(onto, min_survival)
            comparisons = {**receipt.comparisons, f"{onto}, requantized": found}
            receipt = replace(receipt, surviving=shares, comparisons=comparisons)
            say(
                f"what is kept, in 4 bits, predicts {found.greedy_agreement:.2%} of the tokens as "
                "the run does"
            )
        atomic.write_json(result / MERGED, receipt.as_dict())
        atomic.write_bytes(
            result / CARD, merged_card(source.run, source.name, receipt.as_dict()).encode()
        )
        merger.keep(result)
    return receipt


def _refuse_disagreement(receipt: Receipt, least: float | None) -> None:
    if least is not None and receipt.greedy_agreement < least:
        raise VerificationError(
            "the merged model predicts other tokens than the run does; it was removed",
            found=f"the same token at {receipt.greedy_agreement:.2%} of positions",
            expected=f"at least {least:.2%} (--min_agreement)",
            ways_out=["use the adapter unmerged", "or lower --min_agreement"],
        )


class _Merger:
    """One adapter, merged onto what there is, in a directory of its own.

    Attributes:
        built: directories of merged models, by what they are merged onto.
        exact: how the run behaves in fp32.
        start: what the model the training began with loses, where it is at hand.
    """

    def __init__(
        self,
        source: Source,
        directory: Path,
        device: str,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self.source, self.directory, self.device = source, directory, device
        self.progress, self.say = progress, say
        self.base = source.base
        self.dtype = _compute_dtype(self.base, source.compute_dtype)
        # the merged model's roundings: of the compute dtype, or where that is fp32, as it is stored
        self.narrow = _stored_dtype(self.base) if self.dtype == "float32" else self.dtype
        self.built: dict[str, Path] = {}
        self.rows: list[TokenizedExample] = []
        self.exact: Behaviour | None = None
        self.start: RowLosses | None = None
        self.others = ["trained", "original"] if self._has_both() else []

    def run(self, onto: str, max_noise: float) -> Receipt:
        """Merge onto every base there is, compare, and verify the one that was asked for.

        Raises:
            VerificationError: it is not the adapter running on its base.
        """
        running, _ = self._load()
        recomputed = self._build(onto, running)
        original = OriginalWeights(running, self.base)
        mixture = any(map(is_experts, running.modules()))
        self.rows, rows_are = probes(self.source, self.say)
        losses, wanted, noise = self._before(running, original, onto)
        for other in self.others:
            if other != onto:
                try:
                    self._build(other, running)
                except StorageError as error:  # it would only have been compared
                    self.say(f"not compared with a merge onto the {other} base: {error.what}")
        del running, original
        self.say(f"merged onto the {onto} base; comparing the result with the running adapter")
        assert self.exact is not None
        comparisons: dict[str, Comparison] = {}
        itself = Comparison(0.0, 1.0, 0.0)
        for name, path in self.built.items():
            found = self._behaviour_of(path)
            comparisons[name] = compare(self.exact, found, self.start)
            if name == onto:
                itself = compare(wanted, found)
        receipt = Receipt(
            onto=onto,
            compute_dtype=self.dtype,
            rows=len(self.rows),
            rows_are=rows_are,
            tokens=sum(len(row.input_ids) for row in self.rows),
            recomputed=recomputed,
            rounded_to=self.narrow,
            noise=noise.kl,
            kl=itself.kl,
            typical=(itself.typical_kl, noise.typical_kl) if mixture else None,
            greedy_agreement=itself.greedy_agreement,
            running_loss=losses[RUN],
            losses=losses,
            comparisons=comparisons,
            recommended=_best(comparisons, rows_are),
        )
        kl, own = receipt.typical or (itself.kl, noise.kl)
        limit = max_noise * max(own, NOISE_FLOOR)
        if not kl <= limit:
            per = "in the median token" if mixture else "a token"
            raise VerificationError(
                "the merged model does not behave as the model that was trained; it was removed",
                found=f"KL divergence {kl:.2e} nats {per}, {itself.greedy_agreement:.2%} "
                "of the likeliest tokens the same",
                expected=f"at most {limit:.2e}: {max_noise:g} times what rounding to "
                f"{self.narrow} does to it by itself ({own:.2e})",
                ways_out=[
                    "use the adapter unmerged",
                    "or raise --max_noise if you accept the difference",
                ],
            )
        return receipt

    def _before(
        self, running: Any, original: OriginalWeights, onto: str
    ) -> tuple[dict[str, float], Behaviour, Comparison]:
        """How the run and the models it was made of behave: their losses, what the merge is to
        behave as, and how far rounding alone takes that."""

        def of(name: str) -> Behaviour:
            return self._measure(running, name)

        with model_in_fp32(running):
            self.exact = of("the run in fp32")
        rounding = running if self.narrow == self.dtype else self._load(dtype=self.narrow)[0]
        rough = self._measure(rounding, "the run with its roundings")
        losses = {RUN: rough.losses.mean if rounding is running else self.exact.losses.mean}
        wanted = self.exact
        if self.source.holding.load_in_4bit:
            with adapter_off(running):
                losses = {BASE: of("its base in 4 bits").losses.mean, **losses}
        if original.available:
            with adapter_off(running), original.in_use():
                self.start = of("the original model").losses
            losses = {ORIGINAL: self.start.mean, **losses}
            if onto == "original" and self.source.holding.load_in_4bit:
                wanted = self._on_original(running, "float32")
                rough = self._on_original(rounding, self.narrow)
        return losses, wanted, compare(wanted, rough)

    def _on_original(self, running: Any, dtype: str) -> Behaviour:
        """How the adapter does on the original model, in a compute dtype."""
        name = f"the adapter on the original model, in {dtype}"
        if any(layer.adapter.use_dora for _, layer in lora_layers(running)):
            # its layers hold the norms of the weights they were made on
            return self._measure(self._load(load_in_4bit=False, dtype=dtype)[0], name)
        wide = model_in_fp32(running) if dtype == "float32" else contextlib.nullcontext()
        with OriginalWeights(running, self.base).in_use(), wide:
            return self._measure(running, name)

    def _measure(self, model: Any, name: str) -> Behaviour:
        return_freed()  # what another model and its answers took
        return behaviour(model, self.rows, self.progress, name)

    def _behaviour_of(self, path: Path) -> Behaviour:
        return_freed()
        merged, _ = load_base(
            path, ModelOptions(load_in_4bit=False, dtype=self.dtype, device=self.device)
        )
        return self._measure(merged, "the merged model")

    def _build(self, onto: str, running: Any) -> Recomputed:
        """Write a merged model, and compute it again."""
        path = self.directory / onto
        try:
            path.mkdir()
            write_merged(self.base, path, running, onto, self.progress)
            write_config(self.base, self.source.adapter, path, running)
            found = recompute(
                path,
                self.base,
                self.source.adapter,
                running,
                onto,
                self.source.holding,
                self.progress,
            )
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        self.built[onto] = path
        return found

    def keep(self, result: Path) -> None:
        """Leave one of the merged models in the directory, and nothing else."""
        for file in list(result.iterdir()):
            file.rename(self.directory / file.name)
        for path in {*self.built.values(), result}:
            shutil.rmtree(path)

    def _load(self, **changes: Any) -> tuple[Any, Any]:
        options = {"dtype": self.dtype, "device": self.device, **changes}
        return load(self.source.path, progress=self.progress, base=str(self.source.base), **options)

    def _has_both(self) -> bool:
        """Whether the base the adapter was trained on and the original one are two."""
        stored = quantized_names(set(Checkpoint(self.base).entries))
        return self.source.holding.load_in_4bit and not stored

    def requantized(
        self, onto: str, min_survival: float
    ) -> tuple[Path, tuple[float, float, float], Comparison]:
        """The merged model in 4 bits, how much of the adapter's effect survives it (least, median,
        greatest), and what became of the model.

        Raises:
            VerificationError: less than ``min_survival`` in the median layer.
        """
        options = ModelOptions(**{**self.source.holding.holding(), "load_in_4bit": True})
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
        assert self.exact is not None
        found = self._measure(model, "what is kept")
        return path, (least, middle, most), compare(self.exact, found, self.start)


def _best(comparisons: dict[str, Comparison], rows_are: str) -> str:
    """The merge that loses least on held-out rows; without any, the one nearest to the run."""
    judged = rows_are == HELD_OUT
    return min(
        comparisons, key=lambda name: comparisons[name].loss if judged else comparisons[name].kl
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


def _compute_dtype(base: Path, trained_in: str) -> Any:
    elements = sum(
        entry.nbytes // entry.dtype.itemsize for entry in Checkpoint(base).entries.values()
    )
    return "float32" if elements <= FP32_LIMIT else trained_in


def _stored_dtype(base: Path) -> str:
    """The narrowest type that a base's weights are stored in; of 4-bit ones, the type they are
    merged to."""
    checkpoint = Checkpoint(base)
    stored = sorted(quantized_names(set(checkpoint.entries)))
    found = [read_stored(checkpoint, stored[0]).dtype] if stored else []
    found += [entry.dtype for name, entry in checkpoint.entries.items() if name not in stored]
    narrow = [dtype for dtype in found if dtype in (torch.bfloat16, torch.float16)]
    return str(narrow[0] if narrow else torch.float32).removeprefix("torch.")

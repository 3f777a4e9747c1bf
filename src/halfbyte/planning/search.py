"""Plans under changing options: what `auto` means here, ways out, and the fastest plan that
fits."""

import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config.options import SEARCHED, TrainConfig
from ..data.batches import prepare
from ..data.dataset import Data
from ..engine.reductions import LENGTH_STEP, REDUCTIONS, Situation
from ..errors import DataError, HalfbyteError, UsageError
from ..files.model_config import context_of, read_config
from ..files.safetensors import Checkpoint
from ..memory.process import UNASKED_SHARE, held_now, return_freed
from ..model.architecture import TIES, choose_dtype
from ..model.host_embedding import reason_to_stay
from ..progress import Progress, no_progress
from .budget import MIB, budget_of
from .dry_run import plan_memory
from .memory_plan import Choice, MemoryPlan, in_words
from .workload import work_of


def ways_in_words(plan: MemoryPlan, planner: "Planner") -> list[str]:
    """Ways out of a plan that did not hold."""
    if plan.choices and not plan.fits:  # else they are what was tried
        return in_words(plan)
    try:
        return in_words(replace(plan, choices=planner.ways_out(plan)))
    except (HalfbyteError, MemoryError, RuntimeError):
        return []


LEFT_BY_PLANS = 8 << 20
"""Bytes that a process may have grown by planning before they are given back."""


@dataclass
class Planner:
    """Plans of one model and one set of rows under changing options."""

    path: Path
    config: TrainConfig
    data: Data | None
    progress: Progress = no_progress

    def __post_init__(self) -> None:
        self.model_config = read_config(self.path)
        # what reading the rows left behind is no part of the process
        gc.collect()
        return_freed()
        self.budget = budget_of(self.config)
        self.dtype = _dtype_for(self.config, self.budget.device)
        self.context = context_of(self.model_config)
        self.held = held_now()
        try:
            self.stored: Checkpoint | None = Checkpoint(self.path)
        except HalfbyteError:
            self.stored = None

    def plan(self, **change: Any) -> MemoryPlan:
        config = self.config.model_copy(update=change)
        try:
            return plan_memory(
                self.model_config,
                config,
                work_of(config, self._data_for(config), self.context),
                device=self.budget.device,
                dtype=self.dtype,
                stored=self.stored,
                runtime_bytes=self.budget.runtime,
                budget_bytes=self.budget.bytes,
            )
        finally:
            # models without numbers refer to themselves, and would wait for the collector
            if held_now() > self.held + LEFT_BY_PLANS:
                gc.collect()
                return_freed()

    def _data_for(self, config: TrainConfig) -> Data | None:
        """The data, rows cut where max_length is smaller than what they were read with."""
        if self.data is None or config.max_length >= self.data.max_length:
            return self.data
        limit, held_out = config.max_length, self.data.held_out
        train = prepare(self.data.train.rows, limit, config.over_length)
        held_out = prepare(held_out, limit, config.over_length).rows if held_out else []
        return replace(self.data, train=train, held_out=held_out, max_length=limit)

    def choice(self, plan: MemoryPlan, loses: str = "", **change: Any) -> Choice:
        other = self.plan(**change)
        return Choice(
            change, other.peak_bytes, other.relative_time / plan.relative_time, other.fits, loses
        )

    # --- what is left to us ---

    def resolve_auto(self) -> tuple[dict[str, Any], MemoryPlan]:
        """Options left to `auto`, decided, and the plan with them: what need not be in memory
        leaves it where the plan does not fit otherwise; where it does, layers keep their
        activations as far as there is room for speed alone.

        None of it changes a number but ``tokens_per_pass`` and ``tokens_per_tile``, which are last:
        they add in another order.
        """
        kept: dict[str, Any] = (
            {"kept_activations": "none"} if self.config.kept_activations == "auto" else {}
        )
        plan = self.plan()
        if plan.fits:
            return (self._most_layers({}, plan) if kept else None) or (kept, plan)
        change, relieved = self._relieved(kept, self._at_start())
        return (change, relieved) if relieved is not None else ({}, plan)

    def _relieved(
        self, change: dict[str, Any], reductions: Iterable[dict[str, Any]]
    ) -> tuple[dict[str, Any], MemoryPlan | None]:
        """A change, and of the reductions as many as it takes to fit; the plan of both, None where
        all are not enough."""
        for more in reductions:
            try:
                plan = self.plan(**{**change, **more})
            except UsageError:  # not for this model
                continue
            change = {**change, **more}
            if plan.fits:
                return change, plan
        return change, None

    def _at_start(self) -> Iterator[dict[str, Any]]:
        """Changes that a training may make by itself where it does not fit, the cheapest first."""
        for reduction in REDUCTIONS:
            if change := reduction.at_start(self.config, self._situation()):
                yield change

    def _situation(self) -> Situation:
        c = self.config
        data = self._data_for(c)
        length = min(c.max_length, self.data.max_length if self.data else c.max_length)
        return Situation(
            device=self.budget.device,
            embedding_may_move=self._embedding_may_move(),
            longest=int(data.train.rows.lengths.max()) if data else c.max_length,
            largest=len(work_of(c, data, self.context).batch.input_ids),
            length=length,
        )

    def _embedding_may_move(self) -> bool:
        """Whether the embedding table could lie in host memory: beside a GPU, frozen, and read by
        nothing else."""
        trained = self.config.full or "embed" in self.config.modules_to_save
        ties = getattr(self.model_config.get_text_config(), TIES, False)
        tied = ties and self.config.tie_word_embeddings
        return not reason_to_stay(self.budget.device, trained, tied)

    def _most_layers(
        self, change: dict[str, Any], least: MemoryPlan
    ) -> tuple[dict[str, Any], MemoryPlan] | None:
        """The plan in which as many layers keep all of their activations as there is room for; None
        if none do."""
        c = self.config
        if not c.gradient_checkpointing or not self.budget.bytes:
            return None
        share = 1.0 if c.fit_to else UNASKED_SHARE
        available = self.budget.runtime + int((self.budget.bytes - self.budget.runtime) * share)
        available = min(available, least.budget_bytes - least.reserve_bytes)
        layers = getattr(self.model_config.get_text_config(), "num_hidden_layers", 0)
        every = {**change, "kept_activations": "all", "kept_layers": c.kept_layers}
        most = self.plan(**every)
        if most.peak_bytes <= available:
            return every, most
        low, high = least.peak_bytes, most.peak_bytes
        layers = min(layers, c.kept_layers) if c.kept_layers >= 0 else layers
        count = int(layers * (available - low) / (high - low)) if high > low else 0
        while count > 0:
            some = {**every, "kept_layers": count}
            plan = self.plan(**some)
            if plan.peak_bytes <= available:
                return some, plan
            count = min(count - 1, int(count * (available - low) / max(plan.peak_bytes - low, 1)))
        return None

    # --- ways out ---

    def ways_out(self, plan: MemoryPlan) -> tuple[Choice, ...]:
        """Changes that need less memory, those that change no result first; each by itself."""
        situation = self._situation()
        advised = [(r, r.as_advice(self.config, situation)) for r in REDUCTIONS]
        candidates = [(r.costs(self.config), change) for r, change in advised if change]
        found = []
        for number in self.progress(
            [str(i) for i in range(len(candidates))], len(candidates), "looking for ways out"
        ):
            loses, change = candidates[int(number)]
            try:
                choice = self.choice(plan, loses, **change)
            except HalfbyteError:
                continue
            if choice.peak_bytes < plan.peak_bytes - MIB:
                found.append(choice)
        return tuple(found)

    # --- the fastest that fits ---

    def fit(self) -> MemoryPlan:
        """The fastest plan that fits: over what is kept and how the same global batch is cut; and
        what each choice costs. Rows are cut as a last resort, in steps of 128 tokens. Where nothing
        fits, the plan of the options as they are, with ways out.
        """
        c = self.config
        given = self.plan()
        total = c.per_device_train_batch_size * c.gradient_accumulation_steps
        as_given = {name: getattr(c, name) for name in SEARCHED}
        if c.kept_activations == "auto":
            as_given["kept_activations"] = "none"
        tried: list[tuple[dict[str, Any], MemoryPlan]] = [(as_given, given)]
        keeps = ("all", "mlp_in", "attention", "none")
        for keep in self.progress(keeps, len(keeps), "planning"):
            for b in (b for b in (1, 2, 4, 8, 16, 32) if total % b == 0):
                change = {
                    "per_device_train_batch_size": b,
                    "gradient_accumulation_steps": total // b,
                    "gradient_checkpointing": True,
                    "kept_activations": keep,
                    "kept_layers": -1,
                }
                if change == as_given:
                    continue
                tried.append((change, self.plan(**change)))
                if not tried[-1][1].fits:
                    break  # nor does a larger one
        too_much = {
            change["per_device_train_batch_size"]
            for change, plan in tried
            if change["kept_activations"] == "all" and not plan.fits
        }
        for change, plan in list(tried):
            if (
                change["kept_activations"] == "none"
                and plan.fits
                and change["per_device_train_batch_size"] in too_much
            ):
                tried += [some for some in [self._most_layers(change, plan)] if some]
        fitting = sorted(
            (pair for pair in tried if pair[1].fits), key=lambda pair: pair[1].relative_time
        )
        if not fitting:
            least: dict[str, Any] = {
                "gradient_checkpointing": True,
                "kept_activations": "none",
                "per_device_train_batch_size": 1,
                "gradient_accumulation_steps": total,
            }
            # it is a row at a time already
            others = (more for more in self._at_start() if "tokens_per_pass" not in more)
            least, plan = self._relieved(least, others)
            if plan is not None:
                return replace(plan, choices=(Choice(least, plan.peak_bytes, 1.0, True),))
            return self._shorter(given, least)
        best_change, best = fitting[0]
        rows = [
            Choice(change, plan.peak_bytes, plan.relative_time / best.relative_time, plan.fits)
            for change, plan in sorted(tried, key=lambda pair: pair[1].relative_time)
        ]
        rows.sort(key=lambda row: row.change != best_change)
        return replace(best, choices=tuple(rows))

    def _shorter(self, given: MemoryPlan, change: dict[str, Any]) -> MemoryPlan:
        limit = min(
            self.config.max_length, self.data.max_length if self.data else self.config.max_length
        )
        low, high = 0, limit // LENGTH_STEP if self.config.over_length != "error" else 0
        found: MemoryPlan | None = None
        while low < high:  # the longest that fits, by halving
            middle = (low + high + 1) // 2
            try:
                plan = self.plan(**change, max_length=middle * LENGTH_STEP)
            except DataError:  # nothing is left to train on
                break
            if plan.fits:
                low, found = middle, plan
            else:
                high = middle - 1
        if found is None:
            return replace(given, choices=self.ways_out(given))
        change = {**change, "max_length": low * LENGTH_STEP}
        loses = f"rows longer than {low * LENGTH_STEP} tokens are "
        loses += "cut" if self.config.over_length == "truncate" else "left out"
        if self.config.packing:
            loses += f", and a packed sequence holds {low * LENGTH_STEP}: a step sees fewer tokens"
        row = Choice(change, found.peak_bytes, 1.0, True, loses)
        return replace(found, choices=(row,))


def _dtype_for(config: TrainConfig, device: str) -> torch.dtype:
    if config.dtype == "auto" and device == "cuda" and not torch.cuda.is_available():
        return torch.bfloat16
    return choose_dtype(config.dtype, torch.device(device))

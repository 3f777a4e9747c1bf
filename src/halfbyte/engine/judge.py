"""Was it worth it: a trained model beside the one it was made of, on rows and text it did not see.

What 4 bits cost and what a training brought are told apart by three models on the same rows: the
original in 16 bits, the base as it was held, and the run. A difference is given with its 95 %
interval over rows, for of a few rows half is luck. What a training made a model forget is the KL
divergence from the original on a fixed piece of neutral text.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..adapters.modules_to_save import trainable_modules
from ..adapters.peft_files import adapter_off, lora_off
from ..data.batches import EVAL_TOKENS
from ..data.encoder import TokenizedExample
from ..ops.library import device_type
from ..progress import Progress, no_progress
from ..quantization.original import OriginalWeights
from .evaluate import RowLosses, row_losses
from .loss import chunk_rows, hidden_states, output_head

JUDGED_TOKENS = 8192
"""Of held-out rows, at most."""

POSITIONS = 384
"""Of rows, at which a merge compares probabilities (all of a vocabulary in fp32 each)."""
NEUTRAL_TOKENS = 256
"""Of a passage of the neutral text, at most."""

ORIGINAL, BASE, RUN = "original", "base", "run"


@dataclass(frozen=True)
class Difference:
    """Of two models' losses on the same rows, nats per supervised token. half_width: of the 95 %
    interval; infinite for a single row."""

    mean: float
    half_width: float

    @property
    def verdict(self) -> str:
        """ "better", "worse", or "no better" where the interval holds zero."""
        if self.mean + self.half_width < 0:
            return "better"
        return "worse" if self.mean - self.half_width > 0 else "no better"


def difference(after: RowLosses, before: RowLosses) -> Difference:
    """How much more is lost after than before, each row beside itself (the ratio estimator of
    Cochran 1977, section 6.4, with Student's t)."""
    tokens = sum(after.tokens)
    if not tokens:
        return Difference(math.nan, math.inf)
    gaps = [a - b for a, b in zip(after.sums, before.sums, strict=True)]
    mean = math.fsum(gaps) / tokens
    counted = [(gap, n) for gap, n in zip(gaps, after.tokens, strict=True) if n]
    if len(counted) < 2:
        return Difference(mean, math.inf)
    rows = len(counted)
    spread = math.fsum((gap - mean * n) ** 2 for gap, n in counted) * rows / (rows - 1)
    return Difference(mean, _student(rows - 1) * math.sqrt(spread) / tokens)


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t (Hill's expansion; exact for one and two degrees)."""
    if freedom <= 2:
        return (12.7062, 4.3027)[freedom - 1]
    z = 1.959964
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


@dataclass(frozen=True)
class Neutral:
    """On the neutral text: losses of each model, nats per token, and KL(original || model) of the
    others, nats; of the base where it is not the original."""

    tokens: int
    loss: dict[str, float]
    kl: dict[str, float]


@dataclass(frozen=True)
class Judgement:
    """A trained model beside those it was made of.

    Attributes:
        rows, tokens: held-out rows and supervised tokens judged on; 0 without any.
        loss: of each model on them.
        against: the model it was compared with: "original", or "base" where no other is there.
        difference: of the run's loss to that, with its interval.
        neutral: what it forgot.
    """

    rows: int
    tokens: int
    loss: dict[str, float]
    against: str
    difference: Difference | None
    neutral: Neutral

    def as_dict(self) -> dict[str, Any]:
        verdict = {"verdict": self.difference.verdict} if self.difference else {}
        return finite({**asdict(self), **verdict})


def finite(value: Any) -> Any:
    """For JSON, which has no NaN: numbers that are not finite are None."""
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Judge:
    """Computes with a trained model as each of the models it was made of.

    Args:
        original: the base's own weights.
        packed: whether it keeps rows of one sequence apart.
        adapted: whether there is an adapter that can be switched off.
        at_once: tokens of rows in a pass, at most.
    """

    def __init__(
        self,
        model: Any,
        original: OriginalWeights,
        packed: bool,
        adapted: bool,
        at_once: int = EVAL_TOKENS,
    ) -> None:
        self.model, self.packed, self.at_once = model, packed, at_once
        self.models: dict[str, Callable[[], Any]] = {}
        if original.available:
            self.models[ORIGINAL] = lambda: _together(
                lora_off(model), original.in_use(trained_too=True)
            )
        kept = all(module.originals is not None for _, module in trainable_modules(model))
        if adapted and kept and (not original.available or original.replaces_quantized):
            self.models[BASE] = lambda: adapter_off(model)
        self.models[RUN] = contextlib.nullcontext

    def on_rows(
        self, rows: Sequence[TokenizedExample], progress: Progress = no_progress
    ) -> dict[str, RowLosses]:
        """Each model's loss on rows."""
        found = {}
        for name, as_it in self.models.items():
            with as_it():
                found[name] = row_losses(
                    self.model,
                    rows,
                    packed=self.packed,
                    progress=progress,
                    at_once=self.at_once,
                )
        return found

    def judge(
        self,
        held_out: Sequence[TokenizedExample],
        tokenizer: Any,
        progress: Progress = no_progress,
    ) -> Judgement:
        """The run on held-out rows (the first `JUDGED_TOKENS` tokens of them) and neutral text."""
        rows = first_rows(held_out, JUDGED_TOKENS)
        losses = self.on_rows(rows, progress) if rows else {}
        against = next((name for name in (ORIGINAL, BASE) if name in self.models), "")
        gap = difference(losses[RUN], losses[against]) if rows and against else None
        return Judgement(
            len(rows),
            sum(losses[RUN].tokens) if rows else 0,
            {name: found.mean for name, found in losses.items()},
            against,
            gap,
            self.on_neutral_text(tokenizer),
        )

    @torch.no_grad()
    def on_neutral_text(self, tokenizer: Any) -> Neutral:
        """What each model makes of `neutral_passages`."""
        was_training = self.model.training
        self.model.eval()
        losses = dict.fromkeys(self.models, 0.0)
        kls = dict.fromkeys(list(self.models)[1:], 0.0)
        count = 0
        try:
            for ids in neutral_passages(tokenizer):
                count += len(ids) - 1
                self._add(ids, losses, kls)
        finally:
            self.model.train(was_training)
        count = max(count, 1)
        return Neutral(
            count,
            {name: total / count for name, total in losses.items()},
            {name: total / count for name, total in kls.items()},
        )

    def _add(self, ids: list[int], losses: dict[str, float], kls: dict[str, float]) -> None:
        model, head = self.model, output_head(self.model)
        tokens = torch.tensor(ids, device=model.device)
        positions = torch.arange(len(ids), device=model.device)
        hidden: dict[str, Tensor] = {}
        for name, as_it in self.models.items():
            with as_it():
                hidden[name] = hidden_states(model, tokens, positions, None)[:-1]
        vocabulary = model.get_output_embeddings().weight.shape[0]
        rows = chunk_rows(vocabulary, device_type(tokens))
        for start in range(0, len(ids) - 1, rows):
            targets = tokens[1:][start : start + rows]
            first: Tensor | None = None
            for name, as_it in self.models.items():
                with as_it():
                    scores = head(hidden[name][start : start + rows]).float().log_softmax(-1)
                losses[name] += float(functional.nll_loss(scores, targets, reduction="sum"))
                if first is None:
                    first = scores
                else:  # as functional.kl_div, in two pieces of such a size beside the first
                    gaps = torch.sub(first, scores, out=scores)
                    kls[name] += float(gaps.mul_(first.exp()).sum())


def neutral_passages(tokenizer: Any) -> list[list[int]]:
    """The ids of each passage of the neutral text: Darwin's first lines (1859), and two written for
    this purpose, which are in the public domain."""
    text = Path(__file__).with_name("neutral.txt").read_text(encoding="utf-8")
    found = [tokenizer(passage.strip())["input_ids"] for passage in text.split("\n\n")]
    return [ids[:NEUTRAL_TOKENS] for ids in found if len(ids) > 1]


def first_rows(rows: Sequence[TokenizedExample], most: int) -> list[TokenizedExample]:
    """The first rows of at most so many tokens together, and at least one."""
    chosen: list[TokenizedExample] = []
    used = 0
    for row in rows:
        used += len(row.input_ids)
        if chosen and used > most:
            break
        chosen.append(row)
    return chosen


@contextlib.contextmanager
def _together(*contexts: Any) -> Any:
    with contextlib.ExitStack() as stack:
        for each in contexts:
            stack.enter_context(each)
        yield


def words(judgement: Judgement) -> list[str]:
    """A judgement for people: what was learned, and what it cost."""
    gap, loss = judgement.difference, judgement.loss
    lines = []
    if gap is not None:
        start = "the model you started from"
        form = "in 16 bits" if judgement.against == ORIGINAL else "as it was held"
        base = (
            f", {loss[BASE]:.3f} in 4 bits untrained" if ORIGINAL in loss and BASE in loss else ""
        )
        interval = (
            f"{abs(gap.mean):.3f} +/- {gap.half_width:.3f} nats a token"
            if math.isfinite(gap.half_width)
            else f"{abs(gap.mean):.3f} nats a token, of one row"
        )
        said = {
            "better": f"better than {start}, by {interval}",
            "worse": f"your training made it worse than {start}, by {interval}",
            "no better": f"no better than {start}: a difference of {interval} may be luck",
        }[gap.verdict]
        lines.append(
            f"held out, {judgement.rows} rows: loss {loss[judgement.against]:.3f} in {start} "
            f"({form}){base}, {loss[RUN]:.3f} now: {said}"
        )
        if gap.verdict != "better":
            lines.append(
                "what may help: more rows or steps, a larger --lora_r, another --learning_rate"
                + (", or --load_in_4bit false, where it fits" if BASE in loss else "")
            )
    kl = judgement.neutral.kl
    if RUN in kl:
        before = f", {kl[BASE]:.3f} before it" if BASE in kl else ""
        what = "what 4 bits and the training changed" if BASE in kl else "what the training changed"
        lines.append(
            f"neutral text: KL {kl[RUN]:.3f} nats a token from {judgement.against} after the "
            f"training{before}: {what}"
        )
        if gap is not None:
            lines.append(
                f"learned {-gap.mean:+.3f}, forgot {kl[RUN]:.3f} (nats a token: held-out loss won, "
                "KL on neutral text)"
            )
    return lines

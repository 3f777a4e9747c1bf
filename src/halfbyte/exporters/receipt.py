"""A merge's receipt for people: what was made sure of, and which model does best."""

from dataclasses import asdict, dataclass
from typing import Any

from ..engine.judge import BASE, ORIGINAL, RUN, Difference
from .exact import Recomputed
from .verify import HELD_OUT, Comparison

HEAD = ["", "KL divergence, nats", "same token", "loss", "to the start"]

NAMES = {
    ORIGINAL: "the model it began with, in 16 bits",
    BASE: "its base in 4 bits",
    RUN: "the run, unmerged",
}


@dataclass(frozen=True)
class Receipt:
    """How a merged model was made sure of, and how it does beside the models it was made of.

    Attributes:
        rows_are: "held out", "of the training data", "of the data as it is now", or "built in".
        recomputed: what `exporters.exact` found.
        noise: KL divergence, nats, that rounding to ``rounded_to`` alone causes: of what was
            merged, unmerged, from the same in fp32. kl, greedy_agreement: of the merged model from
            it. typical: of a mixture of experts, kl and noise of the median position, by which it
            was judged.
        running_loss: of the run, adapter on the base as trained.
        losses: of the models it was made of: "original" (in 16 bits, where it is at hand), "base"
            (as it was held), "run".
        comparisons: beside the run, by what is merged onto (with requantize, also of what came of
            it).
        recommended: the one that does best on held-out rows; without any, the one nearest to the
            run.
        surviving: with requantize, the least, median and greatest share of the adapter's effect
            over its layers.
    """

    onto: str
    compute_dtype: str
    rows: int
    rows_are: str
    tokens: int
    recomputed: Recomputed
    rounded_to: str
    noise: float
    kl: float
    greedy_agreement: float
    running_loss: float
    losses: dict[str, float]
    comparisons: dict[str, Comparison]
    recommended: str
    surviving: tuple[float, float, float] | None = None
    typical: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def verdict(self) -> str:
        """Whether the merge that does best is "better", "worse" or "no better" than the model the
        training began with; "" where that is not known."""
        gain = self.comparisons[self.recommended].gain
        return Difference(*gain).verdict if gain and self.rows_are == HELD_OUT else ""


def table(receipt: Receipt) -> list[list[str]]:
    """Each model's row under `HEAD`."""
    rows = []
    for key, loss in receipt.losses.items():
        noise = f"{receipt.noise:.2e}" if key == RUN and receipt.onto == "trained" else ""
        rows.append([NAMES[key], noise, "", f"{loss:.4f}", ""])
    best = receipt.recommended if len(receipt.comparisons) > 1 else ""
    for onto, found in receipt.comparisons.items():
        gain = "" if found.gain is None else f"{found.gain[0]:+.3f} +/- {found.gain[1]:.3f}"
        rows.append(
            [
                f"onto {onto}{' (recommended)' if onto == best else ''}",
                f"{found.kl:.2e}",
                f"{found.greedy_agreement:.2%}",
                f"{found.loss:.4f}",
                gain,
            ]
        )
    return rows


def lines(receipt: Receipt) -> list[str]:
    """What was verified."""
    again, least = receipt.recomputed, receipt.recomputed.surviving[0]
    median = ""
    if receipt.typical is not None:
        median = " ({:.2e} and {:.2e} in the median token)".format(*receipt.typical)
    return [
        f"computed again from the files: all {again.tensors:,} tensors are what they must be, "
        f"{again.adapted:,} of them with the adapter added",
        f"rounding to the stored type keeps {again.surviving[1]:.1%} of the adapter's effect in "
        f"the median layer, at least {least:.1%}",
        f"it behaves as the run does: KL divergence {receipt.kl:.2e} on {receipt.tokens:,} tokens, "
        f"where rounding to {receipt.rounded_to} alone makes {receipt.noise:.2e}{median}; "
        f"{receipt.greedy_agreement:.2%} of the likeliest tokens are the same",
    ]


def advice(receipt: Receipt) -> list[str]:
    """What the comparison says about the training, and about what to merge onto."""
    said = []
    start, best = NAMES[ORIGINAL].partition(",")[0], receipt.recommended
    loss = receipt.comparisons[best].loss
    if receipt.verdict == "worse":
        said.append(
            f"your training made it worse than {start}: the best merge loses {loss:.3f}, that "
            f"{receipt.losses[ORIGINAL]:.3f}. What may help: more rows or steps, a larger "
            "--lora_r, another --learning_rate, or --load_in_4bit false, where it fits"
        )
    elif receipt.verdict == "no better":
        said.append(f"the best merge is no better than {start}: the difference may be luck")
    if best != receipt.onto:
        why = (
            "loses less on held-out rows"
            if receipt.rows_are == HELD_OUT
            else "is nearer to the model that was trained"
        )
        said.append(f"--onto {best} {why}")
    return said

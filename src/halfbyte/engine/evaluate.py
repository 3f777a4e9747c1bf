"""How good a model is on rows: loss per supervised token, perplexity, and how often it answers
exactly what was wanted.

The loss is the sum of cross-entropy over supervised tokens divided by their number, whatever the
batches. An answer matches exactly if the model, asked as in training, writes that text and then
stops by itself; it may not go on.
"""

import bisect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional

from ..data.batches import EVAL_TOKENS, MicroBatch, collate
from ..data.dataset import Data
from ..data.encoder import TokenizedExample
from ..data.formats import IGNORE
from ..data.renderer import Renderer
from ..model import attention
from ..model.rope import PassKind, pass_kind
from ..ops.library import device_type
from ..progress import Progress, no_progress
from .generate import answers
from .loss import chunk_rows, hidden_states, output_head


@dataclass(frozen=True)
class Score:
    """Of one model on one set of rows.

    loss: nats per supervised token. perplexity_without_end: of plain texts, their own tokens alone:
    other tools count no end behind a text; None for conversations and ready-made ids. exact_match:
    share, or None if not asked.
    """

    loss: float
    perplexity: float
    tokens: int
    rows: int
    exact_match: float | None = None
    asked: int = 0
    perplexity_without_end: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: what is not finite is None."""
        return {
            key: None if isinstance(x, float) and not math.isfinite(x) else x
            for key, x in asdict(self).items()
        }


def score(
    model: Any,
    data: Data,
    rows: Sequence[TokenizedExample],
    *,
    packed: bool,
    generate: bool,
    progress: Progress = no_progress,
) -> Score:
    """Loss, perplexity and exact match of a model.

    Args:
        packed: the model keeps rows of one sequence apart (`selftest.self_test`).
        generate: answer the questions, too.
    """
    found = row_losses(model, rows, packed=packed, progress=progress)
    matches: list[bool] = []
    if generate:
        chosen = [(pair, row) for row in rows if (pair := data.question(row))]
        asked = [pair for pair, _ in chosen]
        # an answer may begin with control tokens, which its text is wanted without
        sizes = [len(row.input_ids) - len(ids) for (ids, _), row in chosen]
        matches = exact_matches(model, data.renderer, asked, progress, sizes)
    end = data.renderer.tokenizer.eos_token_id
    ended = [data.format == "text" and row.input_ids[-1] == end for row in rows]
    return Score(
        found.mean,
        _perplexity(found.mean),
        sum(found.tokens),
        len(rows),
        sum(matches) / len(matches) if matches else None,
        len(matches),
        _perplexity(found.without_last(ended)) if any(ended) else None,
    )


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0)) if math.isfinite(loss) else loss


@dataclass(frozen=True)
class RowLosses:
    """What a model loses on rows, each by itself.

    sums: nats over a row's supervised tokens. tokens: how many these are. last: nats of the last of
    them.
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]
    last: tuple[float, ...] = ()

    @property
    def mean(self) -> float:
        """Nats per supervised token, NaN without one."""
        return math.fsum(self.sums) / sum(self.tokens) if sum(self.tokens) else math.nan

    def without_last(self, rows: Sequence[bool]) -> float:
        """Nats per supervised token but the last of the chosen ``rows``, NaN without one."""
        nats = math.fsum(self.sums) - math.fsum(itertools.compress(self.last, rows))
        tokens = sum(self.tokens) - sum(rows)
        return nats / tokens if tokens else math.nan


def mean_loss(
    model: Any, rows: Sequence[TokenizedExample], *, packed: bool, progress: Progress = no_progress
) -> tuple[float, int]:
    """(nats per supervised token, supervised tokens); a model in training is left as it was."""
    found = row_losses(model, rows, packed=packed, progress=progress)
    return found.mean, sum(found.tokens)


@torch.no_grad()
def row_losses(
    model: Any,
    rows: Sequence[TokenizedExample],
    *,
    packed: bool,
    progress: Progress = no_progress,
    at_once: int = EVAL_TOKENS,
) -> RowLosses:
    """The loss of each row; a model in training is left as it was.

    Args:
        packed: the model keeps rows of one sequence apart (`selftest.self_test`).
        at_once: tokens of rows that are laid end to end, at most.
    """
    head, device = output_head(model), model.device
    sums, tokens, last = [0.0] * len(rows), [0] * len(rows), [0.0] * len(rows)
    groups = list(
        _groups(
            list(range(len(rows))),
            [len(row.input_ids) for row in rows] if packed else None,
            at_once,
            pass_kind(model.config),
        )
    )
    was_training = model.training
    model.eval()
    try:
        with attention.packed(model, packed):
            for number in progress([str(i) for i in range(len(groups))], len(groups), "evaluating"):
                group = groups[int(number)]
                batch = collate(rows, group)
                ends = batch.cu_seqlens[1:].tolist()
                for each, place in _token_losses(model, head, batch.to(device), packed):
                    row = group[bisect.bisect_right(ends, place)]
                    sums[row] += each
                    tokens[row] += 1
                    last[row] = each
    finally:
        model.train(was_training)
    return RowLosses(tuple(sums), tuple(tokens), tuple(last))


def _token_losses(
    model: Any, head: Callable[[torch.Tensor], torch.Tensor], batch: MicroBatch, packed: bool
) -> Iterator[tuple[float, int]]:
    """(nats, position) of each supervised token of a batch."""
    batch = batch.padded() if packed else batch
    hidden = hidden_states(
        model, batch.input_ids, batch.position_ids, batch.cu_seqlens if packed else None
    )
    vocabulary = model.get_output_embeddings().weight.shape[0]
    chosen = (batch.labels != IGNORE).nonzero().squeeze(1)
    for part in chosen.split(chunk_rows(vocabulary, device_type(hidden))):
        losses = functional.cross_entropy(
            head(hidden[part]).float(), batch.labels[part], reduction="none"
        )
        yield from zip(losses.tolist(), part.tolist(), strict=True)


def largest_group(rows: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """The longest rows, as many as `mean_loss` lays end to end at most."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    groups = _groups(order, [len(row.input_ids) for row in rows])
    return [rows[i] for i in next(iter(groups), [])]


def exact_matches(
    model: Any,
    renderer: Renderer,
    asked: Sequence[tuple[list[int], str]],
    progress: Progress = no_progress,
    sizes: Sequence[int] = (),
) -> list[bool]:
    """For each (ids that ask, answer wanted) whether the model answers that.

    Args:
        sizes: tokens that each answer has in its row, where there are more than its text has.
    """
    lengths = [len(ids) for ids, _ in asked]
    order = sorted(range(len(asked)), key=lambda i: lengths[i])
    groups = list(_groups(order, lengths))
    results = [False] * len(asked)
    for number in progress([str(i) for i in range(len(groups))], len(groups), "answering"):
        group = groups[int(number)]
        wanted = [asked[i][1] for i in group]
        longest = max(len(renderer.tokenizer(text)["input_ids"]) for text in wanted)
        longest = max([longest, *(sizes[i] for i in group if sizes)])
        given = answers(model, renderer, [asked[i][0] for i in group], longest + 4, wanted=wanted)
        for i, said, right in zip(group, given, wanted, strict=True):
            results[i] = said.stopped and said.text.strip() == right.strip()
    return results


def _groups(
    order: Sequence[int],
    lengths: Sequence[int] | None,
    at_once: int = EVAL_TOKENS,
    kind: PassKind = lambda length: 0,
) -> Iterable[list[int]]:
    """The order cut into groups of at most so many tokens and of one kind; of one row each without
    lengths."""
    group: list[int] = []
    used = last = 0
    for i in order:
        length = at_once if lengths is None else lengths[i]
        if group and (used + length > at_once or kind(length) != last):
            yield group
            group, used = [], 0
        last = kind(length)
        group.append(i)
        used += length
    if group:
        yield group

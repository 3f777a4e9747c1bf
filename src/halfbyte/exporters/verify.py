"""How a model behaves on the rows a merge is judged on: likeliest tokens, probabilities, losses.

All is measured against the run in fp32. What rounding alone does to this model on these rows is the
distance of the run in its compute dtype; a merged model, which is the same up to its roundings, may
be a few times as far.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..config.options import DataOptions
from ..data.dataset import (
    examples_of,
    length_of_rows,
    make_renderer,
    source_digest,
)
from ..data.encoder import TokenizedExample
from ..data.formats import Example
from ..data.held_out import hold_out, row_digests
from ..data.renderer import Renderer
from ..data.tokenizing import encode
from ..engine.evaluate import RowLosses
from ..engine.judge import POSITIONS, difference, first_rows, neutral_passages
from ..engine.loss import chunk_rows, hidden_states, output_head
from ..errors import DataError
from ..files.model_config import read_config
from ..ops.library import device_type
from ..progress import Progress
from ..run.load import run_renderer
from ..run.source import Source

JUDGED_TOKENS, LONGEST = 4096, 1024
"""Tokens of the rows judged on, and of one row, at most."""

NOISE_FACTOR = 4.0
"""Times the KL divergence that rounding alone causes, beyond which a model is another one."""
NOISE_FLOOR = 1e-6
"""KL divergence, nats, that is taken for rounding in any case: where all is computed in fp32."""


@dataclass(frozen=True)
class Comparison:
    """A model beside the run in fp32, on the same rows.

    kl: mean over positions of KL(run || model), nats. greedy_agreement: share of positions with the
    same likeliest token. loss: nats per supervised token. gain: of that to the model the training
    began with, with half of its 95 % interval; None where that is not at hand. typical_kl: as kl,
    the median over positions: where experts are chosen, a rounding that changes which moves a token
    by more than rounding, and which tokens that meets is luck.
    """

    kl: float
    greedy_agreement: float
    loss: float
    gain: tuple[float, float] | None = None
    typical_kl: float = 0.0


@dataclass(frozen=True)
class Behaviour:
    """What a model does on rows. choices: the likeliest token of each position, by row. scores:
    logarithms of probabilities, fp32 [positions, vocabulary]. losses: by row."""

    choices: list[Tensor]
    scores: Tensor
    losses: RowLosses


HELD_OUT = "held out"


def probes(source: Source, say: Callable[[str], None]) -> tuple[list[TokenizedExample], str]:
    """Rows to compare on, with the masks of the training, and what they are: held out in it, else
    of its data, else sentences of our own."""
    run = source.run
    if run is None:
        return _built_in(make_renderer(source.tokenizer(), DataOptions())), "built in"
    config, info = run.config(), run.info()
    renderer = run_renderer(run, config)
    try:
        found = examples_of(info["data"]["source"], config)
        same = source_digest(found) == info["data"]["sha256"]
        if not same:
            say("the data has changed since the training: the rows compared on may be others")
        # which rows were held out is a function of all of them
        chosen = None if config.eval_split and same else JUDGED_TOKENS
        found = examples_of(info["data"]["source"], config)
        rows, _ = encode(itertools.islice(found, chosen), renderer)
        if config.eval_split and same:
            # releases before rule 2 told rows apart before they were cut
            whole = info.get("rules", {}).get("split", 1) == 1
            length = None if whole else length_of_rows(config, read_config(source.base))
            digests = row_digests(rows, str(config.seed), length)
            return _cut(hold_out(rows, config.eval_split, digests)[1]), HELD_OUT
        return _cut(rows), "of the training data" if same else "of the data as it is now"
    except DataError as error:
        say(f"the training data cannot be read ({error.what}): comparing on built-in text instead")
        return _built_in(renderer), "built in"
    finally:
        renderer.rest()


def _built_in(renderer: Renderer) -> list[TokenizedExample]:
    """A question and its answer, where there is a chat template, and the neutral text."""
    rows = [
        TokenizedExample(f"text {i}", ids, [True] * len(ids))
        for i, ids in enumerate(neutral_passages(renderer.tokenizer))
    ]
    turns = [
        {"role": "user", "content": "What is the capital of France, and why do people go there?"},
        {"role": "assistant", "content": "Paris. They like its museums."},
    ]
    if renderer.template:
        rows = [*renderer.encode([Example("question", turns)]), *rows]
    return _cut(rows)


def _cut(rows: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """The first rows, each cut; whether trained on or not: a long question must not leave a merge
    without rows."""
    short = [TokenizedExample(r.where, r.input_ids[:LONGEST], r.loss_mask[:LONGEST]) for r in rows]
    return first_rows(short, JUDGED_TOKENS)


@torch.inference_mode()
def behaviour(
    model: Any, rows: Sequence[TokenizedExample], progress: Progress, name: str
) -> Behaviour:
    """What a model does on rows, one by one. name: what it is, for people who wait."""
    head, device = output_head(model), model.device
    vocabulary = model.get_output_embeddings().weight.shape[0]
    at_once = chunk_rows(vocabulary, device_type(model.get_output_embeddings().weight))
    supervised = any(any(row.loss_mask[1:]) for row in rows)
    wanted = _positions([len(row.input_ids) for row in rows])
    choices: list[Tensor] = []
    scores = torch.empty(sum(map(len, wanted)), vocabulary)
    known = 0
    sums: list[float] = []
    counts: list[int] = []
    for number in progress([str(i) for i in range(len(rows))], len(rows), name):
        row, probed = rows[int(number)], wanted[int(number)]
        ids = torch.tensor(row.input_ids, device=device)
        hidden = hidden_states(model, ids, torch.arange(len(ids), device=device), None)
        # of every token where no row has a supervised one
        mask = row.loss_mask[1:] if supervised else [True] * (len(ids) - 1)
        counted, following = torch.tensor([*mask, False]), ids.roll(-1).cpu()
        total, chosen = 0.0, []
        for start in range(0, len(ids), at_once):
            here = head(hidden[start : start + at_once]).float().log_softmax(-1).cpu()
            part = slice(start, start + len(here))
            chosen.append(here.argmax(-1))
            chosen_here = here[[p - start for p in probed if part.start <= p < part.stop]]
            scores[known : known + len(chosen_here)] = chosen_here
            known += len(chosen_here)
            found = here.gather(1, following[part].unsqueeze(1)).squeeze(1)[counted[part]]
            total -= float(found.double().sum())
        choices.append(torch.cat(chosen))
        sums.append(total)
        counts.append(int(counted.sum()))
    return Behaviour(choices, scores, RowLosses(tuple(sums), tuple(counts)))


def _positions(lengths: list[int]) -> list[list[int]]:
    """Positions of each row whose probabilities are compared, `POSITIONS` of all spread evenly."""
    every = max(1, -(-sum(lengths) // POSITIONS))
    return [list(range(0, length, every)) for length in lengths]


def compare(run: Behaviour, model: Behaviour, start: RowLosses | None = None) -> Comparison:
    """A model beside the run; start: what the model the training began with loses."""
    each = torch.cat(
        [
            functional.kl_div(theirs, ours, log_target=True, reduction="none").sum(-1)
            for theirs, ours in zip(model.scores.split(16), run.scores.split(16), strict=True)
        ]
    )
    same = sum(int((a == b).sum()) for a, b in zip(run.choices, model.choices, strict=True))
    gain = None
    if start is not None:
        found = difference(model.losses, start)
        gain = (found.mean, found.half_width)
    return Comparison(
        max(float(each.double().mean()), 0.0),
        same / sum(len(a) for a in run.choices),
        model.losses.mean,
        gain,
        max(float(each.nan_to_num(float("inf")).median()), 0.0),
    )

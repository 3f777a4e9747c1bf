"""A merged model beside the running adapter, on the same rows: KL divergence, same token, loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..data.dataset import encode, hold_out, source_digest
from ..data.formats import Example, read_examples
from ..data.renderer import TokenizedExample
from ..errors import DataError
from ..run.directory import Run
from ..run.load import run_renderer

PROBE_ROWS, PROBE_TOKENS = 16, 256


@dataclass(frozen=True)
class Comparison:
    """A merged model beside the running adapter, on the same rows.

    kl: mean over positions of KL(running || merged), nats. greedy_agreement: share of positions
    with the same likeliest token. loss: nats per supervised token.
    """

    kl: float
    greedy_agreement: float
    loss: float


def _probes(source: Run, say: Callable[[str], None]) -> tuple[list[TokenizedExample], str]:
    """Rows to compare on, with the masks of the training, and what they are: held out in it, else
    of its data, else sentences of our own."""
    config, info = source.config(), source.info()
    renderer = run_renderer(source, config)
    try:
        found = read_examples(
            info["data"]["source"],
            config=config.dataset_config,
            split=config.dataset_train_split,
            skip_bad=config.skip_bad,
        )
        same = source_digest(info["data"]["source"], found.rows) == info["data"]["sha256"]
        if not same:
            say("the data has changed since the training: the rows compared on may be others")
        # which rows were held out is a function of all of them
        chosen = found.rows if config.eval_split and same else found.rows[:PROBE_ROWS]
        rows, _ = encode(chosen, renderer, skip_bad=config.skip_bad)
        if config.eval_split and same:
            return _cut(hold_out(rows, config.eval_split, config.seed)[1]), "held out"
        return _cut(rows), "of the training data" if same else "of the data as it is now"
    except DataError as error:
        say(
            f"the training data cannot be read ({error.what}): comparing on one built-in sentence "
            "instead"
        )
        question = [
            {
                "role": "user",
                "content": "What is the capital of France, and why do people travel there?",
            }
        ]
        examples = [
            Example(
                "probe",
                [*question, {"role": "assistant", "content": "Paris. They like its museums."}],
            )
        ]
        return _cut(renderer.encode(examples)), "built in"


def _cut(rows: list[TokenizedExample]) -> list[TokenizedExample]:
    """The first few, each cut; whole rows, trained or not: a long question must not leave a merge
    without probes."""
    return [
        TokenizedExample(r.where, r.input_ids[:PROBE_TOKENS], r.loss_mask[:PROBE_TOKENS])
        for r in rows[:PROBE_ROWS]
    ]


@torch.inference_mode()
def _logits(model: Any, rows: list[TokenizedExample]) -> list[Tensor]:
    device = model.device
    ids = (torch.tensor([row.input_ids], device=device) for row in rows)
    return [model(input_ids=each, use_cache=False).logits[0].float().cpu() for each in ids]


def _agreement(a: list[Tensor], b: list[Tensor]) -> float:
    same = sum(int((x.argmax(-1) == y.argmax(-1)).sum()) for x, y in zip(a, b, strict=True))
    return same / sum(x.shape[0] for x in a)


def _loss(logits: list[Tensor], rows: list[TokenizedExample]) -> float:
    """Nats per supervised token; of every token where no row has a supervised one."""
    total, count = 0.0, 0
    supervised = any(any(row.loss_mask[1:]) for row in rows)
    for values, row in zip(logits, rows, strict=True):
        targets = torch.tensor(row.input_ids[1:])
        chosen = (
            torch.tensor(row.loss_mask[1:])
            if supervised
            else torch.ones(len(targets), dtype=torch.bool)
        )
        total += float(
            functional.cross_entropy(values[:-1][chosen], targets[chosen], reduction="sum")
        )
        count += int(chosen.sum())
    return total / max(count, 1)


def _compare(expected: list[Tensor], got: list[Tensor], rows: list[TokenizedExample]) -> Comparison:
    kl, count = 0.0, 0
    for p, q in zip(expected, got, strict=True):
        kl += float(
            functional.kl_div(
                q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum"
            )
        )
        count += p.shape[0]
    return Comparison(max(kl / count, 0.0), _agreement(expected, got), _loss(got, rows))

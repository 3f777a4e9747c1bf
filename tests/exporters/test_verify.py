"""Tests of `exporters.verify`."""

import json
from pathlib import Path

import pytest
import torch

import halfbyte
from halfbyte.engine.evaluate import RowLosses
from halfbyte.exporters.verify import Behaviour, compare
from halfbyte.run.directory import Run

from ..helpers import front_matter


def test_a_receipt_compares_both_bases_on_held_out_rows(trained_run: Run, tmp_path: Path):
    receipts = {
        onto: halfbyte.merge(trained_run.path, tmp_path / onto, onto=onto)
        for onto in ("trained", "original")
    }
    for onto, receipt in receipts.items():
        assert receipt.onto == onto and receipt.rows_are == "held out" and receipt.rows == 10
        assert receipt.comparisons.keys() == {"trained", "original"}
        assert receipt.recommended == min(
            receipt.comparisons, key=lambda name: receipt.comparisons[name].loss
        )
        assert list(receipt.losses) == ["original", "base", "run"]
        assert receipt.kl <= 4 * max(receipt.noise, 1e-6) and receipt.rounded_to == "bfloat16"
        assert receipt.verdict == "better", "it learned to count"
        text = (tmp_path / onto / "README.md").read_text()
        assert f"onto {onto} (this one)" in text and trained_run.info()["base"]["digest"] in text
        assert (
            trained_run.info()["data"]["sha256"] in text
            and "GiB planned" in text
            and "GiB measured" in text
        )
        assert front_matter(text)["library_name"] == "transformers"
        assert (
            json.loads((tmp_path / onto / "merge.json").read_text())["recommended"]
            == receipt.recommended
        )
    a, b = receipts["trained"], receipts["original"]
    assert a.comparisons == b.comparisons, "whichever is kept"
    trained, original = a.comparisons["trained"], a.comparisons["original"]
    assert trained.kl < original.kl
    assert trained.greedy_agreement >= 0.99 and trained.loss == pytest.approx(
        a.running_loss, abs=2e-3
    )
    # the run's own evaluation of the same rows, in bf16
    assert a.running_loss == pytest.approx(trained_run.read("eval.jsonl")[-1]["loss"], abs=0.03)


def test_changed_data_is_not_called_held_out(trained_run: Run, tmp_path: Path):
    source = Path(trained_run.info()["data"]["source"])
    before, said = source.read_text(), []
    try:
        source.write_text("".join(before.splitlines(keepends=True)[:9]))
        receipt = halfbyte.merge(trained_run.path, tmp_path / "m", say=said.append)
    finally:
        source.write_text(before)
    assert receipt.rows_are == "of the data as it is now" and any(
        "has changed" in line for line in said
    )


def test_one_token_of_many_moves_the_mean_and_not_what_is_typical():
    """As where a rounding sends one token of a mixture to another expert; a wrong merge moves
    all."""
    torch.manual_seed(0)
    logits, losses = torch.randn(57, 100), RowLosses((1.0, 2.0), (3, 4))
    tokens = [logits.argmax(-1)]
    exact = Behaviour(tokens, logits.log_softmax(-1), losses)
    rounded = logits + 1e-3 * torch.randn_like(logits)
    one = rounded.clone()
    one[20] += 0.5 * torch.randn(100)
    wrong = logits + 2e-2 * torch.randn_like(logits)
    near, flipped, other = (
        compare(exact, Behaviour(tokens, each.log_softmax(-1), losses))
        for each in (rounded, one, wrong)
    )
    assert flipped.kl > 100 * near.kl and other.kl > 100 * near.kl
    assert flipped.typical_kl <= 1.2 * near.typical_kl
    assert other.typical_kl > 100 * near.typical_kl

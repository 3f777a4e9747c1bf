"""Tests of `exporters.receipt`."""

from dataclasses import replace

from halfbyte.exporters.exact import Recomputed
from halfbyte.exporters.receipt import HEAD, Receipt, advice, lines, table
from halfbyte.exporters.verify import Comparison

RECEIPT = Receipt(
    onto="trained",
    compute_dtype="float32",
    rows=12,
    rows_are="held out",
    tokens=900,
    recomputed=Recomputed(30, 1000, 28, (0.9, 0.95, 1.0)),
    rounded_to="bfloat16",
    noise=1e-3,
    kl=1e-4,
    greedy_agreement=0.99,
    running_loss=2.4,
    losses={"original": 2.2, "base": 2.5, "run": 2.4},
    comparisons={
        "trained": Comparison(1e-4, 0.99, 2.41, (0.21, 0.05)),
        "original": Comparison(0.4, 0.7, 2.15, (-0.05, 0.01)),
    },
    recommended="original",
)


def test_the_best_is_recommended_whatever_was_asked_for():
    text = "\n".join(advice(RECEIPT))
    assert text == "--onto original loses less on held-out rows"
    rows = table(RECEIPT)
    assert all(len(row) == len(HEAD) for row in rows)
    assert [row[0] for row in rows][-1] == "onto original (recommended)"
    assert rows[-1][-1] == "-0.050 +/- 0.010"
    assert any("all 30 tensors" in line for line in lines(RECEIPT))


def test_a_training_that_made_it_worse_is_told_so():
    one = {"trained": RECEIPT.comparisons["trained"]}
    worse = replace(RECEIPT, comparisons=one, recommended="trained")
    assert worse.verdict == "worse"
    assert "your training made it worse than the model it began with" in advice(worse)[0]
    luck = {"trained": Comparison(1e-4, 0.99, 2.19, (-0.01, 0.05))}
    assert "no better" in advice(replace(RECEIPT, comparisons=luck, recommended="trained"))[0]
    seen = replace(RECEIPT, rows_are="of the training data")
    assert seen.verdict == "", "rows that were trained on say nothing"


def test_a_mixture_says_what_the_median_token_does():
    found = lines(replace(RECEIPT, typical=(2e-7, 3e-7)))[-1]
    assert "(2.00e-07 and 3.00e-07 in the median token)" in found
    assert "median" not in lines(RECEIPT)[-1]

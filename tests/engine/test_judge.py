"""Tests of `engine.judge`."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.adapters.peft_files import adapter_off
from halfbyte.data.encoder import TokenizedExample
from halfbyte.engine.evaluate import RowLosses, row_losses
from halfbyte.engine.judge import (
    Difference,
    Judge,
    _student,
    difference,
    first_rows,
    neutral_passages,
    words,
)
from halfbyte.files import hub
from halfbyte.quantization.original import OriginalWeights
from halfbyte.run.directory import Run


def rows_of(tokenizer, count: int = 6) -> list[TokenizedExample]:
    texts = [f"{i} teas and {i * 3 % 7} buns for the table by the window" for i in range(count)]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return [TokenizedExample(str(i), row, [True] * len(row)) for i, row in enumerate(ids)]


def test_a_difference_has_the_interval_of_its_rows():
    before = RowLosses((10.0, 20.0, 30.0, 40.0), (5, 10, 15, 20))
    same = difference(before, before)
    assert same == Difference(0.0, 0.0) and same.verdict == "no better"
    # every row better by the same, per token: no doubt is left
    after = RowLosses((5.0, 10.0, 15.0, 20.0), (5, 10, 15, 20))
    found = difference(after, before)
    assert found.mean == pytest.approx(-1.0) and found.half_width < 1e-9
    assert found.verdict == "better" and difference(before, after).verdict == "worse"
    one = difference(RowLosses((1.0,), (2,)), RowLosses((3.0,), (2,)))
    assert one.mean == -1.0 and math.isinf(one.half_width) and one.verdict == "no better"
    # rows of one token: the textbook's paired t interval
    a, b = RowLosses((1.0, 2.0, 4.0), (1, 1, 1)), RowLosses((0.0, 0.0, 0.0), (1, 1, 1))
    spread = torch.tensor([1.0, 2.0, 4.0]).std().item()
    assert difference(a, b).half_width == pytest.approx(4.3027 * spread / 3**0.5, rel=1e-4)


@pytest.mark.parametrize(
    "freedom,value", [(1, 12.706), (2, 4.303), (3, 3.182), (9, 2.262), (30, 2.042)]
)
def test_students_quantiles(freedom: int, value: float):
    assert _student(freedom) == pytest.approx(value, rel=0.01)


def test_the_neutral_text_is_cut_by_passages():
    tokenizer = hub.load_tokenizer(hub.resolve("demo"))
    assert len(neutral_passages(tokenizer)) == 3
    rows = rows_of(tokenizer)
    assert first_rows(rows, 1) == rows[:1] and first_rows(rows, 10**6) == rows


def test_rows_losses_are_those_of_transformers():
    path = hub.resolve("demo")
    model, tokenizer = halfbyte.load("demo", load_in_4bit=False, dtype="float32")
    rows = rows_of(tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    for packed in (True, False):
        found = row_losses(model, rows, packed=packed)
        for row, total, count in zip(rows, found.sums, found.tokens, strict=True):
            ids = torch.tensor([row.input_ids])
            with torch.no_grad():
                assert count == len(row.input_ids) - 1
                assert total / count == pytest.approx(float(theirs(ids, labels=ids).loss), rel=1e-4)


def test_each_model_is_the_one_it_is_called(trained_run: Run):
    """The original, the base in 4 bits and the run, out of one model; and it is left as it was."""
    model, tokenizer = halfbyte.load(trained_run.path, dtype="float32")
    rows, path = rows_of(tokenizer), Path(trained_run.info()["base"]["path"])
    before = row_losses(model, rows, packed=True)
    judge = Judge(model, OriginalWeights(model, path), True, True)
    found = judge.on_rows(rows)
    assert list(found) == ["original", "base", "run"] and found["run"] == before
    plain, _ = halfbyte.load("demo", load_in_4bit=False, dtype="float32")
    assert found["original"] == row_losses(plain, rows, packed=True)
    with adapter_off(model):
        assert found["base"] == row_losses(model, rows, packed=True)
    judged = judge.judge(rows, tokenizer)
    assert judged.against == "original" and judged.neutral.kl.keys() == {"base", "run"}
    assert 0 < judged.neutral.kl["base"] < judged.neutral.kl["run"], "counting teas forgot the rest"
    assert row_losses(model, rows, packed=True) == before
    text = "\n".join(words(judged))
    assert "the model you started from" in text and "forgot" in text


def test_a_finished_run_says_what_it_learned_and_forgot(trained_run: Run):
    judged = trained_run.info()["judged"]
    assert judged["verdict"] == "better" and judged["rows"] == 10
    assert judged["loss"]["run"] < judged["loss"]["original"]
    assert judged["neutral"]["kl"]["run"] > judged["neutral"]["kl"]["base"] > 0
    assert "better" in (trained_run.adapter / "README.md").read_text()

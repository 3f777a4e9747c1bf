"""Tests of `config.unused`."""

import pytest

from halfbyte.config.options import TrainConfig
from halfbyte.config.unused import unused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"lr_scheduler_type": "constant", "warmup_ratio": 0.03},
            "warmup_ratio 0.03 is not used: lr_scheduler_type constant has no warm-up, "
            "constant_with_warmup has one",
        ),
        (
            # with transformers before 5 the share counts here
            {"warmup_steps": 0, "warmup_ratio": 0.1},
            "warmup_ratio 0.1 is not used: warmup_steps 0 is given as well",
        ),
        (
            {"max_steps": 10, "num_train_epochs": 20},
            "num_train_epochs 20 is not used: max_steps 10 says how long the training is",
        ),
        (
            {"full": True, "load_in_4bit": False, "lora_r": 64, "rank_pattern": {"x": 3}},
            "lora_r, rank_pattern are not used: full trains every parameter, and no adapter",
        ),
        (
            {"load_in_4bit": False, "bnb_4bit_quant_type": "fp4"},
            "bnb_4bit_quant_type is not used: load_in_4bit false leaves the base unquantized",
        ),
    ],
)
def test_an_option_that_another_makes_useless_is_said(options, said: str):
    assert unused(TrainConfig(model="m", data="d", **options)) == [said]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "constant", "warmup_steps": 0},
        {"warmup_steps": 5},
        {"warmup_ratio": 0.1},
        {"warmup_steps": 5, "warmup_ratio": 0.0},
        {"max_steps": 10},
        {"num_train_epochs": 2, "max_steps": -1},
        {"lora_r": 8, "bnb_4bit_quant_type": "fp4"},
        {"load_in_4bit": False},
    ],
)
def test_options_that_are_used_are_not_named(options):
    assert unused(TrainConfig(model="m", data="d", **options)) == []

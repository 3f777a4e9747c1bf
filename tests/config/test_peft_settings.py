"""Which settings of PEFT's LoRA are done here; PEFT's own configuration is the oracle."""

import dataclasses
from typing import Any

import peft
import pytest

from halfbyte.config.peft_settings import NEUTRAL, READ, undone_in_file


def test_a_plain_adapters_file_is_done():
    plain = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM").to_dict()
    assert undone_in_file(plain) == {}
    assert undone_in_file({**plain, "peft_version": "0.99.0", "auto_mapping": {"a": "b"}}) == {}


FIELDS = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
VARIANTS = [name for name, field in FIELDS.items() if field.metadata.get("is_lora_variant")]


@pytest.mark.parametrize("name", [name for name in VARIANTS if name not in READ - NEUTRAL.keys()])
def test_every_variant_that_peft_marks_is_refused(name: str):
    value: Any = [3, 4] if "tokens" in name else True if name.startswith("use") else {"rank": 2}
    assert undone_in_file({"r": 4, name: value}) == {name: value}


@pytest.mark.parametrize("value", [True, False, "gaussian", "orthogonal", "eva"])
def test_beginnings_that_leave_the_base_alone_are_over(value: Any):
    assert undone_in_file({"init_lora_weights": value}) == {}


@pytest.mark.parametrize("value", ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga"])
def test_beginnings_that_changed_the_base_are_named(value: str):
    assert undone_in_file({"init_lora_weights": value}) == {"init_lora_weights": value}

"""Every field of a trainer's arguments has its place in a table; those that ask for something else
than is done are refused by name."""

import dataclasses
from typing import Any

import pytest

from halfbyte.config.aliases import translate
from halfbyte.config.hf_objects import SAME, options_of
from halfbyte.config.options import TrainConfig
from halfbyte.config.trainer_settings import LEFT_OUT, ONLY, TRANSLATED
from halfbyte.errors import UsageError

transformers: Any = pytest.importorskip("transformers")
trl: Any = pytest.importorskip("trl")

QUIET = {"use_cpu": True, "report_to": []}


@pytest.mark.parametrize("kind", [transformers.TrainingArguments, trl.SFTConfig])
def test_every_field_is_in_one_table(kind: Any):
    """A field of a new release fails here: say what becomes of it."""
    tables = (SAME, TRANSLATED.keys(), ONLY.keys(), LEFT_OUT.keys())
    places = {
        field.name: sum(field.name in table for table in tables)
        for field in dataclasses.fields(kind)
    }
    assert not [name for name, count in places.items() if count == 0], "in no table"
    assert not [name for name, count in places.items() if count > 1], "in several tables"
    assert options_of((kind("out", **QUIET),), ()), "the defaults are taken"


def test_a_field_that_is_not_known_is_refused_unless_it_is_at_its_default():
    @dataclasses.dataclass
    class Later(trl.SFTConfig):
        loss_of_tomorrow: float = 0.5

    plain = options_of((Later("out", **QUIET),), ())
    assert plain == options_of((trl.SFTConfig("out", **QUIET),), ())
    with pytest.raises(UsageError) as caught:
        options_of((Later("out", loss_of_tomorrow=0.7, **QUIET),), ())
    assert caught.value.found == "loss_of_tomorrow=0.7 (not known here)"


@pytest.mark.parametrize(
    "settings",
    [
        {"report_to": ["mlflow"]},
        {"report_to": ["tensorboard", "comet_ml"]},
        {"hub_token": "hf_other"},
        {"hub_revision": "trial"},
        {"hub_strategy": "all_checkpoints"},
        {"router_aux_loss_coef": 0.01},
        {"data_seed": 0},
        {"ignore_data_skip": True},
        {"save_strategy": "epoch"},
        {"trust_remote_code": True},
        {"trackio_space_id": "me/logs"},
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 8}}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_is_not_done_is_refused_by_name(settings: dict[str, Any]):
    with pytest.raises(UsageError) as caught:
        options_of((trl.SFTConfig("out", **{**QUIET, **settings}),), ())
    said = f"{caught.value.what} {caught.value.found}"
    name, value = next(iter(settings.items()))
    assert name in said and (value[-1] if isinstance(value, list) else "") in said


def test_evaluation_by_steps_is_ours_where_rows_are_held_out():
    by_steps = trl.SFTConfig("out", eval_strategy="steps", eval_steps=50, **QUIET)
    assert options_of((by_steps,), ())["eval_steps"] == 50
    for other in ({"eval_strategy": "epoch"}, {"eval_strategy": "steps", "eval_steps": 0.1}):
        assert "eval_steps" not in options_of((trl.SFTConfig("out", **other, **QUIET),), ())


def test_a_file_that_names_them_is_told_the_same():
    """And not to take an option whose name is alike: revision is the base's."""
    known = set(TrainConfig.model_fields)
    for name, value in (
        ("hub_revision", "trial"),
        ("hub_strategy", "checkpoint"),
        ("data_seed", 0),
    ):
        with pytest.raises(UsageError) as caught:
            translate(name, value, known, "a.yaml")
        assert caught.value.what == f"{name} {value} is no option here"
        assert caught.value.ways_out == (ONLY[name][1],)
    for name, value in (("hub_strategy", "end"), ("hub_token", None), ("eval_on_start", True)):
        found, notice = translate(name, value, known, "a.yaml")
        assert not found and notice and "left out" in notice
    assert translate("activation_checkpointing", True, known, "a.yaml")[0] == {
        "gradient_checkpointing": True
    }

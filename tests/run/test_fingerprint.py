"""Tests of `run.fingerprint`."""

from pathlib import Path
from typing import Any

import pytest

import halfbyte
from halfbyte.config.options import TrainConfig
from halfbyte.errors import (
    Interrupted,
    ModelError,
)
from halfbyte.progress import Reporter
from halfbyte.run.fingerprint import RULES, changes_since, fingerprint, rules_of

from ..helpers import reliable_options, stopped_after


def record(**changes: Any) -> dict[str, Any]:
    """What `run.json` says of a training."""
    options = {"warmup_ratio": 0.0, "eval_split": 0.0, "optim": "adamw_torch", **changes}
    dtype = options.pop("compute_dtype", "float32")
    beside = {key: options.pop(key) for key in ("passes_apart", "warmup_steps") if key in options}
    cut = options.pop("rows_cut", 0)
    config = TrainConfig(model="m", data="d", **options)
    return {
        "config": config.model_dump(),
        "data": {"sha256": "", "rows_cut": cut},
        "machine": {"threads": 2, "device": "", "kernel_path": ""},
        "versions": {"torch": "", "transformers": ""},
        "compute_dtype": dtype,
        **dict.fromkeys(("template_sha256", "tokenizer_sha256", "total_steps"), ""),
        **beside,
    }


CONCERNED = {
    "arithmetic": {"compute_dtype": "bfloat16"},
    "optimizer_codes": {"optim": "adamw_8bit"},
    "optimizer_states": {"optim": "adamw_8bit", "modules_to_save": "lm_head"},
    "masters": {"full": True, "load_in_4bit": False, "compute_dtype": "bfloat16"},
    "decay": {"weight_decay": 0.1, "modules_to_save": "norm"},
    "order": {"packing": True},
    "split": {"eval_split": 0.1, "rows_cut": 3},
    "passes": {"passes_apart": True},
    "rates": {"warmup_steps": 2},
}


@pytest.mark.parametrize("name", RULES)
def test_a_resume_under_another_rule_is_refused_by_its_name(name: str):
    """A checkpoint of a release that computed the same training in another way."""
    info = record(**CONCERNED[name])
    older = {key: value for key, value in fingerprint(info).items() if key not in RULES}
    with pytest.raises(ModelError, match="another training") as refusal:
        changes_since({"fingerprint": older}, info, set())
    assert RULES[name].says in refusal.value.found
    assert any("--allow_change" in way and name in way for way in refusal.value.ways_out)
    lines = changes_since({"fingerprint": older}, info, set(RULES))
    assert f"{name}: 1 then, 2 now ({RULES[name].says})" in lines
    plain = record()
    older = {key: value for key, value in fingerprint(plain).items() if key not in RULES}
    assert changes_since({"fingerprint": older}, plain, set()) == [], "it concerns others"


def test_a_constant_rate_that_warmed_up_once_is_named():
    info = record(lr_scheduler_type="constant", warmup_ratio=0.03)
    assert rules_of(info)["rates"] == 2
    assert rules_of(record(lr_scheduler_type="constant"))["rates"] is None


def test_rows_that_this_release_makes_otherwise_are_named():
    info, was = record(), record()
    info["data"] |= {"rows": 3, "tokens": 40, "supervised_tokens": 9}
    was["data"] |= {"rows": 3, "tokens": 41, "supervised_tokens": 9}
    with pytest.raises(ModelError, match="another training") as refusal:
        changes_since({"fingerprint": fingerprint(was)}, info, set())
    assert "rendered" in refusal.value.found
    assert len(changes_since({"fingerprint": fingerprint(was)}, info, {"rendered"})) == 1


def test_a_checkpoint_of_before_there_was_such_a_count_goes_on(
    reliable_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from halfbyte.run import checkpoint

    out, read = tmp_path / "run", checkpoint.read_state

    def older(found: checkpoint.Found) -> dict[str, Any]:
        state = read(found)
        state.get("fingerprint", {}).pop("rendered", None)  # a rehearsal's has none
        return state

    with pytest.raises(Interrupted):
        halfbyte.train(
            TrainConfig(**reliable_options(reliable_inputs, out)), reporter=stopped_after(3)
        )
    monkeypatch.setattr(checkpoint, "read_state", older)
    again = reliable_options(reliable_inputs, out, resume_from_checkpoint="auto")
    run = halfbyte.train(TrainConfig(**again), reporter=Reporter())
    assert not run.info()["changes"]


def test_no_warm_up_is_compared_as_it_was_said_before():
    was = fingerprint(record())
    assert (was["warmup_steps"], was["warmup_ratio"]) == (0, 0.0)


def test_changes_are_refused_or_allowed_by_name_and_recorded(reliable_inputs: Path, tmp_path: Path):
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        halfbyte.train(
            TrainConfig(**reliable_options(reliable_inputs, out)), reporter=stopped_after(3)
        )
    changed = reliable_options(
        reliable_inputs, out, resume_from_checkpoint="auto", learning_rate=2e-2, weight_decay=0.1
    )
    with pytest.raises(ModelError, match="another training") as caught:
        halfbyte.train(**changed, allow_change="learning_rate")
    assert (
        "weight_decay: 0.0 then, 0.1 now" in caught.value.found
        and "learning_rate" not in caught.value.found
    )
    said: list[str] = []
    config = TrainConfig(**changed, allow_change="learning_rate,weight-decay")
    run = halfbyte.train(config, reporter=Reporter(say=said.append))
    assert any(
        "will not end as the unbroken run" in line and "weight_decay" in line for line in said
    )
    assert [c["step"] for c in run.info()["changes"]] == [3, 3]
    with pytest.raises(ModelError, match="another training") as caught:
        halfbyte.train(
            **reliable_options(
                reliable_inputs, out, resume_from_checkpoint="auto", lora_r=8, allow_change="lora_r"
            )
        )
    assert not any("allow_change" in way for way in caught.value.ways_out), (
        "no resume can change the rank"
    )

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
from halfbyte.run.fingerprint import changes_since, fingerprint

from ..helpers import reliable_options, stopped_after


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_resume_across_other_arithmetic_is_named(dtype: str):
    """A checkpoint of a release whose 16-bit gradients had other last bits."""
    info: dict[str, Any] = {
        "config": {"optim": "adamw_8bit", "lora_r": 4},
        "data": {"sha256": ""},
        "machine": {"threads": 2, "device": "", "kernel_path": ""},
        "versions": {"torch": "", "transformers": ""},
        "compute_dtype": dtype,
        **dict.fromkeys(("template_sha256", "tokenizer_sha256", "total_steps"), ""),
    }
    older = {key: value for key, value in fingerprint(info).items() if key != "arithmetic"}
    if dtype == "float32":
        assert changes_since({"fingerprint": older}, info, set()) == []
        return
    with pytest.raises(ModelError, match="another training") as refusal:
        changes_since({"fingerprint": older}, info, set())
    assert "--allow_change arithmetic" in " ".join(refusal.value.ways_out)
    assert changes_since({"fingerprint": older}, info, {"arithmetic"}) == [
        "arithmetic: None then, 2 now"
    ]


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

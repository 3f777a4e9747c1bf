"""What a calling process has set for itself changes nothing of ours, and is as it was after."""

import json
import multiprocessing
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.model.defaults import plain_defaults


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def own(what: str) -> None:
    if what == "gradients":
        torch.set_grad_enabled(False)
    elif what == "dtype":
        torch.set_default_dtype(torch.bfloat16)
    elif what == "device":
        torch.set_default_device("meta")


def trained(home: Path, name: str) -> bytes:
    rows = home / f"{name}.jsonl"
    rows.write_text(json.dumps({"prompt": "one", "completion": "two"}) * 1 + "\n")
    options: dict[str, Any] = {"max_steps": 1, "num_samples": 0, "gradient_accumulation_steps": 1}
    run = halfbyte.train("demo", str(rows), output_dir=str(home / name), **options)
    return (run.adapter / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("what", ["gradients", "dtype", "device"])
def test_a_training_has_the_same_bytes(tmp_path: Path, what: str):
    expected = trained(tmp_path, "plain")
    own(what)
    before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    assert trained(tmp_path, what) == expected
    after = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()
    assert after == before


def test_an_error_leaves_them_as_they_were():
    own("dtype")
    with pytest.raises(KeyError), plain_defaults():
        assert torch.empty(0).dtype == torch.float32
        raise KeyError
    assert torch.get_default_dtype() == torch.bfloat16
    with torch.inference_mode(), plain_defaults():
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def _train_there(home: str) -> bytes:
    return trained(Path(home), "pool")


def test_in_a_pools_worker_and_in_threads(tmp_path: Path):
    expected = trained(tmp_path, "plain")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_train_there, [str(tmp_path)]) == [expected]
    found: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: trained(tmp_path, f"thread{i}")}))
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: expected, 1: expected}

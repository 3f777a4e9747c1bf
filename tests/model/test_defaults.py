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
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_float32_matmul_precision("highest")


def own(what: str) -> None:
    if what == "gradients":
        torch.set_grad_enabled(False)
    elif what == "dtype":
        torch.set_default_dtype(torch.bfloat16)
    elif what == "device":
        torch.set_default_device("meta")
    elif what == "medium":
        torch.set_float32_matmul_precision("medium")
    elif what == "by backend":
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # pyright: ignore[reportAttributeAccessIssue]


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


def products() -> torch.Tensor:
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    return a @ b


@pytest.mark.parametrize("what", ["autocast", "medium", "by backend"])
def test_fp32_is_multiplied_as_it_is(what: str):
    """A process that asked for less for itself gets it back."""
    expected = products()
    own(what)
    precision = torch.backends.mkldnn.matmul.fp32_precision  # pyright: ignore[reportAttributeAccessIssue]
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        with plain_defaults():
            assert torch.equal(products(), expected)
            assert products().dtype == torch.float32
        assert torch.is_autocast_enabled("cpu") == (what == "autocast")
    assert torch.backends.mkldnn.matmul.fp32_precision == precision  # pyright: ignore[reportAttributeAccessIssue]


def test_one_thread_that_leaves_does_not_put_back_what_another_needs():
    own("dtype")
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with plain_defaults():
            inside.set()
            assert leave.wait(10)

    thread = threading.Thread(target=first)
    thread.start()
    assert inside.wait(10)
    with plain_defaults():
        leave.set()
        thread.join()
        assert torch.get_default_dtype() == torch.float32
    assert torch.get_default_dtype() == torch.bfloat16


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

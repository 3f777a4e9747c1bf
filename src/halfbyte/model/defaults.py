"""PyTorch's defaults as this package's code and transformers' take them, whatever the calling
process has set for itself."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def plain_defaults() -> Iterator[None]:
    """Within this block gradients are on, new tensors are fp32 and on the CPU, and fp32 numbers are
    multiplied as they are: neither autocast nor a lower precision (bf16, TF32) rounds them.
    Afterwards all is as before."""
    device = torch.get_default_device()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu":  # costs a little in every call
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(_PROCESS)
        yield


class _OfTheProcess:
    """What is one for all threads: set by the first to enter, put back by the last to leave."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before: list[Callable[[], object]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._before = [_default_dtype(), _fp32_products()]
            self._inside += 1

    def __exit__(self, *exception: Any) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for put_back in self._before:
                    put_back()


_PROCESS = _OfTheProcess()


def _default_dtype() -> Callable[[], object]:
    """Make it fp32; returns what puts it back."""
    dtype = torch.get_default_dtype()
    if dtype == torch.float32:
        return lambda: None
    torch.set_default_dtype(torch.float32)
    return lambda: torch.set_default_dtype(dtype)


def _fp32_products() -> Callable[[], object]:
    """Have fp32 products computed in fp32; returns what puts the calling process's choice back."""
    try:
        chosen = torch.get_float32_matmul_precision()
    except RuntimeError:  # chosen by backend, which PyTorch does not tell in one word
        backends: list[Any] = [torch.backends.mkldnn.matmul, torch.backends.cuda.matmul]  # pyright: ignore[reportAttributeAccessIssue]
        before = [(backend, backend.fp32_precision) for backend in backends]
        for backend in backends:
            backend.fp32_precision = "ieee"
        return lambda: [setattr(backend, "fp32_precision", value) for backend, value in before]
    if chosen == "highest":
        return lambda: None
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(chosen)


def with_plain_defaults(function: Callable[..., Any]) -> Any:
    """Have a function run within `plain_defaults`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with plain_defaults():
            return function(*args, **kwargs)

    return call

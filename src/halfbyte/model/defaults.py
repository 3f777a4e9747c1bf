"""PyTorch's defaults as this package's code and transformers' take them, whatever the calling
process has set for itself."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def plain_defaults() -> Iterator[None]:
    """Within this block gradients are on, and new tensors are fp32 and on the CPU; afterwards all
    is as before."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        if device.type != "cpu":  # costs a little in every call
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            if dtype != torch.float32:
                torch.set_default_dtype(dtype)


def with_plain_defaults(function: Callable[..., Any]) -> Any:
    """Have a function run within `plain_defaults`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with plain_defaults():
            return function(*args, **kwargs)

    return call

"""The `torch.library` namespace ``halfbyte``, the chunk size of plain-PyTorch passes, and which
device is meant."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..ledger import Part


def first_order(backward: Callable[..., Any]) -> Any:
    """Of a backward pass whose own gradients are not computed: asking for them (``create_graph``)
    is an error, and gives no zeros."""

    @functools.wraps(backward)
    def first(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{backward.__qualname__.partition('.')[0].strip('_')} has no second derivatives "
                "(create_graph=True): leave the model as it is, without halfbyte.optimize"
            )
        return backward(ctx, *grads)

    return first


LIBRARY = torch.library.Library("halfbyte", "DEF")

CHUNK = 1 << 18
"""Weights handled at once by a plain-PyTorch pass: its buffers stay in the second-level cache
(fp32: 1 MiB)."""

_planned = "cpu"


@contextlib.contextmanager
def planning_for(device_type: str) -> Iterator[None]:
    """Within this block tensors on the ``meta`` device stand for ones on this kind of device
    ("cpu", "cuda")."""
    global _planned
    before, _planned = _planned, device_type
    try:
        yield
    finally:
        _planned = before


def device_type(tensor: Tensor) -> str:
    """The kind of device a tensor lies on, or stands for."""
    return _planned if tensor.is_meta else tensor.device.type


Listener = Callable[[Part, int, bool], None]
_listener: Listener | None = None


@contextlib.contextmanager
def recording_workspace(listener: Listener) -> Iterator[None]:
    """Within this block fakes tell what their operation takes beside its results.

    Args:
        listener: called with the part, bytes, and whether they stay taken.
    """
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def record_workspace(part: Part, size: int, kept: bool = False) -> None:
    """Say, in a fake, that an operation takes so many bytes until it is done (kept: from then
    on)."""
    if _listener is not None:
        _listener(Part(part), size, kept)


def define(schema: str, reference: Callable, fake: Callable) -> None:
    """Declare an operation (`torch.library`).

    Args:
        schema: name, arguments, results.
        reference: what it computes, in plain PyTorch, on all devices.
        fake: its result on ``meta`` tensors.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, on_one_device(name, reference), "CompositeExplicitAutograd")
    LIBRARY.impl(name, on_one_device(name, fake), "Meta")


def on_one_device(name: str, function: Callable) -> Callable:
    """The function, which raises ValueError where its tensors lie on several devices: PyTorch asks
    the kernel of one of them, which would read another's addresses, or none. Boundaries of rows
    (integers) are on the host everywhere."""

    def checked(*args: Any) -> Any:
        first: torch.device | None = None
        for arg in args:
            for each in arg if isinstance(arg, list) else (arg,):
                if isinstance(each, Tensor) and each.dtype not in (torch.int32, torch.int64):
                    first = first or each.device
                    if each.device != first:
                        raise ValueError(
                            f"halfbyte::{name} needs its tensors on one device, and got some on "
                            f"{first} and some on {each.device}"
                        )
        return function(*args)

    return checked


def as_wide(t: Tensor) -> Tensor:
    """The tensor in the width passes compute in: fp32, or fp64 where it is (the tests'
    reference)."""
    return t if t.dtype == torch.float64 else t.float()


ROW_MULTIPLE = 16
"""Numbers of rows are rounded up to this, so that matrix libraries meet few shapes."""

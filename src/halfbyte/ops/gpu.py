"""Triton on GPUs: found, tried, called.

An operation's Triton kernel serves tensors on a GPU where Triton is installed. Before it is used
for the first time in a process it computes a small case beside the plain-PyTorch reference; if it
raises or differs, the reference computes from then on, and `why` says so. (The tests run the same
kernels in Triton's interpreter, on a CPU.)
"""

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .library import LIBRARY, device_type

Case = Callable[[torch.device], tuple[Any, ...]]
REGISTERED: dict[str, tuple[Callable, Callable, tuple[Case, ...]]] = {}
"""Operation to its reference, its Triton kernel and the small cases they are compared on."""
_failed: dict[str, str] = {}
_trusted: set[str] = set()


@cache
def installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def wanted() -> bool:
    """Whether Triton is there and was not switched off (HALFBYTE_TRITON=0)."""
    return installed() and os.environ.get("HALFBYTE_TRITON", "1") != "0"


def computes(tensor: Tensor, name: str = "") -> bool:
    """Whether Triton computes on this tensor (or, on the ``meta`` device, would on the one it
    stands for), and has not been found wrong for an operation.

    A plan for a GPU that is not there takes Triton to be there with it.
    """
    if device_type(tensor) != "cuda" or name in _failed:
        return False
    return wanted() or not torch.cuda.is_available()


def path_in_use() -> str:
    """For a run's record."""
    return "triton" if wanted() else "torch"


def try_all() -> str:
    """Try every operation on the GPU that is there; `why` afterwards."""
    for name in REGISTERED:
        serves(name)
    return why()


def why() -> str:
    """What computes on a GPU, and the reason."""
    if not wanted():
        return "plain PyTorch: " + (
            "HALFBYTE_TRITON is 0" if installed() else "Triton is not installed"
        )
    if _failed:
        return "Triton, but plain PyTorch for " + "; ".join(
            f"{name} ({reason})" for name, reason in _failed.items()
        )
    return "Triton"


def register(name: str, reference: Callable, kernel: Callable, *cases: Case) -> None:
    """On GPUs, compute an operation by Triton where it is there and agrees with the reference on
    small cases.

    Args:
        cases: arguments of small calls on a device; tensors that are written are filled anew for
            each side.
    """

    REGISTERED[name] = (reference, kernel, cases)

    def on_gpu(*args: Any) -> Any:
        return kernel(*args) if serves(name) else reference(*args)

    LIBRARY.impl(name, on_gpu, "CUDA")


def serves(name: str) -> bool:
    """Whether Triton computes an operation on GPUs, tried where it was not yet."""
    if name in _trusted:
        return True
    if name in _failed or not wanted():
        return False
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := tried(name, device):
        _failed[name] = reason
        return False
    _trusted.add(name)
    return True


def tried(name: str, device: torch.device) -> str:
    """What is wrong with an operation's Triton kernel on its small cases, "" if nothing."""
    reference, kernel, cases = REGISTERED[name]
    return next(
        (reason for case in cases if (reason := disagreement(reference, kernel, case, device))), ""
    )


def sample(device: torch.device, *shape: int, wide: bool = False, seed: int = 0) -> Tensor:
    """Random numbers for a small case: in the type that is computed in there, or in fp32."""
    values = torch.randn(
        shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu", dtype=torch.float32
    )
    narrow = (
        torch.bfloat16
        if device.type == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
        else torch.float16
    )
    return values.to(device, torch.float32 if wide else narrow)


TOLERANCE = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def disagreement(reference: Callable, kernel: Callable, case: Case, device: torch.device) -> str:
    """What is wrong with a kernel on its small case, "" if nothing: integers must be equal, floats
    near."""
    outcomes = []
    for function in (reference, kernel):
        arguments = case(device)
        try:
            returned = function(*arguments)
        except torch.OutOfMemoryError:  # says nothing of the kernel
            raise
        except Exception as error:  # a compiler's or a driver's
            return (
                f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            )
        written = [
            t
            for a in arguments
            for t in (a if isinstance(a, list) else [a])
            if isinstance(t, Tensor)
        ]
        results = [returned] if isinstance(returned, Tensor) else list(returned or [])
        outcomes.append([*results, *written])
    for mine, theirs in zip(outcomes[1], outcomes[0], strict=True):
        if (mine.shape, mine.dtype) != (theirs.shape, theirs.dtype):
            return (
                f"{mine.dtype} {list(mine.shape)} in place of {theirs.dtype} {list(theirs.shape)}"
            )
        if mine.dtype not in TOLERANCE:
            if not torch.equal(mine, theirs):
                return f"{int((mine != theirs).sum())} of {mine.numel()} {mine.dtype} values differ"
        elif mine.numel() and not _near(mine, theirs):
            return f"{mine.dtype} values differ"
    return ""


def _near(mine: Tensor, theirs: Tensor) -> bool:
    difference, size = (mine.float() - theirs.float()).norm(), theirs.float().norm()
    return bool(difference <= TOLERANCE[mine.dtype] * size)

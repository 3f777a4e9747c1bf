"""The C++ kernels of the operations for CPUs: the library found, checked, and called behind the
same contracts.

``ops/csrc`` is built with the package into ``halfbyte_cpu`` next to this file, with a plain C
interface (`halfbyte.h`) that ctypes calls; nothing in it knows PyTorch. It holds several kernels,
one per instruction set, and takes the best the processor runs. It is loaded after torch, so both
use one OpenMP runtime and one pool of threads; every call says how many of them, as
`torch.get_num_threads` does.

Without the library, where no compiler was at hand, every operation runs in plain PyTorch: the same
bits where an operation is exact, within rounding where it is not, only slower. `use` chooses; `why`
says what was found.
"""

import contextlib
import ctypes
import importlib.resources
import os
import threading
from collections.abc import Callable, Iterator
from ctypes import c_double
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..ledger import Part
from .cpu_calls import _product
from .cpu_library import _BYTES, _DTYPES, _FP32, call, open_library
from .library import LIBRARY, device_type, on_one_device, record_workspace

KERNELS = ("auto", "cpp", "torch")
_NAME = "halfbyte_cpu.so"


_library: Any = None
_why = ""
_chosen = "auto"
_tried = False
_lock = threading.Lock()


def _find() -> None:
    """Load the library once; `_why` says what became of it."""
    global _library, _why, _tried
    if _tried:
        return
    with _lock:
        if _tried:
            return
        respect_limits()
        try:
            file = importlib.resources.files("halfbyte.ops").joinpath(_NAME)
            if file.is_file():
                library = open_library(str(file))
                _why = _choose_best(library) + _notes(file)
                _library = library
            else:
                _why = (
                    "the library was not built (no C++ compiler at installation, or it failed: "
                    "`pip install -v` shows how): plain PyTorch, slower, is used"
                )
        except OSError as error:
            _why = f"the library does not load ({error}): plain PyTorch, slower, is used"
        _tried = True


def _notes(file: Any) -> str:
    """What was left out when the library was built, and why."""
    try:
        _, *notes = file.parent.joinpath("halfbyte_cpu.txt").read_text().split("\n")
    except (OSError, AttributeError):
        return ""
    return "".join(f"; {note}" for note in notes if note)


def respect_limits() -> None:
    """Have PyTorch and the library use no more threads than OpenMP gives: where it gives fewer than
    were asked for (OMP_THREAD_LIMIT), products of PyTorch's own are wrong."""
    limit = os.environ.get("OMP_THREAD_LIMIT", "")
    if limit.isdigit() and 0 < int(limit) < torch.get_num_threads():
        torch.set_num_threads(int(limit))


def _after_fork() -> None:
    """In a child: OpenMP's threads were not forked, and who waits for them waits for ever."""
    if _tried:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _choose_best(library: Any) -> str:
    """The first path that agrees with the last, the portable one, on a small product; says which
    and why."""
    names = library.hb_paths().decode().split()
    generator = torch.Generator("cpu").manual_seed(0)
    packed = torch.randint(0, 256, (64 * 128 // 2,), generator=generator, **_BYTES)
    absmax, quant_map = (
        torch.rand(128, generator=generator, **_FP32),
        torch.linspace(-1, 1, 16, **_FP32),
    )
    x = torch.randn(40, 128, generator=generator, **_FP32).bfloat16()
    parts = (packed, absmax, quant_map, None, None, None, 64, 256)

    def product(name: str) -> Tensor:
        library.hb_choose(name.encode())
        return _product(library, "hb_linear", x, parts, 64 * 128, 64, None, None, None).float()

    expected = product(names[-1])
    refused = []
    for name in names:
        # bf16 results of 128 products: within a few units of the last place of the largest
        if bool(((product(name) - expected).abs() <= 2**-6 * expected.abs().max()).all()):
            rest = [other for other in names if other != name and other not in refused]
            wrong = (
                f"; {', '.join(refused)} computes wrongly here and is not used" if refused else ""
            )
            return f"{name} (this processor also runs: {', '.join(rest) or 'nothing else'}{wrong})"
        refused.append(name)
    raise OSError("it computes wrongly on this processor")


def active() -> Any:
    """The library, or None where plain PyTorch computes."""
    _find()
    return None if _chosen == "torch" else _library


def serves(tensor: Tensor) -> bool:
    """Whether the library computes on this tensor (or, on the ``meta`` device, would on the one it
    stands for)."""
    return device_type(tensor) == "cpu" and active() is not None


def plan_product(x: Tensor, depth: int) -> None:
    """What a product of the library packs its input into, and keeps: all tokens for all threads to
    read."""
    tokens, size = x.numel() // depth, 2 if x.element_size() == 2 else 4
    record_workspace(
        Part.KERNEL_SCRATCH, -(-tokens // 16) * 16 * -(-depth // 32) * 32 * size, kept=True
    )


def why() -> str:
    """What computes on this CPU, and the reason."""
    _find()
    return "plain PyTorch was asked for" if _chosen == "torch" else _why


def use(kernels: str) -> None:
    """Choose what computes on the CPU from now on: "auto", "cpp" or "torch".

    Raises:
        UsageError: "cpp" without the library.
    """
    global _chosen
    if kernels not in KERNELS:
        raise UsageError(f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    _find()
    if kernels == "cpp" and _library is None:
        raise UsageError(
            "--kernels cpp: there is no C++ library",
            found=_why,
            ways_out=[
                "install a C++ compiler (g++ or clang++) and the package again",
                "--kernels auto",
            ],
        )
    _chosen = kernels


@contextlib.contextmanager
def using(kernels: str) -> Iterator[None]:
    """`use` for a while."""
    before = _chosen
    use(kernels)
    try:
        yield
    finally:
        use(before)


def paths() -> list[str]:
    """Instruction sets the library has kernels for and this processor runs, best first; empty
    without the library."""
    _find()
    return _library.hb_paths().decode().split() if _library else []


def path_in_use() -> str:
    """What computes: an instruction set's name, or "torch"."""
    return "torch" if active() is None else _library.hb_path().decode()


def choose_path(name: str) -> None:
    """Use a lesser kernel than the best, to measure or to test it.

    Raises:
        UsageError: the processor or the library does not have it.
    """
    _find()
    if _library is None or _library.hb_choose(name.encode()):
        raise UsageError(
            f"there is no kernel path {name!r} here",
            expected=", ".join(paths()) or "none: no library",
        )


def register(name: str, reference: Callable, cpp: Callable) -> None:
    """On CPUs, compute an operation by the library where it is active."""

    def on_cpu(*args: Any) -> Any:
        library = active()
        return reference(*args) if library is None else cpp(library, *args)

    LIBRARY.impl(name, on_one_device(name, on_cpu), "CPU")


def product_peak(dtype: torch.dtype) -> float:
    """Floating-point operations per second of the products a path is built on, out of registers
    alone."""
    library = active()
    if library is None:
        raise UsageError("this needs the C++ library", found=why())
    rate, best = c_double(), 0.0
    for _ in range(3):
        call(
            library, "hb_product_peak", _DTYPES[dtype], torch.get_num_threads(), ctypes.byref(rate)
        )
        best = max(best, rate.value)
    return best

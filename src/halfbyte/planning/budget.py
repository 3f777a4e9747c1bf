"""Memory to plan for: of a card, of a size that was named, or what this machine has free."""

import re
from dataclasses import dataclass

import torch

from ..config.options import TrainConfig
from ..errors import UsageError
from ..memory.process import available, held_now
from ..model.architecture import choose_device

MIB = 1 << 20
CARDS = {
    "rtx-3060": 12288,
    "rtx-3090": 24576,
    "rtx-4060": 8188,
    "rtx-4060-ti": 16380,
    "rtx-4070": 12282,
    "rtx-4080": 16376,
    "rtx-4090": 24564,
    "rtx-5090": 32607,
    "rtx-a6000": 49140,
    "rtx-6000-ada": 49140,
    "t4": 15360,
    "v100-16gb": 16384,
    "v100-32gb": 32768,
    "a10": 23028,
    "l4": 23034,
    "a40": 46068,
    "l40s": 46068,
    "a100-40gb": 40960,
    "a100-80gb": 81920,
    "h100": 81559,
    "h200": 143771,
}
"""Memory of a card as its driver reports it, MiB."""

CONTEXT_BYTES = 650_000_000
"""Of a CUDA process before its first tensor: context, modules, workspaces; 0.6 to 0.7 GB."""
RESERVE = 0.02
"""Share of a budget that is left free: a plan may be short by as much."""


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if abs(count) >= 100 * MIB else f"{count / MIB:.1f} MiB"


@dataclass(frozen=True)
class Budget:
    """Memory to plan for. device: "cpu" or "cuda". bytes: 0 where nothing is known. runtime: taken
    before it starts."""

    device: str
    bytes: int
    runtime: int


def parse_size(text: str) -> int:
    """Bytes of "24GiB", "24 GB" or "24" (GiB).

    Raises:
        UsageError: neither a size nor the name of a card.
    """
    found = re.fullmatch(r"([\d.]+)\s*(GiB|GB|MiB|MB|G|M|)B?", text.strip(), re.IGNORECASE)
    unit = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "g": 2**30, "m": 2**20, "": 2**30}
    try:
        size = int(float(found.group(1)) * unit[found.group(2).lower()]) if found else 0
    except ValueError:
        size = 0
    if size <= 0:
        raise UsageError(
            f"fit_to must be a size or the name of a card, got {text!r}",
            expected=f"24GiB, 16GB, or one of {', '.join(CARDS)}",
        )
    return size


def budget_of(config: TrainConfig) -> Budget:
    """What there is to fit into: ``fit_to``, or what this machine has free now.

    A card's name plans for a GPU whether one is there or not; a size, for the device the options
    choose.
    """
    card = CARDS.get((config.fit_to or "").lower().replace("_", "-").replace(" ", "-"))
    if config.fit_to and card is not None:
        return Budget("cuda", card * MIB, CONTEXT_BYTES)
    device = (
        torch.device(config.device)
        if config.device.startswith("cuda")
        else choose_device(config.device)
    )
    if device.type == "cuda":
        if config.fit_to or not torch.cuda.is_available():
            return Budget("cuda", parse_size(config.fit_to) if config.fit_to else 0, CONTEXT_BYTES)
        # the context is there by the time that free memory can be asked for
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return Budget("cuda", free + CONTEXT_BYTES, CONTEXT_BYTES)
    runtime = held_now()
    if config.fit_to:
        return Budget("cpu", parse_size(config.fit_to), runtime)
    free = available()
    return Budget("cpu", 0 if free is None else free + runtime, runtime)

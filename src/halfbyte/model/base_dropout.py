"""Dropout that a base model has of its own (``attention_dropout``, ``resid_pdrop``, ...), and noise
on what its routers read (``router_jitter_noise``), which its configuration asks for in training.

Its masks are PyTorch's to draw, wherever a model does so. A training seeds PyTorch's generator
anew, by counters, for every micro-batch, so they are a function of these as an adapter's are: a
resumed run draws the same ones.
"""

import contextlib
import hashlib
from collections.abc import Iterator

import torch
from torch import nn


def base_dropout(model: nn.Module) -> dict[str, float]:
    """What is dropped with which probability, by the names that modules have for it; {} of most
    models."""
    found: dict[str, float] = {}
    for module in model.modules():
        for name, p in _probabilities(module):
            found[name] = max(p, found.get(name, 0.0))
    return found


def silence(model: nn.Module) -> None:
    """Leave it out, in place."""
    for module in model.modules():
        for name, _ in list(_probabilities(module)):
            setattr(module, "p" if isinstance(module, nn.modules.dropout._DropoutNd) else name, 0.0)


def _probabilities(module: nn.Module) -> Iterator[tuple[str, float]]:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        if module.p:
            yield "dropout", module.p
        return
    for name, value in vars(module).items():
        random = "drop" in name or "jitter" in name  # of routers
        if random and type(value) is float and 0 < value <= 1:
            yield name, value


@contextlib.contextmanager
def masks_of(device: torch.device, *counters: int) -> Iterator[None]:
    """Within this block masks are a function of the counters; PyTorch's random state is as before
    afterwards."""
    digest = hashlib.sha256(" ".join(map(str, counters)).encode()).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest[:7], "little"))
        yield

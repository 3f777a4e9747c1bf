"""The parts that memory is counted by: a plan's ledger, what is measured, and what an operation
says it takes.

A part is what a person can do something about. Its value is its name for people and in files.
"""

import contextlib
import threading
from collections.abc import Iterator
from enum import StrEnum


class Part(StrEnum):
    """A line of the ledger."""

    # what stays from step to step
    CODES = "4-bit codes"
    SCALES = "scales"
    LAYERS = "16-bit layers"
    EMBEDDINGS = "embeddings and head"
    NORMS = "norms and biases"
    ADAPTERS = "adapters"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer states"
    # what comes and goes in a step
    LAYER_INPUTS = "kept layer inputs"
    KEPT_ACTIVATIONS = "kept activations"
    LIVE_LAYER = "live layer"
    LOGITS = "logits chunk"
    KERNEL_SCRATCH = "kernel scratch"
    DEQUANTIZED_WEIGHT = "dequantized weight"
    DEQUANTIZED_LAYER = "dequantized weights of a layer"
    # what no tensor shows
    PROCESS = "the process before it"
    GPU_CONTEXT = "GPU context"
    SLACK = "allocator slack"
    # what lies in host memory or on the disk
    STREAMED_WEIGHTS = "streamed weights"
    HOST_EMBEDDING = "embedding table"
    PAGED_STATES = "paged optimizer states"
    OFFLOADED_INPUTS = "offloaded layer inputs"
    CHECKPOINTS = "checkpoints"
    ADAPTER_FILE = "adapter"
    MODEL_FILE = "model"
    BASE_FILES = "the model's files"
    HOST_PROCESS = "host process"


RESIDENT = (
    Part.CODES,
    Part.SCALES,
    Part.LAYERS,
    Part.EMBEDDINGS,
    Part.NORMS,
    Part.ADAPTERS,
    Part.GRADIENTS,
    Part.OPTIMIZER,
)
"""Parts that stay from step to step."""

_current = threading.local()


@contextlib.contextmanager
def counted_as(part: Part) -> Iterator[None]:
    """Count tensors made within this block for a part (`planning.tracker`).

    Raises:
        ValueError: there is no such part.
    """
    before, _current.part = current_part(), Part(part)
    try:
        yield
    finally:
        _current.part = before


def current_part() -> Part:
    """The part that tensors made now count for; those of nobody else belong to the layer being
    computed."""
    return getattr(_current, "part", Part.LIVE_LAYER)

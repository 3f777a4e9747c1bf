"""A memory plan: where the bytes of a training go, whether they fit, and what could be changed."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from ..config.options import REORDERING
from ..engine.reductions import REDUCTIONS, moved
from ..errors import DoesNotFit
from ..ledger import RESIDENT, Part
from .budget import RESERVE, gib

CALL_SECONDS = 20e-6
"""One operation's way through Python and PyTorch."""
DISK_RATE, HOST_RATE = 1e9, 25e9
"""Bytes a second assumed of a disk (less where the system has them in memory anyway), and of host
memory to a GPU."""


@dataclass(frozen=True)
class LedgerLine:
    """One line of the ledger. where: "device" (the memory the model computes in), "host" (of a
    GPU's run) or "disk"."""

    part: Part
    bytes: int
    where: str = "device"


@dataclass(frozen=True)
class Choice:
    """A change of options, and what it makes of the plan. loses: what it costs besides time ("" if
    nothing)."""

    change: dict[str, Any]
    peak_bytes: int
    relative_time: float
    fits: bool
    loses: str = ""

    def flags(self) -> str:
        return " ".join(f"--{name} {str(value).lower()}" for name, value in self.change.items())


AFTERWARDS = ("merge", "chat", "export")
"""Phases that are commands of their own."""


@dataclass(frozen=True)
class MemoryPlan:
    """Where the bytes of a training go.

    Attributes: ``ledger``: parts of device memory at the peak of a steady step, then host and disk.
    ``phases``: the peak of device memory in each, bytes. ``tensor_bytes``: of all tensors at the
    peak of a steady step. ``tokens``: of the largest micro-batch. ``moved_bytes``: to and from disk
    (GPU: host memory) in an optimizer step. ``seconds``: an estimate of the whole training, None
    where the machine is not this one.
    """

    model: str
    device: str
    ledger: tuple[LedgerLine, ...]
    phases: dict[str, int]
    tensor_bytes: int
    budget_bytes: int
    parameters: int
    lora_parameters: int
    quantized_parameters: int
    tokens: int
    flop: int
    calls: int
    moved_bytes: int = 0
    steps: int = 0
    seconds: float | None = None
    choices: tuple[Choice, ...] = field(default=())

    @property
    def peak_bytes(self) -> int:
        """Of device memory, over all phases of the training."""
        return max(size for phase, size in self.phases.items() if phase not in AFTERWARDS)

    @property
    def reserve_bytes(self) -> int:
        return int(self.budget_bytes * RESERVE)

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the reserve free (True where no budget is known)."""
        return not self.budget_bytes or self.peak_bytes + self.reserve_bytes <= self.budget_bytes

    @property
    def relative_time(self) -> float:
        """Of a step, in seconds of a machine that does 10^12 operations a second; for comparing
        plans."""
        return self.flop / 1e12 + self.calls * CALL_SECONDS + self.moving_seconds

    @property
    def moving_seconds(self) -> float:
        """Of a step, if nothing else is done meanwhile."""
        return self.moved_bytes / (HOST_RATE if self.device == "cuda" else DISK_RATE)

    def live_bytes(self, tokens: int) -> int:
        """What a pass of so many tokens takes beside what stays from step to step, at most."""
        fixed = self.bytes_of(Part.LOGITS, Part.DEQUANTIZED_LAYER)
        live = self.tensor_bytes - self.bytes_of(
            *RESIDENT, Part.KERNEL_SCRATCH, Part.DEQUANTIZED_WEIGHT
        )
        return int(fixed + max(live - fixed, 0) * tokens / self.tokens)

    def bytes_of(self, *parts: str) -> int:
        """Bytes of some parts together.

        Raises:
            ValueError: there is no such part.
        """
        wanted = {Part(part) for part in parts}
        return sum(line.bytes for line in self.ledger if line.part in wanted)

    def measurable(self) -> dict[str, int]:
        """``phases`` as they would be measured: what a GPU holds outside of PyTorch's allocator
        left out."""
        outside = self.bytes_of(Part.GPU_CONTEXT) if self.device == "cuda" else 0
        return {phase: size - outside for phase, size in self.phases.items()}

    def as_dict(self) -> dict[str, Any]:
        extra = {
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "reserve_bytes": self.reserve_bytes,
        }
        choices = [{**asdict(choice), "flags": choice.flags()} for choice in self.choices]
        return {**asdict(self), **extra, "choices": choices}

    def check(self) -> None:
        """Raise DoesNotFit, with the choices as ways out, unless it fits."""
        if not self.fits:
            raise does_not_fit(self)


def in_words(plan: MemoryPlan) -> list[str]:
    """The choices of a plan as ways out: the flags, what they return, what they cost."""
    return [
        f"{choice.flags()}: {gib(plan.peak_bytes - choice.peak_bytes)} less"
        + ("" if choice.fits else " (not enough by itself)")
        + (f"; {choice.loses}" if choice.loses else "")
        for choice in plan.choices
    ]


def auto_in_words(change: dict[str, Any]) -> Iterator[str]:
    """What `Planner.resolve_auto` decided, where it is worth a line."""
    if away := moved(change):
        yield (
            f"it does not fit otherwise: {', '.join(away)} stay out of memory and come when "
            "they are used"
        )
    for reduction in REDUCTIONS:
        if (value := change.get(reduction.option)) and reduction.option in REORDERING:
            yield f"it does not fit otherwise: {reduction.sentence(value)}"
    if change.get("kept_activations") == "all":
        some = change.get("kept_layers", -1)
        yield (
            f"there is room: {'every layer keeps' if some < 0 else f'{some} layers keep'} its "
            "activations"
        )


def does_not_fit(plan: MemoryPlan) -> DoesNotFit:
    """The error for a plan over its budget."""
    parts = sorted((p for p in plan.ledger if p.where == "device"), key=lambda p: -p.bytes)[:4]
    over = plan.peak_bytes + plan.reserve_bytes - plan.budget_bytes
    return DoesNotFit(
        f"this does not fit: the training peaks at {gib(plan.peak_bytes)} and "
        f"{gib(plan.budget_bytes)} are there, "
        f"of which {RESERVE:.0%} stay free: {gib(over)} too much",
        found=", ".join(f"{part.part} {gib(part.bytes)}" for part in parts),
        ways_out=[
            *in_words(plan),
            "a smaller model, or a machine with more memory",
            "--force true tries it all the same",
        ],
        plan=plan.as_dict(),
    )

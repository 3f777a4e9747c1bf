"""AdamW with moments in 8 bits: two bytes of state a parameter instead of eight.

The algorithm is `ops.adamw8bit.adamw_update`; this file is only where its state lives. Tensors of
4,096 elements and more keep 8-bit codes in one arena (so that they can be updated, saved and paged
as a whole); smaller ones, where a block's statistics are poor and nothing is to be gained, keep
fp32 moments. That limit is bitsandbytes' own. So do those named: embeddings and heads, most of
whose rows have no gradient in most steps (Dettmers et al. 2022, section 2.3, for embeddings).
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..codebooks import dynamic_map
from ..ops.adamw8bit import BLOCK, adamw_update, decode, padded_size

MIN_8BIT_SIZE = 4096
SMALL: tuple[str, ...] = ("small_m", "small_v")
"""The fp32 moments of what is not held in 8 bits."""
PIECE = 1 << 18
"""Elements whose fp32 moments are updated together."""


class AdamW8bit(torch.optim.Optimizer):
    """Decoupled weight decay Adam (Loshchilov & Hutter 2019) with blockwise 8-bit states (Dettmers
    et al. 2022).

    Args:
        params: fp32 parameters (or groups of them).
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        min_8bit_size: smaller tensors keep fp32 moments.
        in_32bit: parameters that keep fp32 moments whatever their size.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        min_8bit_size: int = MIN_8BIT_SIZE,
        in_32bit: Iterable[Tensor] = (),
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        device = _device(self._all())
        self._min_8bit_size, self._in_32bit = min_8bit_size, {id(p) for p in in_32bit}
        self._maps = (
            torch.tensor(dynamic_map(signed=True), dtype=torch.float32, device=device),
            torch.tensor(dynamic_map(signed=False), dtype=torch.float32, device=device),
        )
        self.steps = 0
        self.missed: dict[int, int] = {}  # of parameters: steps in which they had no gradient
        self.arenas = [self._new_arena(group["params"]) for group in self.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if hasattr(self, "arenas"):  # else they are about to be made
            self.arenas.append(self._new_arena(self.param_groups[-1]["params"]))

    def _new_arena(self, params: list[Tensor]) -> dict[str, Tensor]:
        """The group's whole state, as named tensors: what a checkpoint stores."""
        arrays = self._arrays(params).items()
        return {
            name: torch.zeros(count, dtype=dtype, device=_device(params))
            for name, (count, dtype) in arrays
        }

    def _arrays(self, params: list[Tensor]) -> dict[str, tuple[int, torch.dtype]]:
        """Elements and dtype of each tensor of a group's state."""
        large, small = self._split(params)
        size, few = sum(padded_size(p.numel()) for p in large), sum(p.numel() for p in small)
        codes, scales = (size, torch.uint8), (size // BLOCK, torch.float32)
        moments = (few, torch.float32)
        names = ("m_codes", "v_codes", "m_absmax", "v_absmax", *SMALL)
        return dict(zip(names, (codes, codes, scales, scales, moments, moments), strict=True))

    def _split(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(in 8 bits, in 32)."""
        large = [
            p for p in params if p.numel() >= self._min_8bit_size and id(p) not in self._in_32bit
        ]
        there = {id(p) for p in large}
        return large, [p for p in params if id(p) not in there]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter that has a gradient; the others stay where they are, and
        their own count of steps with them, as in torch.optim.AdamW."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is None:
                    self.missed[id(p)] = self.missed.get(id(p), 0) + 1
                elif p.grad.is_sparse:
                    raise RuntimeError(
                        f"{type(self).__name__} takes no sparse gradients "
                        "(nn.Embedding(sparse=True) makes them)"
                    )
            self._step_group(number, group)
        return loss

    def _steps_of(self, params: list[Tensor]) -> list[int]:
        """How many updates each has had, this one included; 0 for one without a gradient."""
        return [0 if p.grad is None else self.steps - self.missed.get(id(p), 0) for p in params]

    def _step_group(self, number: int, group: dict[str, Any]) -> None:
        arena = self.arenas[number]
        large, small = self._split(group["params"])
        self._update_large(group, large, [p.grad for p in large], arena, self._steps_of(large))
        flat, grads, steps = [p.view(-1) for p in small], _grads(small), self._steps_of(small)
        for pieces, first, last in windows([p.numel() for p in small], 1, PIECE):
            window = {name: arena[name][first:last] for name in SMALL}
            these = [steps[number] for number, _, _ in pieces]
            self._update_small(group, cut(flat, pieces), cut(grads, pieces), window, these)
            if flat[0].is_meta:  # a plan: the first takes as much as any
                break

    def _update_large(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: Sequence[Tensor | None],
        arena: dict[str, Tensor],
        steps: list[int],
    ) -> None:
        """Of (pieces of) parameters whose codes lie one after the other.

        Args:
            steps: the updates each has had; those of 0 are left alone.
        """
        begin = 0
        for step, run in itertools.groupby(range(len(params)), key=lambda i: steps[i]):
            chosen = list(run)
            end = begin + sum(padded_size(params[i].numel()) for i in chosen)
            if step:
                here = slice(chosen[0], chosen[-1] + 1)
                self._update_run(group, params[here], grads[here], arena, begin, end, step)
            begin = end

    def _update_run(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: Sequence[Tensor | None],
        arena: dict[str, Tensor],
        begin: int,
        end: int,
        step: int,
    ) -> None:
        """Of parameters with as many updates, whose codes are these of the arena."""
        codes, scales = slice(begin, end), slice(begin // BLOCK, end // BLOCK)
        ops.adamw_8bit_step(
            params,
            [grad for grad in grads if grad is not None],
            arena["m_codes"][codes],
            arena["v_codes"][codes],
            arena["m_absmax"][scales],
            arena["v_absmax"][scales],
            *self._maps,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
        )

    def _update_small(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        arena: dict[str, Tensor],
        steps: list[int],
    ) -> None:
        """Of pieces of parameters whose fp32 moments lie one after the other."""
        hyper: tuple[float, ...] = (
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
        )
        sizes = [p.numel() for p in params]
        moments = (arena[name].split(sizes) for name in SMALL)
        for p, grad, m, v, step in zip(params, grads, *moments, steps, strict=True):
            if step:
                adamw_update(p, grad, m, v, *hyper, t=step)  # pyright: ignore[reportCallIssue]

    def state_tensors(self) -> dict[str, Tensor]:
        """Every byte of state, by name, for a checkpoint; the step count is `steps`."""
        return {
            f"group{i}.{name}": t
            for i, arena in enumerate(self.arenas)
            for name, t in arena.items()
        }

    def resident_tensors(self) -> list[Tensor]:
        """The tensors of state that take memory: all."""
        return list(self.state_tensors().values())

    @torch.no_grad()
    def take(self, other: "AdamW8bit") -> None:
        """Take the state of an optimizer of the same parameters in other groups, some of them in 8
        bits that have 32 here; those are decoded."""
        theirs, mine = other._layout(), self._layout()
        for group in self.param_groups:
            for p in group["params"]:
                (source, was_8bit, start), (target, is_8bit, at) = theirs[id(p)], mine[id(p)]
                for kind, table in zip("mv", self._maps, strict=True):
                    small, codes, scales = (f"small_{kind}", f"{kind}_codes", f"{kind}_absmax")
                    if not is_8bit:
                        wide = source[small][start : start + p.numel()]
                        if was_8bit:
                            end = start + padded_size(p.numel())
                            absmax = source[scales][start // BLOCK : end // BLOCK]
                            wide = decode(source[codes][start:end], absmax, table)[: p.numel()]
                        target[small][at : at + p.numel()].copy_(wide)
                        continue
                    for name, grain in ((codes, 1), (scales, BLOCK)):
                        size = padded_size(p.numel()) // grain
                        piece = source[name][start // grain : start // grain + size]
                        target[name][at // grain : at // grain + size].copy_(piece)

    def _layout(self) -> dict[int, tuple[dict[str, Tensor], bool, int]]:
        """Of each parameter: the arena its state lies in, whether in 8 bits, and where it
        begins."""
        self.state_tensors()  # they have arrived
        found: dict[int, tuple[dict[str, Tensor], bool, int]] = {}
        for group, arena in zip(self.param_groups, self.arenas, strict=True):
            for in_8_bits, params in zip((True, False), self._split(group["params"]), strict=True):
                start = 0
                for p in params:
                    found[id(p)] = (arena, in_8_bits, start)
                    start += padded_size(p.numel()) if in_8_bits else p.numel()
        return found

    def state_dict(self) -> dict[str, Any]:
        """torch's own form: hyperparameters, the step count, those that parameters missed, their
        shapes, and the raw arenas."""
        missed = [self.missed.get(id(p), 0) for p in self._all()]
        own = {"steps": self.steps, "missed": missed, "arenas": self.arenas}
        return {**super().state_dict(), **own, "shapes": self._shapes()}

    def _shapes(self) -> list[list[int]]:
        return [list(p.shape) for p in self._all()]

    def _all(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the state of an optimizer of the same parameters in the same groups and order.

        Raises:
            ValueError: it is another optimizer's, or of other parameters.
        """
        state = dict(state_dict)
        if absent := {"steps", "arenas"} - state.keys():
            raise ValueError(
                f"this is the state of another optimizer than {type(self).__name__}: it has no "
                f"{' and no '.join(sorted(absent))}. Moments are not converted: begin with new ones"
            )
        arenas, missed = state.pop("arenas"), state.pop("missed", [])
        self._refuse_others(state.pop("shapes", None), arenas)
        self.steps = state.pop("steps")
        self.missed = {id(p): n for p, n in zip(self._all(), missed, strict=False) if n}
        super().load_state_dict(state)
        for mine, theirs in zip(self.arenas, arenas, strict=True):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])

    def _refuse_others(self, shapes: list[list[int]] | None, arenas: list[Any]) -> None:
        """Raise ValueError if a state is that of other parameters than these. shapes: None in
        states of before they were kept."""
        mine = self._shapes()
        if shapes is not None and shapes != mine:
            pairs = enumerate(itertools.zip_longest(shapes, mine, fillvalue="none"))
            number, (there, here) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"this state is of other parameters: number {number} has the shape {there} in it, "
                f"and {here} here"
            )
        theirs, own = ([_held(arena) for arena in each] for each in (arenas, self.arenas))
        if theirs != own:
            raise ValueError(
                f"this state is of other groups, or another min_8bit_size: {theirs} elements in 8 "
                f"and 32 bits, and {own} here"
            )


def _held(arena: dict[str, Tensor]) -> tuple[int, int]:
    """Elements of a group's state in 8 and in 32 bits."""
    return arena["m_codes"].numel(), arena["small_m"].numel()


def _device(params: list[Tensor]) -> torch.device:
    """Where a group lies; some trainers make groups of nothing."""
    return params[0].device if params else torch.device("cpu")


def _grads(params: list[Tensor]) -> list[Tensor]:
    """Gradients; of a parameter without one anything of its size, which nothing reads."""
    return [p.detach() if p.grad is None else p.grad for p in params]


Piece = tuple[int, int, int]
"""Number of a tensor, its first element and its last (exclusive)."""


def windows(sizes: Sequence[int], grain: int, most: int) -> Iterator[tuple[list[Piece], int, int]]:
    """Tensors laid one after the other, each padded to a multiple of ``grain``, cut into windows of
    at most ``most`` (a multiple of it): the pieces of each, and its first and last element
    (exclusive)."""
    pieces: list[Piece] = []
    begin = end = 0
    for number, size in enumerate(sizes):
        first = 0
        while first < size:
            last = min(size, first + most - (end - begin))
            pieces.append((number, first, last))
            end += -(-(last - first) // grain) * grain
            first = last
            if end - begin >= most:
                yield pieces, begin, end
                pieces, begin = [], end
    if pieces:
        yield pieces, begin, end


def cut(tensors: list[Tensor], pieces: list[Piece]) -> list[Tensor]:
    return [tensors[number].reshape(-1)[first:last] for number, first, last in pieces]

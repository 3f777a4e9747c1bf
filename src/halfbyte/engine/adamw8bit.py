"""AdamW with moments in 8 bits: two bytes of state a parameter instead of eight.

The algorithm is `ops.adamw8bit.adamw_update`; this file is only where its state lives. Tensors of
4,096 elements and more keep 8-bit codes in one arena (so that they can be updated, saved and paged
as a whole); smaller ones, where a block's statistics are poor and nothing is to be gained, keep
fp32 moments. That limit is bitsandbytes' own.
"""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..codebooks import dynamic_map
from ..ops.adamw8bit import BLOCK, adamw_update, padded_size

MIN_8BIT_SIZE = 4096


class AdamW8bit(torch.optim.Optimizer):
    """Decoupled weight decay Adam (Loshchilov & Hutter 2019) with blockwise 8-bit states (Dettmers
    et al. 2022).

    Args:
        params: fp32 parameters (or groups of them).
        lr, betas, eps, weight_decay: as in torch.optim.AdamW.
        min_8bit_size: smaller tensors keep fp32 moments.
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
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )
        device = self.param_groups[0]["params"][0].device
        self._min_8bit_size = min_8bit_size
        self._maps = (
            torch.tensor(dynamic_map(signed=True), device=device),
            torch.tensor(dynamic_map(signed=False), device=device),
        )
        self.steps = 0
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
        names = ("m_codes", "v_codes", "m_absmax", "v_absmax", "small_m", "small_v")
        return dict(zip(names, (codes, codes, scales, scales, moments, moments), strict=True))

    def _split(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        large = [p for p in params if p.numel() >= self._min_8bit_size]
        return large, [p for p in params if p.numel() < self._min_8bit_size]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter; all of them need a gradient (a missing one counts as
        zero)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        for number, group in enumerate(self.param_groups):
            self._step_group(number, group)
        return loss

    def _step_group(self, number: int, group: dict[str, Any]) -> None:
        arena = self.arenas[number]
        large, small = self._split(group["params"])
        self._update_large(group, large, [_grad(p) for p in large], arena)
        self._update_small(group, small, arena)

    def _update_large(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        arena: dict[str, Tensor],
    ) -> None:
        ops.adamw_8bit_step(
            params,
            grads,
            arena["m_codes"],
            arena["v_codes"],
            arena["m_absmax"],
            arena["v_absmax"],
            *self._maps,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=self.steps,
        )

    def _update_small(
        self, group: dict[str, Any], params: list[Tensor], arena: dict[str, Tensor]
    ) -> None:
        sizes = [p.numel() for p in params]
        hyper: tuple[float, ...] = (
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
        )
        moments = zip(arena["small_m"].split(sizes), arena["small_v"].split(sizes), strict=True)
        updates = list(zip(params, moments, strict=True))
        if params and params[0].is_meta:  # a plan: one after the other takes what the largest does
            updates = [max(updates, key=lambda update: update[0].numel())]
        for p, (m, v) in updates:
            adamw_update(p.view(-1), _grad(p).reshape(-1), m, v, *hyper, t=self.steps)  # pyright: ignore[reportCallIssue]

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

    def state_dict(self) -> dict[str, Any]:
        """torch's own form: hyperparameters, the step count and the raw arenas."""
        return {**super().state_dict(), "steps": self.steps, "arenas": self.arenas}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        self.steps = state.pop("steps")
        arenas = state.pop("arenas")
        super().load_state_dict(state)
        for mine, theirs in zip(self.arenas, arenas, strict=True):
            for name, tensor in mine.items():
                tensor.copy_(theirs[name])


def _device(params: list[Tensor]) -> torch.device:
    """Where a group lies; some trainers make groups of nothing."""
    return params[0].device if params else torch.device("cpu")


def _grad(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad

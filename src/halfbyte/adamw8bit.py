"""AdamW with moments in 8 bits: two bytes of state a parameter instead of eight.

The algorithm is `ops.adamw8bit.adamw_update`; this file is only where its state lives. Tensors of 4,096 elements and
more keep 8-bit codes in one arena (so that they can be updated, saved and later paged as a whole); smaller ones, where
a block's statistics are poor and nothing is to be gained, keep fp32 moments. That limit is bitsandbytes' own.
"""

from typing import Any

import torch
from torch import Tensor

from . import ops
from .codebooks import dynamic_map
from .ops.adamw8bit import BLOCK, adamw_update, padded_size

MIN_8BIT_SIZE = 4096


class AdamW8bit(torch.optim.Optimizer):
    """Decoupled weight decay Adam (Loshchilov & Hutter 2019) with blockwise 8-bit states (Dettmers et al. 2022).

    Args:
        params: fp32 parameters (or groups of them). lr, betas, eps, weight_decay: as in torch.optim.AdamW.
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
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        device = self.param_groups[0]["params"][0].device
        self._min_8bit_size = min_8bit_size
        self._maps = (
            torch.tensor(dynamic_map(signed=True), device=device),
            torch.tensor(dynamic_map(signed=False), device=device),
        )
        self.steps = 0
        self.arenas = [self._new_arena(group["params"]) for group in self.param_groups]

    def _new_arena(self, params: list[Tensor]) -> dict[str, Tensor]:
        """The group's whole state, as named tensors: what a checkpoint stores."""
        large, small = self._split(params)
        size = sum(padded_size(p.numel()) for p in large)
        device = params[0].device
        return {
            "m_codes": torch.zeros(size, dtype=torch.uint8, device=device),
            "v_codes": torch.zeros(size, dtype=torch.uint8, device=device),
            "m_absmax": torch.zeros(size // BLOCK, device=device),
            "v_absmax": torch.zeros(size // BLOCK, device=device),
            "small_m": torch.zeros(sum(p.numel() for p in small), device=device),
            "small_v": torch.zeros(sum(p.numel() for p in small), device=device),
        }

    def _split(self, params: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        large = [p for p in params if p.numel() >= self._min_8bit_size]
        return large, [p for p in params if p.numel() < self._min_8bit_size]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of every parameter; all of them need a gradient (a missing one counts as zero)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.steps += 1
        for group, arena in zip(self.param_groups, self.arenas, strict=True):
            large, small = self._split(group["params"])
            ops.adamw_8bit_step(
                large,
                [_grad(p) for p in large],
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
            sizes = [p.numel() for p in small]
            hyper: tuple[float, ...] = (group["lr"], *group["betas"], group["eps"], group["weight_decay"])
            moments = zip(arena["small_m"].split(sizes), arena["small_v"].split(sizes), strict=True)
            for p, (m, v) in zip(small, moments, strict=True):
                adamw_update(p.view(-1), _grad(p).reshape(-1), m, v, *hyper, t=self.steps)  # pyright: ignore[reportCallIssue]
        return loss

    def state_tensors(self) -> dict[str, Tensor]:
        """Every byte of state, by name, for a checkpoint; the step count is `steps`."""
        return {f"group{i}.{name}": t for i, arena in enumerate(self.arenas) for name, t in arena.items()}

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


def _grad(p: Tensor) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad

"""AdamW whose states may leave memory: in 8 bits, and in fp32.

A paged optimizer's state lies in `memory.paged_arrays` and is worked through in windows; every
number is the one its unpaged twin computes. What bitsandbytes calls paged is CUDA's managed memory,
of tensors of 100,000 elements and more, until a state is loaded; here it is all of the state, on
every device, and stays so.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..memory.paged_arrays import Pages, Ranges
from ..ops.adamw8bit import BLOCK
from ..ops.library import device_type
from .adamw8bit import SMALL, AdamW8bit, _device, _grads, cut, windows

WINDOW = {"cpu": 1 << 19, "cuda": 1 << 24}
"""Parameters whose states are in memory together."""


class _Paged:
    """What paged optimizers share: the pages of their groups, and what of their state is in memory.

    Attributes: ``paged``: whether the state lies elsewhere, now.
    """

    paged: bool
    pages: list[Pages]

    def _held(self) -> list[Tensor]:
        """The state's tensors, where it is not paged."""
        raise NotImplementedError

    def _arrive(self) -> None:
        """Wait for copies that are under way: before anything but a step reads or writes the
        state."""
        for pages in self.pages:
            pages.arrays()

    def resident_tensors(self) -> list[Tensor]:
        """The tensors of state that take memory (GPU: the card's)."""
        return [t for pages in self.pages for t in pages.staging()] if self.paged else self._held()

    def resident_bytes(self) -> int:
        """Bytes of the state that are in memory (GPU: in the card's)."""
        return (
            sum(p.resident_bytes() for p in self.pages)
            if self.paged
            else sum(t.nbytes for t in self._held())
        )

    def release(self) -> None:
        """Take no memory for what was touched from outside, by a save or a load."""
        for pages in self.pages:
            pages.release()


class PagedAdamW8bit(_Paged, AdamW8bit):
    """`AdamW8bit` whose state takes memory only while it is used, bit for bit the same numbers.

    Args:
        as for `AdamW8bit`.
        paged: False keeps the state in memory until `page_out` is called.
        directory: where the file without a name goes that the state lies in (CPU); None: a
            temporary one.

    Raises:
        StorageError: the disk has no room for the state.
    """

    def __init__(
        self,
        params: Any,
        *numbers: Any,
        paged: bool = True,
        directory: str | Path | None = None,
        **options: Any,
    ) -> None:
        self.paged, self.directory = paged, None if directory is None else Path(directory)
        self.pages = []
        super().__init__(params, *numbers, **options)

    def _new_arena(self, params: list[Tensor]) -> dict[str, Tensor]:
        if not self.paged:
            return super()._new_arena(params)
        self.pages.append(self._new_pages(params))
        return self.pages[-1].arrays()

    def _new_pages(self, params: list[Tensor]) -> Pages:
        _refuse_strided(params)
        return Pages(self._arrays(params), _device(params), self.directory)

    def page_out(self) -> None:
        """Move the state out of memory, from now on."""
        if self.paged:
            return
        pages = [self._new_pages(group["params"]) for group in self.param_groups]
        for mine, theirs in zip(pages, self.arenas, strict=True):
            for name, tensor in mine.arrays().items():
                tensor.copy_(theirs[name])
            mine.release()
        # whole before it is ours: whatever interrupts this leaves a state that is valid, here or
        # there
        self.pages = pages
        self.arenas = [each.arrays() for each in pages]
        self.paged = True

    def _held(self) -> list[Tensor]:
        return list(super().state_tensors().values())

    def state_tensors(self) -> dict[str, Tensor]:
        self._arrive()
        return super().state_tensors()

    def state_dict(self) -> dict[str, Any]:
        self._arrive()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._arrive()
        super().load_state_dict(state_dict)
        self.release()

    def _step_group(self, number: int, group: dict[str, Any]) -> None:
        if not self.paged:
            super()._step_group(number, group)
            return
        large, small = self._split(group["params"])
        pieces = list(windows([p.numel() for p in large], BLOCK, _window(group["params"])))
        cuts: list[Ranges] = [_blocks(first, last) for _, first, last in pieces]
        few = list(windows([p.numel() for p in small], 1, _window(group["params"])))
        cuts += [_moments(first, last) for _, first, last in few]
        kinds = ((self._update_large, large, pieces), (self._update_small, small, few))
        jobs = [
            (update, cut(params, these), cut(grads, these), [steps[i] for i, _, _ in these])
            for update, params, places in kinds
            for grads, steps in [(_grads(params), self._steps_of(params))]
            for these, _, _ in places
        ]
        for (update, params, grads, steps), window in zip(
            jobs, self.pages[number].windows(cuts), strict=True
        ):
            update(group, params, grads, window, steps)


class PagedAdamW(_Paged, torch.optim.AdamW):
    """`torch.optim.AdamW` whose fp32 state takes memory only while it is used, bit for bit the same
    numbers.

    Args:
        as for `torch.optim.AdamW`, without amsgrad, maximize, capturable, differentiable and fused.
        paged, directory: as for `PagedAdamW8bit`.

    Raises:
        StorageError: the disk has no room for the state.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        paged: bool = True,
        directory: str | Path | None = None,
    ) -> None:
        self.paged, self.directory = False, None if directory is None else Path(directory)
        self.pages = []
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        if paged:
            self.page_out()

    def page_out(self) -> None:
        """Move the state out of memory, from now on."""
        if self.paged:
            return
        pages = [self._new_pages(group["params"]) for group in self.param_groups]
        states = self._views(pages)
        for p, state in self.state.items():
            if state:
                _take(states[p], state)
        for each in pages:
            each.release()
        # whole before it is ours: whatever interrupts this leaves a state that is valid, here or
        # there
        self.pages = pages
        self.state = states
        self.paged = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self.paged:
            group = self.param_groups[-1]
            self.pages.append(self._new_pages(group["params"]))
            self.state.update(_states(group["params"], self.pages[-1]))

    def _new_pages(self, params: list[Tensor]) -> Pages:
        _refuse_strided(params)
        count = sum(p.numel() for p in params)
        dtype = params[0].dtype if params else torch.float32
        if any(p.dtype != dtype for p in params):
            raise ValueError("parameters of a group whose states are paged must have one dtype")
        return Pages(
            {"exp_avg": (count, dtype), "exp_avg_sq": (count, dtype)},
            _device(params),
            self.directory,
        )

    def _views(self, pages: list[Pages]) -> defaultdict[Tensor, dict[str, Tensor]]:
        """Every parameter's state as views of the pages, at step 0."""
        found: defaultdict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for group, each in zip(self.param_groups, pages, strict=True):
            found.update(_states(group["params"], each))
        return found

    def _held(self) -> list[Tensor]:
        return [t for state in self.state.values() for t in state.values()]

    def state_tensors(self) -> dict[str, Tensor]:
        """Every tensor of state, by the parameter's place and torch's name for it."""
        self._arrive()
        params = [p for group in self.param_groups for p in group["params"]]
        return {
            f"{i}.{key}": self.state[p][key]
            for i, p in enumerate(params)
            for key in ("exp_avg", "exp_avg_sq")
        }

    def restart(self, step: int) -> None:
        """Count from this step on, as if every parameter had taken part until then."""
        for p in self.state:
            self.state[p]["step"] = _step(float(step))

    def state_dict(self) -> dict[str, Any]:
        self._arrive()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self.paged:
            super().load_state_dict(state_dict)
            return
        # the groups by torch's own way; the state straight into the pages, never through the
        # device's memory
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state = self._views(self.pages)
        places = [place for group in state_dict["param_groups"] for place in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for place, p in zip(places, params, strict=True):
            if state := state_dict["state"].get(place):
                _take(self.state[p], state)  # it may be this very state
            else:
                self.state[p]["exp_avg"].zero_()
                self.state[p]["exp_avg_sq"].zero_()
        self.release()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of every parameter that has a gradient."""
        if not self.paged:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, pages in zip(self.param_groups, self.pages, strict=True):
            self._step_paged(group, pages)
        return loss

    def _step_paged(self, group: dict[str, Any], pages: Pages) -> None:
        params = group["params"]
        for p in params:
            if p.grad is not None:
                self.state[p]["step"] += 1
        pieces = list(windows([p.numel() for p in params], 1, _window(params)))
        cuts: list[Ranges] = [{"exp_avg": (a, b), "exp_avg_sq": (a, b)} for _, a, b in pieces]
        for (these, _, _), window in zip(pieces, pages.windows(cuts), strict=True):
            sizes = [last - first for _, first, last in these]
            moments = zip(
                window["exp_avg"].split(sizes), window["exp_avg_sq"].split(sizes), strict=True
            )
            chosen = [
                (
                    params[i].view(-1)[a:b],
                    params[i].grad.reshape(-1)[a:b],
                    m,
                    v,
                    self.state[params[i]]["step"] - 1,
                )
                for (i, a, b), (m, v) in zip(these, moments, strict=True)
                if params[i].grad is not None
            ]
            if not chosen:
                continue
            values, grads, exp_avgs, exp_avg_sqs, steps = (
                list(column) for column in zip(*chosen, strict=True)
            )
            adamw(
                values,
                grads,
                exp_avgs,
                exp_avg_sqs,
                [],
                steps,
                foreach=group["foreach"],
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )


def _states(params: list[Tensor], pages: Pages) -> dict[Tensor, dict[str, Tensor]]:
    sizes, arrays = [p.numel() for p in params], pages.arrays()
    parts = zip(arrays["exp_avg"].split(sizes), arrays["exp_avg_sq"].split(sizes), strict=True)
    return {
        p: {"step": _step(0.0), "exp_avg": m.view(p.shape), "exp_avg_sq": v.view(p.shape)}
        for p, (m, v) in zip(params, parts, strict=True)
    }


def _step(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device="cpu")


def _take(mine: dict[str, Tensor], state: dict[str, Any]) -> None:
    mine["step"] = _step(float(state["step"]))
    for name in ("exp_avg", "exp_avg_sq"):
        mine[name].copy_(state[name])


def _window(params: list[Tensor]) -> int:
    return WINDOW[device_type(params[0]) if params else "cpu"]


def _blocks(first: int, last: int) -> Ranges:
    codes, scales = (first, last), (first // BLOCK, last // BLOCK)
    return {"m_codes": codes, "v_codes": codes, "m_absmax": scales, "v_absmax": scales}


def _moments(first: int, last: int) -> Ranges:
    return dict.fromkeys(SMALL, (first, last))


def _refuse_strided(params: list[Tensor]) -> None:
    if not all(p.is_contiguous() for p in params):
        raise ValueError(
            "parameters whose states are paged must be contiguous: they are updated piece by piece"
        )


def is_paged(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's state lies elsewhere than in memory, now."""
    return isinstance(optimizer, PagedAdamW8bit | PagedAdamW) and optimizer.paged

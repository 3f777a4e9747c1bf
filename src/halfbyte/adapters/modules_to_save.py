"""Whole modules that are trained beside an adapter (PEFT's ``modules_to_save``): an output head,
embeddings, norms.

Their parameters become fp32 masters, as an adapter's are; the module computes with them in the type
it had, so nothing after it changes its type. It is made, in place, a subclass of its own class, and
keeps its name in the model.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..model.class_swap import swap_class
from ..quantization.tensor import NF4Tensor
from .lora import LoraLinear


class TrainableModule(nn.Module):
    """A module with trained fp32 parameters; its class is also a subclass of the original's.

    ``called``: the name it was asked for by. ``off``: it computes with its original parameters,
    which must be kept.
    """

    requested_as: str
    computes_in: torch.dtype
    originals: dict[str, Tensor] | None
    cast: dict[str, tuple[int, Tensor]]
    disabled: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        own: Any = super()
        # cast what is looked up, not the whole table
        if isinstance(self, nn.Embedding) and not self.disabled:
            return own.forward(*args, **kwargs).to(self.computes_in)
        with self._parameters_as_given():
            return own.forward(*args, **kwargs)

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.named_parameters(remove_duplicate=False))

    @contextlib.contextmanager
    def _parameters_as_given(self) -> Iterator[None]:
        """Within this block the parameters are the trained ones in the type to compute in, or the
        original ones."""
        if self.disabled and self.originals is None:
            raise RuntimeError(f"the original parameters of {self.requested_as} were not kept")
        values = self.originals if self.disabled and self.originals is not None else self.trained()
        shadowed = []
        try:
            for path, value in values.items():
                place, _, name = path.rpartition(".")
                module = self.get_submodule(place)
                # an attribute is found before a parameter of its name
                shadowed.append((module, name, module.__dict__.get(name)))
                module.__dict__[name] = self._cast(path, value)
            yield
        finally:
            for module, name, before in reversed(shadowed):
                if before is None:
                    del module.__dict__[name]
                else:  # of a trained module around this one
                    module.__dict__[name] = before

    def _cast(self, path: str, value: Tensor) -> Tensor:
        """A parameter in the type to compute in; at rest it is cast once."""
        if value.dtype == self.computes_in:
            return value
        if self.training or torch.is_grad_enabled():
            self.cast.pop(path, None)
            return value.to(self.computes_in)
        if path not in self.cast or self.cast[path][0] != value._version:
            with torch.inference_mode(False):
                self.cast[path] = (value._version, value.detach().to(self.computes_in))
        return self.cast[path][1]


def train_every_parameter(model: nn.Module) -> None:
    """Have all parameters trained, in place: fp32 ones as they are, others as fp32 masters, which
    take updates that 16 bits would round away (Micikevicius et al. 2018, arXiv:1710.03740, section
    3.1)."""
    masters: dict[nn.Parameter, nn.Parameter] = {}
    for module in list(model.modules()):
        own = [p for p in module._parameters.values() if p is not None]
        for p in own:
            p.requires_grad_(True)
        if any(p.dtype != torch.float32 for p in own):
            _as_masters(module, masters)


def trainable_modules(model: nn.Module) -> Iterator[tuple[str, TrainableModule]]:
    """(path, module) of every module that is trained whole."""
    for name, module in model.named_modules():
        if isinstance(module, TrainableModule):
            yield name, module


def forget_casts(model: nn.Module) -> None:
    """Drop what modules that are trained whole have cast to compute with at rest."""
    for _, module in trainable_modules(model):
        module.cast.clear()


def trained_whole(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of whole modules, by their paths in the model; tied ones under each."""
    found: dict[str, nn.Parameter] = {}
    for path, module in trainable_modules(model):
        found.update({f"{path}.{name}": p for name, p in module.trained().items()})
    return found


def make_modules_trainable(model: Any, names: list[str], *, keep_originals: bool = False) -> None:
    """Have modules trained whole, in place.

    Args:
        names: ends of paths, as PEFT takes them ("norm" is every layer's, "model.norm" the last).
        keep_originals: for `adapters.peft_files.adapter_off`; takes memory.

    Raises:
        UsageError: a name matches nothing, what it matches is held in 4 bits or adapted, or shares
            its weights with a module that is not named.
    """
    found: dict[str, str] = {}
    for requested_as in names:
        paths = [path for path, _ in model.named_modules() if path and path.endswith(requested_as)]
        if not paths:
            there = sorted(
                {
                    path.rpartition(".")[2]
                    for path, module in model.named_modules()
                    if list(module.parameters())
                }
            )
            raise UsageError(
                f"modules_to_save names {requested_as!r}, which is no module",
                expected=", ".join(there),
            )
        found.update(dict.fromkeys(paths, requested_as))
    inside = {id(p) for path in found for p in model.get_submodule(path).parameters()}
    shared = _sharing(model, inside, set(found))
    if shared:
        raise UsageError(
            f"modules_to_save names {', '.join(sorted(set(names)))}, whose weights are also those "
            f"of {shared}",
            ways_out=[
                f"name both: --modules_to_save {','.join([*names, shared.rpartition('.')[2]])}",
                "or take the tie off: --tie_word_embeddings false",
            ],
        )
    masters: dict[nn.Parameter, nn.Parameter] = {}
    for path, requested_as in found.items():
        _train_whole(model.get_submodule(path), path, requested_as, keep_originals, masters)


def _sharing(model: nn.Module, inside: set[int], paths: set[str]) -> str | None:
    """The path of a module outside of these that has one of their parameters."""
    for path, module in model.named_modules():
        own = any(id(p) in inside for p in module._parameters.values() if p is not None)
        if own and not any(path == each or path.startswith(f"{each}.") for each in paths):
            return path
    return None


def _train_whole(
    module: nn.Module,
    path: str,
    requested_as: str,
    keep_originals: bool,
    masters: dict[nn.Parameter, nn.Parameter],
) -> None:
    for name, p in module.named_parameters():
        if isinstance(p, NF4Tensor) or any(isinstance(m, LoraLinear) for m in module.modules()):
            raise UsageError(
                f"modules_to_save names {requested_as!r}, and {path}.{name} is held in 4 bits or "
                "adapted",
                ways_out=[
                    "name modules that are neither: lm_head, embed_tokens, norms",
                    "--load_in_4bit false",
                ],
            )
    originals = {name: p.detach() for name, p in module.named_parameters()}
    _as_masters(module, masters, requested_as, originals if keep_originals else None)


def _as_masters(
    module: nn.Module,
    masters: dict[nn.Parameter, nn.Parameter],
    requested_as: str = "",
    originals: dict[str, Tensor] | None = None,
) -> None:
    """Make a module one that trains fp32 masters of its parameters. masters: of those that have
    some already, which may be shared."""
    dtype = next(module.parameters()).dtype
    for inner in module.modules():
        for name, p in inner._parameters.items():
            if p is not None:
                if p not in masters:
                    master = nn.Parameter(p.detach().to(torch.float32, copy=True))
                    masters[p] = masters[master] = master
                inner._parameters[name] = masters[p]
    swap_class(module, TrainableModule)
    module.requested_as, module.computes_in = requested_as, dtype  # pyright: ignore[reportArgumentType]
    module.__dict__.update(originals=originals, cast={})
    module.disabled = False  # pyright: ignore[reportArgumentType]

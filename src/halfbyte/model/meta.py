"""transformers' models built without weights: parameters on the ``meta`` device, buffers real."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..files.model_config import refused_by_transformers


def from_config(config: Any, *, wrapper: bool = False) -> Any:
    """The model of a configuration.

    Args:
        wrapper: of a text model inside a wrapper, the wrapper, though transformers has a class of
            the text model alone.

    Raises:
        ModelError: transformers cannot build it; its message is quoted.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    known, of_wrappers = (
        AutoModelForCausalLM._model_mapping,
        AutoModelForMultimodalLM._model_mapping,
    )
    kind = AutoModelForCausalLM if type(config) in known and not wrapper else None
    if kind is not None and type(config) in of_wrappers:
        chosen: Any = known[type(config)]
        # a text class that is meant for a wrapper's files says which of them it ignores
        meant = chosen is of_wrappers[type(config)] or chosen._keys_to_ignore_on_load_unexpected
        kind = kind if meant else None
    kind = kind or AutoModelForMultimodalLM
    refused = refused_by_transformers("transformers cannot build the model of this config.json")
    with _building, refused, _parameters_on_meta():
        return kind.from_config(config, trust_remote_code=False)


_building = threading.RLock()
"""One model at a time: transformers sets PyTorch's default dtype meanwhile, which is every
thread's."""


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within this block parameters that this thread's modules are given go to the meta device;
    modules of other threads are theirs. Held by one thread at a time."""
    own, here = nn.Module.register_parameter, threading.get_ident()

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        own(self, name, param)
        made = self._parameters.get(name)
        if made is not None and threading.get_ident() == here:
            empty: Any = type(made)
            self._parameters[name] = empty(made.to("meta"), requires_grad=made.requires_grad)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = own

"""Text models inside wrappers with vision or audio: what of such a checkpoint is read, and what its
layers are called in the classes that people load.

A wrapper is trained as the text model in it. Its towers and projectors are not built, not read and
not counted; what else stands beside the text model stays in 16 bits and takes no adapter.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ModelError, UsageError
from .meta import from_config

BETWEEN = re.compile(r"projector|connector|merger|aligner", re.IGNORECASE)
"""In a module's name or class: it carries what a tower saw to the text model."""


class Unread(nn.Module):
    """Stands where a tower stood.

    Attributes:
        holds: the paths of the modules in it, from it on.
        weights: how many weights it has.
    """

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.kind = type(tower).__name__
        self.holds = frozenset(path for path, _ in tower.named_modules() if path)
        self.weights = sum(p.numel() for p in tower.parameters())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise UsageError(
            f"this model was loaded without its {self.kind}",
            ways_out=["rows and prompts of text alone"],
        )


def leave_towers(model: Any) -> None:
    """Replace the towers of a wrapper, and what carries their output on, in place.

    Raises:
        ModelError: no text model is found in it.
    """
    if not is_wrapper(model.config):
        return
    text = model.get_decoder()
    if text is None or text is model or text is model.base_model:
        raise ModelError(
            f"{type(model).__name__} has no text model that could be trained apart",
            found=f"model_type {model.config.model_type!r}",
            ways_out=["use a text model, or one whose text model stands by itself"],
        )
    if text.get_output_embeddings() is not None:
        raise ModelError(
            f"{type(model).__name__} has its output head inside its text model, which is not "
            "trained here",
            found=f"model_type {model.config.model_type!r}",
            ways_out=["use another model"],
        )
    around = [part for part in model.modules() if text in part._modules.values()]
    for part in {id(part): part for part in (model, *around)}.values():
        for name, child in list(part.named_children()):
            if child is not text and not _holds(child, text) and _is_unread(name, child):
                part._modules[name] = Unread(child)


def is_wrapper(config: Any) -> bool:
    """Whether a configuration has that of a text model in it, beside another's."""
    return config.get_text_config() is not config and len(config.sub_configs or {}) > 1


def _holds(module: nn.Module, text: nn.Module) -> bool:
    return any(part is text for part in module.modules())


def _is_unread(name: str, child: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(child, PreTrainedModel) or bool(
        BETWEEN.search(name) or BETWEEN.search(type(child).__name__)
    )


def unread(model: nn.Module) -> dict[str, Unread]:
    """What was left out of a model, by path."""
    return {path: part for path, part in model.named_modules() if isinstance(part, Unread)}


def left_out_paths(model: Any) -> list[str]:
    """The paths of what was left out, in the class that has it; of a text model, of what stands
    beside it in its wrapper."""
    if (config := getattr(model, "config_of_wrapper", None)) is None:
        return list(unread(model))
    wrapper = from_config(config, wrapper=True)
    leave_towers(wrapper)
    return list(unread(wrapper))


def not_read(model: nn.Module) -> Callable[[str], bool]:
    """Whether a tensor, by its name in the model, belongs to what was left out of it."""
    paths = tuple(f"{path}." for path in unread(model))
    return lambda name: name.startswith(paths)


def left_out(model: Any) -> str:
    """A line where a wrapper's text model is all that is read, else ""."""
    found = [f"{part.kind} ({part.weights:,} weights)" for part in unread(model).values()]
    if (config := getattr(model, "config_of_wrapper", None)) is not None:
        found.append(f"what {config.model_type} has beside its text model")
    if not found:
        return ""
    beside = ", ".join(found)
    return f"trained on text alone; not read, and merged as it is: {beside}"


def beside_the_text(model: Any) -> list[nn.Module]:
    """The linear layers of a wrapper that are neither the text model's nor the output head."""
    if not is_wrapper(model.config):
        return []
    own = {*model.get_decoder().modules(), model.get_output_embeddings()}
    return [part for part in model.modules() if isinstance(part, nn.Linear) and part not in own]


# --- what layers are called elsewhere -------------------------------------------------------------


@dataclass(frozen=True)
class OtherClass:
    """A class of transformers that opens the same checkpoint, in which the text model stands
    elsewhere.

    Attributes:
        own: what the names of the text model's tensors begin with here, ``"model."``.
        other: what they begin with there, ``"model.language_model."``.
        holds: the parts of the text model, ``"layers"``: what else has a name like theirs, such as
            ``"model.visual"``, is not renamed.
        modules: the paths of its modules; () of a text class by itself, which adds none.
        chosen: whether one of transformers' automatic classes opens the checkpoint as it, so that
            an adapter should fit it.
    """

    own: str
    other: str
    holds: frozenset[str]
    modules: frozenset[str]
    chosen: bool

    def name_here(self, name: str) -> str:
        """A tensor's or module's name in our model, by the one it has there or here."""
        return self._moved(name, self.other, self.own)

    def name_there(self, name: str) -> str:
        return self._moved(name, self.own, self.other)

    def _moved(self, name: str, before: str, after: str) -> str:
        inside = name.removeprefix(before)
        moves = name.startswith(before) and inside.partition(".")[0] in self.holds
        return after + inside if moves else name


def _parts(text: nn.Module) -> frozenset[str]:
    return frozenset((*text._modules, *text._parameters))


def other_class(model: Any) -> OtherClass | None:
    """Of a wrapper or of the text model of one, the other class that holds its text model."""
    if (known := getattr(model, "other_class", None)) is not None:
        return known
    if is_wrapper(model.config):
        text = model.get_decoder()
        own = next(path for path, part in model.named_modules() if part is text)
        found = OtherClass(f"{own}.", "model.", _parts(text), frozenset(), chosen=False)
    elif (config := getattr(model, "config_of_wrapper", None)) is not None:
        wrapper = from_config(config, wrapper=True)
        text = wrapper.get_decoder()
        other = next(path for path, part in wrapper.named_modules() if part is text)
        names = frozenset(path for path, _ in wrapper.named_modules())
        found = OtherClass("model.", f"{other}.", _parts(text), names, chosen=True)
    else:
        return None
    model.other_class = found
    return found

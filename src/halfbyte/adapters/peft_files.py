"""Adapters as files: what PEFT reads and writes, on a model of ours.

``adapter_model.safetensors`` holds A and B of each layer (and DoRA's magnitudes) under PEFT's
names, and whole modules that were trained beside them (``modules_to_save``);
``adapter_config.json`` describes them.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError, UsageError
from ..files.atomic import write_json
from ..files.safetensors import read_header, read_tensor, write_safetensors
from ..model.experts import DividedExperts, fused_experts, fused_parameter
from ..model.targets import targets, tied_head
from ..model.wrappers import OtherClass, other_class, unread
from ..quantization.tensor import NF4Tensor
from .experts import adapted_experts, fused_of, joined_layers, wrapped
from .lora import LoraLinear, attach_lora, ends_with, lora_layers
from .modules_to_save import make_modules_trainable, trainable_modules
from .peft_config import CONFIG, read_adapter_config

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
ADAPTED = re.compile(re.escape(_PREFIX) + r"(.+)\.lora_[AB](\.default)?\.weight")
"""Of a tensor's name in PEFT's files: the path of the layer."""


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter under PEFT's names, fp32 on the CPU."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, p in _parameters(model).items():
        # tied modules are written twice, as PEFT reads them
        found[name] = p.detach().cpu().clone() if id(p) in seen else p.detach().cpu()
        seen.add(id(p))
    for each in adapted_experts(model):
        found.update({f"{_PREFIX}{name}": t for name, t in each.tensors().items()})
    other = other_class(model)
    if other is not None and other.chosen:  # the file fits both classes
        there = {name: _there(other, name) for name in found}
        found |= {there[name]: t.clone() for name, t in found.items() if there[name] != name}
    return found


def _there(other: OtherClass, name: str) -> str:
    """A name in PEFT's file for another class."""
    return _PREFIX + other.name_there(name.removeprefix(_PREFIX))


def _here(other: OtherClass | None, name: str) -> str:
    """A name in PEFT's file for our class, by one for that or for another class."""
    if other is None or not name.startswith(_PREFIX):
        return name
    return _PREFIX + other.name_here(name.removeprefix(_PREFIX))


def adapter_bytes(model: nn.Module) -> int:
    """Of what `adapter_tensors` gives."""
    sizes = {name: p.nbytes for name, p in _parameters(model).items()}
    for each in adapted_experts(model):
        sizes |= {f"{_PREFIX}{name}": 4 * math.prod(s) for name, s in each.shapes().items()}
    other = other_class(model)
    if other is not None and other.chosen:
        sizes |= {_there(other, name): size for name, size in sizes.items()}
    return sum(sizes.values())


def bytes_of_copies(model: nn.Module) -> int:
    """Of what `adapter_tensors` copies: a module that is tied to another is written twice."""
    once = {id(p): p.nbytes for p in _parameters(model).values()}
    # the experts' are joined
    return adapter_bytes(model) - sum(once.values())


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What an adapter consists of beside that of experts (`adapted_experts`), by the names in
    PEFT's files."""
    found = {
        f"{_PREFIX}{name}.{key}": p
        for name, layer in lora_layers(model)
        if fused_parameter(model, name) is None
        for key, p in layer.trained().items()
    }
    for name, module in trainable_modules(model):
        found.update({f"{_PREFIX}{name}.{key}": p for key, p in module.trained().items()})
    return found


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """Within this block the model is its base: adapted layers are the linear layers they were made
    from, and whole modules have their own weights (if `load_adapter` kept them)."""
    modules = [module for _, module in trainable_modules(model)]
    for module in modules:
        module.disabled = True
    try:
        with lora_off(model):
            yield
    finally:
        for module in modules:
            module.disabled = False


@contextlib.contextmanager
def lora_off(model: nn.Module) -> Iterator[None]:
    """Within this block adapted layers are the linear layers they were made from."""
    layers = [layer for _, layer in lora_layers(model)]
    for layer in layers:
        layer.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = LoraLinear


def adapter_config(model: Any, base_model: str, revision: str | None = None) -> dict[str, Any]:
    """adapter_config.json for the model's adapter. revision: of the base, on the Hub."""
    every = dict(lora_layers(model))
    layers = {name: layer for name, layer in every.items() if not fused_of(model, [name])}
    adapter = next(iter(layers.values())).adapter
    ranks = Counter(layer.adapter.r for layer in layers.values())
    alphas = Counter(layer.adapter.alpha for layer in layers.values())
    r, alpha = ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]
    own = _parameters(model)
    shared = len({id(p) for p in own.values()}) < len(own)
    tied = {"ensure_weight_tying": True} if shared else {}
    named, parameters = named_in_peft(model, list(layers))
    other = other_class(model)
    # by names that fit each class which holds this text model
    called = {n: n.removeprefix(other.own) if other is not None else n for n in layers}
    patterns = {
        name: [called[name], f"{name}.weight"] if name in parameters else [called[name]]
        for name in layers
    }
    parameters = [f"{name}.weight" for name in parameters]
    # experts by what they are called in every layer
    for each in adapted_experts(model):
        end = re.sub(r"^.*?\.\d+\.", "", each.parameter)
        layers[end], patterns[end] = each.layers[0][0], [end]
        parameters = [*parameters, end] if end not in parameters else parameters
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "r": r,
        "lora_alpha": alpha,
        # PEFT has no dropout of parameters
        "lora_dropout": 0.0 if parameters else adapter.dropout,
        "use_rslora": adapter.use_rslora,
        "target_modules": shortest_targets(model, named),
        "target_parameters": parameters or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": sorted({module.requested_as for _, module in trainable_modules(model)})
        or None,
        **tied,  # whoever trains on trains them as one
        "rank_pattern": {
            pattern: layer.adapter.r
            for name, layer in layers.items()
            if layer.adapter.r != r
            for pattern in patterns[name]
        },
        "alpha_pattern": {
            pattern: layer.adapter.alpha
            for name, layer in layers.items()
            if layer.adapter.alpha != alpha
            for pattern in patterns[name]
        },
        "use_dora": adapter.use_dora,
    }


RENAMED = frozenset(("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3"))
"""Names of layers that PEFT takes for those of experts, wherever they are, in a model whose experts
transformers fuses."""


def named_in_peft(model: Any, names: list[str]) -> tuple[list[str], list[str]]:
    """Adapted layers that PEFT finds as modules, and those it finds as parameters alone
    (``target_parameters``): a mixture's dense layers and shared experts. Their tensors in the
    file have the same names and shapes either way."""
    if not fused_experts(model):
        return names, []
    parameters = [name for name in names if name.rpartition(".")[2] in RENAMED]
    return [name for name in names if name not in parameters], parameters


def shortest_targets(model: Any, names: list[str]) -> list[str]:
    """Last names where they select exactly these layers in PEFT (which matches by suffix), else
    whole paths."""
    last = sorted({name.rpartition(".")[2] for name in names})
    # PEFT refuses whatever else has the name: a "0" of a list is a layer of decoder blocks, too
    everything = {path for path, _ in model.named_modules()}
    other = other_class(model)
    # what PEFT finds beside them in the classes that people load
    everything |= {f"{path}.{name}" for path, part in unread(model).items() for name in part.holds}
    if other is not None and other.chosen:
        everything |= {name for name in other.modules if other.name_here(name) == name}
        names = [name.removeprefix(other.own) for name in names]
        everything = {path.removeprefix(other.own) for path in everything}
    matched = {name for name in everything if any(ends_with(name, suffix) for suffix in last)}
    return last if matched == set(names) else sorted(names)


def save_adapter(model: Any, directory: Path, base_model: str, revision: str | None = None) -> None:
    """The adapter as PEFT writes it: adapter_model.safetensors and adapter_config.json."""
    write_safetensors(directory / WEIGHTS, adapter_tensors(model))
    write_json(directory / CONFIG, adapter_config(model, base_model, revision))


def load_adapter(model: Any, directory: Path, *, seed: int = 0) -> dict[str, Any]:
    """Put a PEFT adapter on a model, in place. Returns its configuration.

    Raises:
        ModelError: no LoRA adapter, a feature we do not have, or tensors that do not fit; all
            mismatches at once.
    """
    config, adapter = read_adapter_config(directory)
    attach_lora(model, adapter, adapted_layers(model, directory), seed=seed)
    try:
        make_modules_trainable(model, whole_modules(config, model), keep_originals=True)
    except UsageError as error:
        raise ModelError(
            f"the adapter in {directory} does not fit this model", found=error.what
        ) from error
    restore_adapter(model, directory)
    return config


def adapted_layers(model: nn.Module, directory: Path) -> list[str]:
    """Paths of the model's layers that an adapter adapts.

    Raises:
        ModelError: none, or something that is no linear layer of the model.
    """
    entries = _entries(model, directory / WEIGHTS)
    found = {match.group(1) for name in entries if (match := ADAPTED.fullmatch(name))}
    for path, module in model.named_modules():
        if isinstance(module, DividedExperts):
            for place, layers in enumerate(joined_layers(module).values()):
                if (key := path + wrapped(place, len(module.fused))) in found:
                    found.discard(key)
                    numbers = range(module.num_experts)
                    found |= {f"{path}.{i}.{layer}" for i in numbers for layer in layers}
    names = sorted(found)
    linear = {target.path for target in targets(model)}
    unknown = [name for name in names if name not in linear]
    if not names or unknown:
        raise ModelError(
            f"the adapter in {directory} does not fit this model",
            found=f"adapts {', '.join(unknown[:5])}" if names else "no lora_A / lora_B tensors",
            expected="linear layers of the base model it was trained on",
        )
    return names


def _entries(model: nn.Module, file: Path) -> dict[str, Any]:
    """The tensors of a file of PEFT's by their names for our class, without the adapter's name that
    some releases write."""
    entries, other = read_header(file), other_class(model)
    return {
        _here(other, name.replace(".default.weight", ".weight")): entry
        for name, entry in entries.items()
    }


def whole_modules(config: dict[str, Any], model: nn.Module) -> list[str]:
    """The modules that an adapter_config.json trains whole. Where it keeps ties
    (``ensure_weight_tying``) PEFT names one of those that share a tensor, and writes each."""
    named: list[str] = list(config.get("modules_to_save") or ())
    if config.get("ensure_weight_tying"):
        for pair in tied_head(model).items():
            paths = [name.removesuffix(".weight") for name in pair]
            found = [path for path in paths if path.endswith(tuple(named))]
            named += [path for path in paths if found and path not in found]
    return named


def trained_apart(model: nn.Module, directory: Path) -> bool:
    """Whether an adapter is one of two tensors that this model ties: it trained copies of both,
    which differ now, or one of them alone. PEFT makes copies of whole modules, and adapts a tied
    head by itself; such an adapter needs the ties taken off (``tie_word_embeddings`` false).

    Args:
        model: as the base's configuration has it.
    """
    entries = _entries(model, directory / WEIGHTS)
    whole = tuple(whole_modules(read_adapter_config(directory)[0], model))
    for pair in tied_head(model).items():
        paths = [name.removesuffix(".weight") for name in pair]
        if any(f"{_PREFIX}{path}.lora_A.weight" in entries for path in paths):
            return True
        trained = [path for path in paths if path.endswith(whole)]
        names = [f"{_PREFIX}{path}.weight" for path in trained]
        values = [read_tensor(entries[name], name) for name in names if name in entries]
        if len(values) == 1 or (len(values) == 2 and not torch.equal(*values)):
            return True
    return False


def restore_adapter(model: nn.Module, directory: Path) -> None:
    """Copy the tensors of an adapter's file into the model's adapter.

    Raises:
        ModelError: missing, unexpected or misshapen tensors, all in one message.
    """
    file = directory / WEIGHTS
    wanted, found = _parameters(model), _entries(model, file)
    joined = list(adapted_experts(model))
    shapes = {name: tuple(parameter.shape) for name, parameter in wanted.items()}
    for each in joined:
        shapes |= {f"{_PREFIX}{name}": shape for name, shape in each.shapes().items()}
    problems = [f"missing: {name}" for name in shapes.keys() - found.keys()]
    problems += [
        f"unexpected: {name}"
        for name in found.keys() - shapes.keys()
        if not _is_copy(model, name, found)
    ]
    problems += [
        f"{name}: {list(found[name].shape)} in the file, {list(shape)} in the model"
        for name, shape in shapes.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:10]) + (
            f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        )
        raise ModelError(
            f"the adapter {file} does not fit this model",
            found=listed,
            ways_out=_resized(model, found),
        )
    given: dict[int, tuple[str, Tensor]] = {}
    with torch.no_grad():
        for name, parameter in wanted.items():
            value = read_tensor(found[name], name)
            first, before = given.setdefault(id(parameter), (name, value))
            if not torch.equal(before, value):
                raise ModelError(
                    f"the adapter {file} was trained with {_module(first)} and {_module(name)} "
                    "apart, which are one tensor in this base (tie_word_embeddings)",
                    ways_out=["--tie_word_embeddings false takes the tie off"],
                )
            parameter.copy_(value)
    for each in joined:
        names = (f"{_PREFIX}{name}" for name in each.shapes())
        each.fill(*(read_tensor(found[name], name).float() for name in names))


def _resized(model: Any, found: dict[str, Any]) -> list[str]:
    """The way out for an adapter whose base had tokens added to it."""
    rows = model.get_input_embeddings().weight.shape[0]
    theirs = {
        entry.shape[0]
        for name, entry in found.items()
        if len(entry.shape) == 2 and re.search(r"(embed_tokens|wte|lm_head)\b.*weight$", name)
    } - {rows}
    if not theirs:
        return []
    return [
        f"it was trained on a base of {', '.join(map(str, sorted(theirs)))} tokens, and this one "
        f"has {rows}: resize_token_embeddings({max(theirs)}) and save_pretrained in transformers "
        "make it, --base names it"
    ]


def _is_copy(model: nn.Module, name: str, found: dict[str, Any]) -> bool:
    """Whether a tensor beside an adapter is only a copy of the base's, or of another one of the
    file, as PEFT writes of embeddings and heads that it adapts or that were resized."""
    entry, twin = found[name], name.replace(".modules_to_save.", ".")
    if twin != name and twin in found:
        return torch.equal(read_tensor(entry, name), read_tensor(found[twin], twin))
    path = name.removeprefix(_PREFIX).replace(".base_layer.", ".").replace(".original_module.", ".")
    own = dict(model.named_parameters(remove_duplicate=False)).get(path)
    if own is None or isinstance(own, NF4Tensor) or own.shape != entry.shape:
        return False
    return torch.equal(own.detach().cpu(), read_tensor(entry, name).to(own.dtype))


def _module(name: str) -> str:
    """Of a tensor's name in PEFT's files."""
    return name.removeprefix(_PREFIX).removesuffix(".weight")

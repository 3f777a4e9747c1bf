"""What a path is that a verb was given: a run (or its adapter), an adapter that PEFT wrote, or a
model directory, which is held as it says it is stored.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters.converted import plain_lora
from ..adapters.peft_config import CONFIG
from ..adapters.peft_files import WEIGHTS, trained_apart
from ..config.options import ModelOptions, TrainConfig
from ..errors import ModelError
from ..files import atomic, hub
from ..files.inside import refuse_foreign
from ..files.model_config import read_config
from ..model.architecture import TIES, build_empty, choose_device, choose_dtype
from ..quantization.load import with_stored_form
from .directory import Run, is_run

MERGED = "merge.json"
"""The receipt in a merged model's directory, which says that it is to be used as it is stored."""


def run_at(path: str | Path) -> Run | None:
    """The run of a directory, or of its ``adapter/``; None where there is none.

    Raises:
        ModelError: its training has not saved an adapter yet.
    """
    place = Path(path).expanduser()
    if is_run(place):
        return Run.open(place)
    if place.name == "adapter" and is_run(place.parent):
        return Run.open(place.parent)
    return None


def is_adapter(path: str | Path) -> bool:
    """Whether a directory is an adapter's."""
    place = Path(path).expanduser()
    return (place / CONFIG).is_file() and (place / WEIGHTS).is_file()


def is_merged(path: str | Path) -> bool:
    """Whether a directory is a merged model's."""
    return (Path(path).expanduser() / MERGED).is_file()


def base_of_run(run: Run, given: str | None = None, revision: str | None = None) -> Path:
    """The directory of a run's base: where it was, or, of a Hub id, in the cache of today.

    Args:
        given: a directory or Hub id that stands above what the run says.

    Raises:
        ModelError: it is not there.
    """
    info = run.info()["base"]
    revision = revision or run.config().revision
    if given is not None:
        return hub.resolve(given, revision)
    name = str(info.get("name") or "")
    is_id = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and name != hub.BUILTIN
    moved = is_id and not Path(info["path"]).is_dir()
    try:
        if moved:
            return hub.resolve(name, revision, subfolder=run.config().subfolder)
        return hub.resolve(info["path"], revision)
    except ModelError as error:
        error.ways_out = ("--base names the directory it is in now", *error.ways_out)
        raise


def base_of_adapter(adapter: Path, revision: str | None = None, given: str | None = None) -> Path:
    """The directory of the base that an adapter's file names: a Hub id (and its revision), or a
    path, which may be relative to the adapter's.

    Args:
        given: a directory or Hub id that stands above what the file says.

    Raises:
        ModelError: it names none, or one that is not there.
    """
    if given is not None:
        return hub.resolve(given, revision)
    described = atomic.read_json(adapter / CONFIG)
    name, revision = described.get("base_model_name_or_path"), revision or described.get("revision")
    if not name:
        raise ModelError(
            f"{adapter / CONFIG} does not say which model it belongs to",
            expected="base_model_name_or_path",
            ways_out=["--base names it", "or write the base's path there"],
        )
    beside = (adapter / str(name)).resolve()
    if str(name).startswith(".") and (beside / "config.json").is_file():
        return beside
    at_home = adapter.parent / "config.json"  # a 4-bit export that was moved as a whole
    if not Path(str(name)).is_dir() and Path(str(name)).is_absolute() and at_home.is_file():
        return adapter.parent
    return hub.resolve(str(name), revision)


def named_elsewhere(config: TrainConfig) -> tuple[str, str | None]:
    """How an adapter's file names its base, wherever it is read on this machine: (a Hub id, its
    revision), or (an absolute path, None); of a model in a subfolder, which such a file has no word
    for, the path."""
    model = config.model
    if model == hub.BUILTIN or config.subfolder is not None:
        return str(hub.base_of(config).resolve()), None
    path = Path(model).expanduser()
    return (str(path.resolve()), None) if path.is_dir() else (model, config.revision)


def held_for(options: ModelOptions, adapter: Path, base: Path) -> ModelOptions:
    """Options as an adapter that PEFT wrote and its base are: in 4 bits as it is stored, and
    untied where the adapter needs it so."""
    options = with_stored_form(options, base)
    if TIES not in options.model_fields_set:
        apart = trained_apart(build_empty(read_config(base)), plain_lora(adapter, base))
        return options.model_copy(update={TIES: not apart})
    return options


@dataclass(frozen=True)
class Source:
    """An adapter and what it belongs to.

    Attributes:
        path: as it was given. adapter: its directory. base: that of the model it was trained on.
        name: the base's name, for people.
        holding: how the base is held. compute_dtype: what the run computed in.
        run: where it came from, None for an adapter that PEFT wrote.
    """

    path: Path
    adapter: Path
    base: Path
    name: str
    holding: ModelOptions
    compute_dtype: str
    run: Run | None

    @classmethod
    def open(cls, path: str | Path, device: str = "auto", base_at: str | None = None) -> "Source":
        """The adapter at a path. base_at: where its base is, if not where it says.

        Raises:
            ModelError: it is none, or its base is not there.
        """
        place, run = Path(path).expanduser(), run_at(path)
        if run is not None:
            info, config = run.info(), run.config()
            holding = ModelOptions(**config.holding())
            base = base_of_run(run, base_at)
            named, dtype = info["base"].get("name", str(base)), info["compute_dtype"]
            return cls(run.path, run.adapter, base, named, holding, dtype, run)
        if not is_adapter(place):
            Run.open(place)  # raises, and says what is missing
        refuse_foreign(place, hub.OPENED)
        base = base_of_adapter(place, given=base_at)
        named = str(atomic.read_json(place / CONFIG)["base_model_name_or_path"])
        dtype = str(choose_dtype("auto", choose_device(device))).removeprefix("torch.")
        holding = held_for(ModelOptions(), place, base)
        return cls(place, plain_lora(place, base), base, named, holding, dtype, None)

    @property
    def full(self) -> bool:
        """Whether every parameter was trained."""
        return self.run is not None and self.run.config().full

    def tokenizer(self) -> Any:
        """The adapter's own, else its base's."""
        return hub.load_tokenizer(tokenizer_directory(self.adapter, self.base))


def tokenizer_directory(adapter: Path, base: Path) -> Path:
    """Where the tokenizer of an adapter lies."""
    own = any((adapter / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return adapter if own else base


def as_stored(path: str | Path, given: dict[str, Any]) -> dict[str, Any]:
    """Options to hold a model directory as it says it is stored, where nothing else was said: a
    merged model is not quantized again."""
    if "load_in_4bit" in given or not is_merged(path):
        return given
    config = atomic.read_json(Path(path).expanduser() / "config.json")
    return {**given, "load_in_4bit": "quantization_config" in config}


def held_in(model: Any) -> str:
    """What a model's linear layers are held in, for people: "4 bits (nf4)" or "bfloat16";
    of a base that brings weights in 4 bits of another kind, "4 bits (mxfp4, nf4)"."""
    kinds = [
        getattr(p.data, "quant_type", None) or getattr(p, "quant_type", None)
        for p in model.parameters()
    ]
    quantized = ", ".join(sorted({kind for kind in kinds if kind}))
    dtype: torch.dtype = model.config.dtype
    return f"4 bits ({quantized})" if quantized else str(dtype).removeprefix("torch.")

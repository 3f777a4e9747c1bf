"""What a path is that a verb was given: a run (or its adapter), an adapter that PEFT wrote, or a
model directory, which is held as it says it is stored.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..adapters.peft_files import CONFIG, WEIGHTS
from ..config.options import ModelOptions
from ..errors import ModelError
from ..files import atomic, hub
from ..model.architecture import choose_device, choose_dtype
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


def base_of_adapter(adapter: Path, revision: str | None = None) -> Path:
    """The directory of the base that an adapter's file names: a Hub id, or a path, which may be
    relative to the adapter's.

    Raises:
        ModelError: it names none, or one that is not there.
    """
    name = atomic.read_json(adapter / CONFIG).get("base_model_name_or_path")
    if not name:
        raise ModelError(
            f"{adapter / CONFIG} does not say which model it belongs to",
            expected="base_model_name_or_path",
            ways_out=["write the base's path there"],
        )
    beside = (adapter / str(name)).resolve()
    if str(name).startswith(".") and (beside / "config.json").is_file():
        return beside
    return hub.resolve(str(name), revision)


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
    def open(cls, path: str | Path, device: str = "auto") -> "Source":
        """The adapter at a path.

        Raises:
            ModelError: it is none, or its base is not there.
        """
        place, run = Path(path).expanduser(), run_at(path)
        if run is not None:
            info, config = run.info(), run.config()
            holding = ModelOptions(**config.holding())
            base = hub.resolve(info["base"]["path"], config.revision)
            named, dtype = info["base"].get("name", str(base)), info["compute_dtype"]
            return cls(run.path, run.adapter, base, named, holding, dtype, run)
        if not is_adapter(place):
            Run.open(place)  # raises, and says what is missing
        base = base_of_adapter(place)
        named = str(atomic.read_json(place / CONFIG)["base_model_name_or_path"])
        dtype = str(choose_dtype("auto", choose_device(device))).removeprefix("torch.")
        return cls(place, place, base, named, ModelOptions(), dtype, None)

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
    """What a model's linear layers are held in, for people: "4 bits (nf4)" or "bfloat16"."""
    kinds = [
        getattr(p.data, "quant_type", None) or getattr(p, "quant_type", None)
        for p in model.parameters()
    ]
    quantized = next((kind for kind in kinds if kind), None)
    dtype: torch.dtype = model.config.dtype
    return f"4 bits ({quantized})" if quantized else str(dtype).removeprefix("torch.")

"""Model directories of Hugging Face's kind: found by path, by name or on the Hub, and refused where
they are not safe.

A directory holds ``config.json``, the tokenizer, and weights in one ``model.safetensors`` or in
shards named by ``model.safetensors.index.json`` (`files.safetensors`). Pickled weights and code
that comes with a model are never opened.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import HalfbyteError, ModelError, first_line
from .atomic import JSON_LIMIT

BUILTIN = "demo"
"""The name that stands for the model that comes with the package."""

HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*"]
TEMPLATES = "additional_chat_templates"
"""The one folder of a model's directory that transformers reads."""


def resolve(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """The local directory of a model: itself, the built-in one (``demo``), or a snapshot of a Hub
    id (downloaded where not cached; all but the weights if they are not needed). A directory called
    demo is named ``./demo``.

    Raises:
        ModelError: no such directory and no such id, or the download failed.
    """
    if model == BUILTIN:
        return Path(__file__).parents[1] / "builtin"
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} is not a model directory: it has no config.json",
                ways_out=["name the directory that holds config.json and *.safetensors"],
            )
        check_files(path)
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ModelError(
            f"no model directory at {model!r}",
            ways_out=["check the path", "or give a Hub id such as meta-llama/Llama-3.2-1B"],
        )
    return _snapshot(
        model, revision, HUB_PATTERNS, ["original/*", *([] if weights else ["*.safetensors"])]
    )


def _snapshot(name: str, revision: str | None, allow: list[str], ignore: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
        )
    except HalfbyteError:
        raise
    except (
        Exception
    ) as error:  # the hub client raises some twenty types; all mean the same to the user
        message = first_line(error)
        raise ModelError(
            f"{name!r} is neither a local directory nor a Hub model that can be reached",
            found=message,
            ways_out=[
                "check the spelling and the network",
                "log in with `hf auth login` if the model is gated",
            ],
        ) from error


def resolve_adapter(name: str) -> Path:
    """The local directory of an adapter: itself, a run's, or a snapshot of a Hub id.

    Raises:
        ModelError: no such directory and no such id, or the download failed.
    """
    path = Path(name).expanduser()
    for directory in (path, path / "adapter"):
        if (directory / "adapter_config.json").is_file():
            return directory.resolve()
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ModelError(
            f"no adapter at {name!r}",
            expected="a directory with adapter_config.json, a run or a Hub id",
        )
    return _snapshot(
        name, None, ["adapter_config.json", "adapter_model.safetensors", "halfbyte.json"], []
    )


def check_files(directory: Path) -> None:
    """Refuse a model directory whose files are something else than files, before anything opens
    one.

    Raises:
        ModelError: a pipe, a device, a link that leads out of the directory (a Hub cache's blobs
            excepted), or a text file too large to be one.
    """
    for path in sorted(_opened(directory)):
        _refuse_leaving(path, directory)
        if path.is_dir() or path.parent not in (directory, directory / TEMPLATES):
            continue
        if not path.is_file():
            raise ModelError(f"{path} is not a regular file", ways_out=["copy the file again"])
        if path.suffix != ".safetensors" and path.stat().st_size > JSON_LIMIT:
            raise ModelError(
                f"{path} has {path.stat().st_size:,} bytes, too many for a configuration or "
                "tokenizer"
            )


def _opened(directory: Path) -> Iterator[Path]:
    """What may be opened of a directory, at any depth: files by their patterns, and folders."""
    for path in directory.iterdir():
        if path.is_dir() and not path.name.startswith("."):
            yield path
            if not path.is_symlink():
                yield from _opened(path)
        elif any(path.match(pattern) for pattern in HUB_PATTERNS):
            yield path


def _refuse_leaving(path: Path, directory: Path) -> None:
    """Raise ModelError for a link that leads out of a model's directory, but to the blobs of the
    Hub's cache it lies in."""
    home, real = directory.resolve(), path.resolve()
    inside = real.is_relative_to(home) or real.is_relative_to(home.parent.parent / "blobs")
    if path.is_symlink() and not inside:
        raise ModelError(
            f"{path} is a link to a file outside the model's directory",
            found=str(real),
            ways_out=["copy the file into the directory"],
        )


def load_tokenizer(directory: Path) -> Any:
    """The directory's tokenizer, a fast one (built on `tokenizers`), no code of the directory run.

    Raises:
        ModelError: there is none, it is broken, or it exists in Python only.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (HalfbyteError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the Rust library is no Exception
        message = first_line(error)
        raise ModelError(
            f"cannot load a tokenizer from {directory}",
            found=message[:300],
            expected="tokenizer.json (and tokenizer_config.json)",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer in {directory} has no tokenizer.json: positions of characters in "
            "tokens are unknown, so masks cannot be exact",
            ways_out=["convert it to a fast tokenizer with transformers and save it there"],
        )
    return tokenizer

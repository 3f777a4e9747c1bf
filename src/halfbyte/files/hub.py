"""Model directories of Hugging Face's kind: found by path, by name or on the Hub, and refused where
they are not safe.

A directory holds ``config.json``, the tokenizer, and weights in one ``model.safetensors`` or in
shards named by ``model.safetensors.index.json`` (`files.safetensors`). Pickled weights and code
that comes with a model are never opened.
"""

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from ..errors import HalfbyteError, ModelError, first_line
from .as_written import read_as_written
from .inside import refuse_foreign, refuse_strange_files

BUILTIN = "demo"
"""The name that stands for the model that comes with the package."""

LEGAL = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
"""What a model may be passed on with only."""
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", *LEGAL]
TEMPLATES = "additional_chat_templates"
"""The one folder of a model's directory that transformers reads."""
OPENED = (*HUB_PATTERNS, TEMPLATES)
"""What may be opened of an adapter's directory."""


def resolve(
    model: str,
    revision: str | None = None,
    *,
    weights: bool = True,
    subfolder: str | None = None,
) -> Path:
    """The local directory of a model: itself, the built-in one (``demo``), or a snapshot of a Hub
    id (downloaded where not cached; all but the weights if they are not needed). A directory called
    demo is named ``./demo``.

    Args:
        subfolder: of the directory or repository, that the model is in.

    Raises:
        ModelError: no such directory and no such id, or the download failed.
    """
    if model == BUILTIN:
        return Path(__file__).parents[1] / "builtin"
    folder = "" if subfolder is None else _inside(subfolder)
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / folder
        _refuse_without_config(str(path) if folder else model, path)
        refuse_strange_files(path, HUB_PATTERNS, (TEMPLATES,))
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model):
        raise ModelError(
            f"no model directory at {model!r}",
            ways_out=["check the path", "or give a Hub id such as meta-llama/Llama-3.2-1B"],
        )
    ignore = ["original/*", *([] if weights else ["*.safetensors"])]
    path = _snapshot(model, revision, HUB_PATTERNS, ignore, folder) / folder
    _refuse_without_config(f"{model}/{folder}" if folder else model, path)
    return path


def base_of(options: Any, *, weights: bool = True) -> Path:
    """`resolve` for options that name a model, its revision and its subfolder."""
    return resolve(options.model, options.revision, weights=weights, subfolder=options.subfolder)


def _inside(subfolder: str) -> str:
    """A folder's path below where a model is looked for.

    Raises:
        ModelError: it leads elsewhere.
    """
    path = PurePosixPath(subfolder.strip().replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or path == PurePosixPath("."):
        raise ModelError(
            f"subfolder {subfolder!r} is no folder below the model's place",
            ways_out=["name it as it stands there, such as `transformer`"],
        )
    return str(path)


def _refuse_without_config(name: str, path: Path) -> None:
    """Raise ModelError for what is no model's directory; an adapter's is told by what it lacks."""
    if (path / "config.json").is_file():
        return
    adapter = (path / "adapter_config.json").is_file()
    if adapter and (path / "adapter_model.safetensors").is_file():
        raise ModelError(
            f"{name} is an adapter, not a model",
            ways_out=[f"hf download {name} --local-dir DIR, and name that directory"],
        )
    if adapter:
        pickled = (path / "adapter_model.bin").is_file()
        raise ModelError(
            f"{name} is an adapter without adapter_model.safetensors",
            found="adapter_model.bin: pickled weights can run code when opened" if pickled else "",
            ways_out=["load it with PEFT once, on a machine you can lose, and save it there"],
        )
    deeper = sorted(config.parent.name for config in path.glob("*/config.json"))
    raise ModelError(
        f"{name} is not a model directory: it has no config.json",
        found=f"one in {', '.join(deeper[:5])}" if deeper else "",
        ways_out=[
            *([f"--subfolder {deeper[0]}"] if deeper else []),
            "name the directory that holds config.json and *.safetensors",
        ],
    )


def _snapshot(
    name: str, revision: str | None, allow: list[str], ignore: list[str], folder: str = ""
) -> Path:
    from huggingface_hub import snapshot_download

    below = f"{folder}/" if folder else ""
    try:
        if (files := _listed(name, revision)) is not None:
            _refuse_where_it_is_not(name, files, below)
            there = [file.removeprefix(below) for file in files if file.startswith(below)]
            allow, ignore = list(opened_of(name, there, allow, ignore)), []
        allow, ignore = ([below + pattern for pattern in patterns] for patterns in (allow, ignore))
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
        )
    except HalfbyteError:
        raise
    except (
        Exception
    ) as error:  # the hub client raises some twenty types; all mean the same to the user
        raise _unreachable(name, revision, error) from error


def _refuse_where_it_is_not(name: str, files: list[str], below: str) -> None:
    """Raise ModelError for a repository whose models are in other folders than is looked in."""
    deeper = sorted(f.rpartition("/")[0] for f in files if f.endswith("/config.json"))
    described = {f"{below}config.json", f"{below}adapter_config.json"}
    if deeper and not described & set(files):
        raise ModelError(
            f"{name!r} has no config.json{f' in {below[:-1]}' if below else ''}",
            found=f"one in {', '.join(deeper[:5])}",
            ways_out=[f"--subfolder {deeper[0]}"],
        )


def _listed(name: str, revision: str | None) -> list[str] | None:
    """The files of a repository, as the Hub lists them; where it cannot be asked or has no answer
    now, as it listed them when the cache was filled. None where that is not known."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return huggingface_hub.HfApi(library_name="halfbyte").list_repo_files(
            name, revision=revision
        )
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status != 429 and status < 500:
            raise
    except Exception:  # no network, or told not to use it
        pass
    try:
        return [file.path for file in huggingface_hub.get_cached_repo_tree(name, revision=revision)]
    except Exception:  # an older client, or nothing is kept
        return None


def opened_of(name: str, files: list[str], allow: list[str], ignore: list[str]) -> Iterator[str]:
    """Of a repository's files those that are opened here: of weights one set (the single file, else
    the shards of the index), no folders but the templates'.

    Raises:
        ModelError: weights are asked for, and there are none that are opened here.
    """
    top = {file for file in files if "/" not in file}
    weights = {SINGLE} & top or {f for f in top if SHARD.fullmatch(f) or f == INDEX}
    of_model = "config.json" in top  # an adapter's weights have a name of their own
    for file in files:
        folder, _, leaf = file.rpartition("/")
        if folder not in ("", TEMPLATES) or not any(fnmatch(leaf, pattern) for pattern in allow):
            continue
        if any(fnmatch(file, pattern) for pattern in ignore):
            continue
        is_weights = leaf.endswith(".safetensors") or leaf == INDEX
        if not (of_model and is_weights and leaf not in weights):
            yield file
    wanted = "*.safetensors" in allow and "*.safetensors" not in ignore
    if wanted and of_model and not weights:
        ends = (".bin", ".pt", ".pth", ".gguf", ".safetensors")
        raise ModelError(
            f"{name!r} has no weights that are opened here",
            found=", ".join(sorted(f for f in files if f.endswith(ends))[:5]) or "no weights",
            expected=f"{SINGLE}, or shards named by {INDEX}",
            ways_out=["look for a version of the model in safetensors"],
        )


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def _unreachable(name: str, revision: str | None, error: Exception) -> ModelError:
    """Why a model could not be had from the Hub, with the server's own words."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    said = " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:600]
    wanted = f"{name!r} at revision {revision!r}" if revision else repr(name)
    if "GatedRepoError" in kinds:
        what = f"access to {name!r} is restricted, and this account has none"
        ways = ["ask for access on the model's page", "`hf auth login` with an account that has it"]
    elif "RevisionNotFoundError" in kinds:
        what = f"{name!r} has no revision {revision!r}"
        ways = ["look at its branches and tags", "without --revision: the newest"]
    elif "RepositoryNotFoundError" in kinds:
        what = f"there is no model {name!r} on the Hub that this account may see"
        ways = ["check the spelling", "`hf auth login`, if it is private"]
    elif "IncompleteSnapshotError" in kinds:
        what = f"{wanted} is in the Hub's cache on this machine in part, and cannot be completed"
        ways = ["unset HF_HUB_OFFLINE, if it is set", "look at the network, and repeat the command"]
    elif kinds & {"OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        what = f"{wanted} is neither a local directory nor in the Hub's cache on this machine"
        ways = ["check the spelling and the network", "unset HF_HUB_OFFLINE, if it is set"]
    else:
        what = f"{name!r} is neither a local directory nor a Hub model that can be reached"
        ways = [
            "check the spelling and the network",
            "log in with `hf auth login` if the model is gated",
        ]
    return ModelError(what, found=said or type(error).__name__, ways_out=ways)


def resolve_adapter(name: str) -> Path:
    """The local directory of an adapter: itself, a run's, or a snapshot of a Hub id.

    Raises:
        ModelError: no such directory and no such id, or the download failed.
    """
    path = Path(name).expanduser()
    for directory in (path, path / "adapter"):
        if (directory / "adapter_config.json").is_file():
            refuse_foreign(directory, OPENED)
            return directory.resolve()
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ModelError(
            f"no adapter at {name!r}",
            expected="a directory with adapter_config.json, a run or a Hub id",
        )
    return _snapshot(
        name, None, ["adapter_config.json", "adapter_model.safetensors", "halfbyte.json"], []
    )


def load_tokenizer(directory: Path) -> Any:
    """The directory's tokenizer, a fast one (built on `tokenizers`), no code of the directory run.
    ``misread`` says whether its class in transformers makes something else of tokenizer.json.

    Raises:
        ModelError: there is none, it is broken, or it exists in Python only.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        if getattr(tokenizer, "is_fast", False):
            tokenizer.misread = read_as_written(tokenizer, directory)
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

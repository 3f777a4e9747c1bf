"""A directory to the Hugging Face Hub: an adapter or a merged model with its card."""

import re
from pathlib import Path
from typing import Any

from ..errors import StorageError, UsageError, first_line
from .atomic import json_bytes, read_json


def reserve(repo_id: str | None, private: bool) -> str:
    """Make sure, before the work is done, that there is a repository and that it can be written to;
    its full name.

    Raises:
        UsageError: no name.
        StorageError: the Hub refuses, or cannot be reached.
    """
    if not repo_id:
        raise UsageError("push_to_hub needs a name", ways_out=["--hub_model_id owner/name"])
    try:
        name = _api().create_repo(repo_id, private=private, exist_ok=True).repo_id
        public = private and _api().repo_info(name).private is False
    except Exception as error:  # the client raises some twenty types; all mean the same to the user
        raise _refused(
            repo_id, error, "before anything was done", ["without --push_to_hub"]
        ) from error
    if public:
        raise UsageError(
            f"{name} is there already and public, and a private repository was asked for: nothing "
            "was done",
            ways_out=[
                "--hub_private_repo false publishes it for everybody",
                "make the repository private on the Hub, or name another: --hub_model_id",
            ],
        )
    return name


PATHS = {"adapter_config.json": "base_model_name_or_path", "config.json": "_name_or_path"}
"""Files and their keys that may hold a path of this machine, which means nothing elsewhere."""


def publish(directory: Path, repo_id: str, message: str, again: str) -> str:
    """Upload a directory's files; the address of the commit. Paths of this machine are left out of
    them.

    Args:
        again: the command that would do it again.

    Raises:
        StorageError: it failed; the directory is as it was.
    """
    try:
        found: Any = _api().create_commit(
            repo_id, operations=_operations(directory, repo_id), commit_message=message
        )
        return str(found.commit_url)
    except Exception as error:
        raise _refused(
            repo_id, error, f"{directory} is complete on this machine", [again]
        ) from error


def _operations(directory: Path, repo_id: str) -> list[Any]:
    """The files of a directory; a path of this machine in them becomes its name, and the
    directory's own the repository's."""
    from huggingface_hub import CommitOperationAdd

    found = []
    for file in sorted(directory.rglob("*")):
        place = file.relative_to(directory)
        if file.is_file() and not any(part.startswith(".") for part in place.parts):
            content: Any = file
            if (key := PATHS.get(file.name)) is not None:
                described = read_json(file)
                named = str(described.get(key) or "")
                if key in described and not is_public(named):
                    own = named and Path(named).resolve() == directory.resolve()
                    name = repo_id if own else Path(named).name or None
                    content = json_bytes({**described, key: name})
            found.append(CommitOperationAdd(place.as_posix(), content))
    return found


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(library_name="halfbyte")


def _refused(repo_id: str, error: Exception, state: str, ways: list[str]) -> StorageError:
    message = first_line(error)
    return StorageError(
        f"cannot publish {repo_id}: {state}",
        found=message[:300],
        ways_out=[
            "`hf auth login`, with a token that may write",
            "check the name and the network",
            *ways,
        ],
    )


def is_public(name: str) -> bool:
    """Whether a name is a Hub id; a path means nothing elsewhere, and is nobody's business."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()

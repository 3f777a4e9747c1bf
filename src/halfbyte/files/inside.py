"""What is opened of a directory lies in it, and is a file: no link leads out of a model's, an
adapter's, a run's or a data folder, at any depth."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from ..errors import ModelError
from .atomic import JSON_LIMIT


def refuse_foreign(directory: Path, names: Iterable[str]) -> None:
    """Raise ModelError for a link that leads out of a directory (the blobs of the Hub's cache it
    lies in excepted), a pipe or a device, at any depth of what these patterns of names choose."""
    for pattern in names:
        for path in sorted(directory.glob(pattern)):
            _refuse_foreign(path, directory)
            for below in sorted(_below(path)) if path.is_dir() else ():
                _refuse_foreign(below, directory)


def _refuse_foreign(path: Path, directory: Path) -> None:
    refuse_leaving(path, directory)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ModelError(f"{path} is not a regular file", ways_out=["put the file in its place"])


def refuse_leaving(path: Path, directory: Path) -> None:
    """Raise ModelError where a path is a link that leads out of a directory."""
    if not path.is_symlink():
        return
    home, real = directory.resolve(), path.resolve()
    if not real.is_relative_to(home) and not any(real.is_relative_to(b) for b in _blobs(home)):
        raise ModelError(
            f"{path} is a link to what lies outside the directory it is in",
            found=str(real),
            ways_out=["put what it leads to in its place", "or name that place itself"],
        )


def _blobs(home: Path) -> Iterator[Path]:
    """Where the Hub's cache keeps the files of the snapshot that a directory is in."""
    for parent in home.parents:
        if parent.name == "snapshots":
            yield parent.parent / "blobs"


def refuse_strange_files(
    directory: Path, patterns: Iterable[str], folders: Iterable[str] = ()
) -> None:
    """Refuse a directory of files that are something else, before anything opens one.

    Args:
        patterns: of the files that may be opened. folders: those whose files may be, too.

    Raises:
        ModelError: a pipe, a device, a folder with a file's name, a link that leads out of the
            directory, or a text file too large to be one.
    """
    patterns, read = list(patterns), {directory, *(directory / name for name in folders)}
    for path in sorted(_below(directory)):
        named = any(path.match(pattern) for pattern in patterns)
        if not named and not path.is_dir():
            continue
        refuse_leaving(path, directory)
        if not named or path.parent not in read:
            continue
        if not path.is_file():
            raise ModelError(f"{path} is not a regular file", ways_out=["copy the file again"])
        if path.suffix != ".safetensors" and path.stat().st_size > JSON_LIMIT:
            raise ModelError(
                f"{path} has {path.stat().st_size:,} bytes, too many for a configuration or "
                "tokenizer"
            )


def _below(directory: Path) -> Iterator[Path]:
    """What lies in a directory, at any depth, but for hidden folders."""
    for path in directory.iterdir():
        if path.is_dir() and path.name.startswith("."):
            continue
        yield path
        if not path.is_symlink() and path.is_dir():
            yield from _below(path)

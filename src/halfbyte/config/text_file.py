"""Small text files that users name: configurations, chat templates."""

from pathlib import Path

from ..errors import UsageError

LARGEST = 4 << 20
"""Bytes: what is larger is something else."""


def read_text_file(path: Path, what: str) -> str:
    """The text of a file, without a byte order mark.

    Args:
        what: the file is to be, for people.

    Raises:
        UsageError: it cannot be read, is no regular file (a device or pipe has no end), too large
            or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{what} {path} is not a regular file")
        if (size := path.stat().st_size) > LARGEST:
            raise UsageError(f"{what} {path} has {size / 1e6:.0f} MB: it is something else")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UsageError(f"cannot read {what} {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path} is not UTF-8", found=str(error)) from error

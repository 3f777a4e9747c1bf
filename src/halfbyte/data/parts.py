"""Which part of a data set a file is, as its name says: a folder of ``train.jsonl``,
``valid.jsonl`` and ``test.jsonl`` is not three files to train on."""

import re
from collections.abc import Sequence

from ..errors import DataError

TRAIN = "train"
PARTS = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words of names, as ``datasets`` knows them."""


def part_of(name: str) -> str:
    """The part that a file's name (its path in the folder) says it is; "" where it says none, or
    several."""
    found = {PARTS[word] for word in _words(name) if word in PARTS}
    return found.pop() if len(found) == 1 else ""


def _words(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())


def of_part(names: Sequence[str], part: str, where: str) -> list[int]:
    """The numbers of the files that a part (``train``, or a name for one of the others) consists
    of: all, where no name says that there are parts. Files that say no part are trained.

    Raises:
        DataError: there is no such part.
    """
    parts = [part_of(name) for name in names]
    there, wanted = sorted(set(parts) - {""}), PARTS.get(part.lower(), part)
    if not there or (wanted == TRAIN and set(parts) == {*there} and len(there) == 1):
        return list(range(len(names)))  # no parts, or the only one
    chosen = [
        i for i, found in enumerate(parts) if found == wanted or (not found and wanted == TRAIN)
    ]
    if wanted not in PARTS.values():  # a name of their own, such as train_sft
        own = f" {' '.join(_words(part))} "
        chosen = [i for i, name in enumerate(names) if own in f" {' '.join(_words(name))} "]
    if not chosen:
        raise DataError(
            f"{where} has no part {part!r}",
            found=", ".join(f"{name} ({found})" for name, found in zip(names, parts, strict=True)),
            ways_out=[f"--dataset_train_split {there[0]}", "or name the files: --data FILE"],
        )
    return chosen

"""Data sources to rows: JSON, JSONL, CSV, TSV, parquet, arrow and text files (packed ones, too),
folders of them, patterns, saved and Hub data sets.

A row is a mapping of columns with its place in the source (``file:line``), which every later
message about the row names. JSON and CSV are read here because no reader at hand knows lines and
bytes; the others go through pyarrow and datasets. Lines of JSONL are read one by one, whatever the
size of the file, and end at the newline byte only: JSON allows U+2028 inside strings. What a row
means is not decided here (`data.formats`).
"""

import glob
import io
import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from ..config.aliases import TOGETHER
from ..errors import DataError, HalfbyteError, ModelError, first_line
from ..files.inside import refuse_leaving
from .cells import Refuse, Row, raise_it
from .json_rows import Begun, json_rows, text_lines, text_of
from .packed import PACKED, Capped, unpacker
from .parts import TRAIN, of_part
from .tables import columnar_rows, columns_of, table

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".txt")


def sources(data: str | Path) -> list[tuple[str, int]]:
    """What a ``data`` option names: each source, and how often its rows are taken
    (``rows.jsonl:2``)."""
    found = []
    for name in str(data).split(TOGETHER):
        times = re.fullmatch(r"(.+):(\d+)", name)
        if times and not Path(name).expanduser().exists():
            found.append((times[1], int(times[2])))
        else:
            found.append((name, 1))
    return found


def files_of(source: str, split: str = TRAIN) -> list[Path]:
    """The files of a source: itself, or those of a folder or that fit a pattern, of one part of the
    data set (`data.parts`); none for a Hub id.

    Raises:
        DataError: nothing is there, or no regular file.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        files, names = _in_folder(path)
        if _is_saved(path):  # which has its own names for its parts
            return files
        return [files[i] for i in of_part(names, split, f"the folder {path}")]
    if path.exists():
        if not path.is_file():  # nobody waits for a pipe
            raise DataError(
                f"{path} is not a regular file", ways_out=["write the rows to a file first"]
            )
        return [path]
    if any(character in source for character in "*?["):
        files, names = _fitting(source)
        return [files[i] for i in of_part(names, split, f"the pattern {source}")]
    return []


def _fitting(pattern: str) -> tuple[list[Path], list[str]]:
    """All files that fit a pattern, and their names from where it begins."""
    place = str(Path(pattern).expanduser())
    fixed = re.split(r"[*?\[]", place)[0]
    files = [Path(name) for name in sorted(glob.glob(place, recursive=True))]  # noqa: PTH207
    if not files:
        raise DataError(f"no file fits the pattern {pattern}")
    files = [file for file in files if file.is_file()]
    folder = fixed[: max(fixed.rfind(mark) for mark in (os.sep, "/")) + 1]
    return files, [str(file).removeprefix(folder) for file in files]


def _in_folder(path: Path) -> tuple[list[Path], list[str]]:
    """All data files of a folder, and their names in it."""
    found = [file for file in sorted(path.rglob("*")) if _is_data(file)]
    if not found:
        raise DataError(
            f"{path} is a directory without data files",
            expected=f"files that end with {', '.join(SUFFIXES[:6])}",
        )
    for file in found:
        _refuse_leaving(file, path)
    return found, [file.relative_to(path).as_posix() for file in found]


def files_left_out(data: str | Path, split: str) -> list[str]:
    """Files of folders and archives that are of other parts than the one that is read."""
    found: list[str] = []
    for source, _ in sources(data):
        path = Path(source).expanduser()
        several = path.is_dir() and not _is_saved(path)
        if several or (not path.exists() and any(character in source for character in "*?[")):
            names = (_in_folder(path) if several else _fitting(source))[1]
            chosen = set(of_part(names, split, source))
            found += [names[i] for i in range(len(names)) if i not in chosen]
        for file in files_of(source, split):
            if zipfile.is_zipfile(file):
                with zipfile.ZipFile(file) as archive:
                    names = _members(archive)
                chosen = set(of_part(names, split, str(file)))
                found += [f"{file.name}/{names[i]}" for i in range(len(names)) if i not in chosen]
    return found


def _is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote a folder."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _refuse_leaving(file: Path, folder: Path) -> None:
    try:
        for place in (file, *file.parents[: len(file.relative_to(folder).parts) - 1]):
            refuse_leaving(place, folder)
    except ModelError as error:
        raise DataError(error.what, found=error.found, ways_out=error.ways_out) from error


def _is_data(file: Path) -> bool:
    names = [suffix.lower() for suffix in file.suffixes]
    known = bool(names) and (names[-1] in SUFFIXES or names[-1] in PACKED)
    about = ("dataset_info.json", "state.json", "dataset_infos.json")
    hidden = any(part.startswith(".") for part in file.parts[-2:])
    return known and file.is_file() and not hidden and file.name not in about


def read_rows(
    data: str | Path, *, config: str | None = None, split: str = "train", refuse: Refuse = raise_it
) -> Iterator[Row]:
    """The rows of all sources, one after the other.

    Args:
        data: paths, folders, patterns, or a Hub id (``owner/name``), as `sources` reads them.
        config, split: of a Hub data set; which part of a saved one, of a folder or archive with
            files of several, or of a file with several.
        refuse: called with the error of each bad row; raises it by default.

    Raises:
        DataError: naming file and line: unreadable, not UTF-8, not JSON, not a table.
    """
    read: Counter[str] = Counter()
    for source, times in sources(data):
        for _ in range(times):
            yield from _read_source(source, config, split, refuse, read)


def _read_source(
    source: str, config: str | None, split: str, refuse: Refuse, read: Counter[str]
) -> Iterator[Row]:
    """read: how often each file was, so that its rows have places of their own each time."""
    path = Path(source).expanduser()
    named, there = re.fullmatch(r"[\w.-]+/[\w.-]+", source), path.exists()
    if not there and named and not source.endswith((*SUFFIXES, *PACKED)):
        parts = [(source, _hub(source, config, split))]
    elif path.is_dir() and _is_saved(path):
        parts = [(source, _saved(path, split))]
    else:
        files = files_of(source, split) or [path]
        parts = [(str(file), _read_file(file, split, refuse)) for file in files]
    for name, rows in parts:
        again = f" again {read[name]}" if read[name] else ""
        read[name] += 1
        for where, row in rows:
            yield f"{where}{again}", row


def _read_file(path: Path, split: str, refuse: Refuse) -> Iterator[Row]:
    with _open(path) as stream:
        head = stream.read(4)
        stream.seek(0)
        if head == b"PK\x03\x04":
            yield from _zipped(path, split, refuse)
            return
        packed = unpacker(head)
        kind = _kind(str(path), head)
        text: Any = io.BufferedReader(Capped(path, packed(stream))) if packed else stream
        yield from _rows(path, str(path), text, kind, split, refuse)


def _kind(name: str, head: bytes = b"") -> str:
    """ "parquet", "arrow", or a suffix; "" where it says nothing."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    kind = next((suffix for suffix in reversed(suffixes) if suffix in SUFFIXES), "")
    if kind == ".parquet" or head == b"PAR1":
        return "parquet"
    return "arrow" if kind in (".arrow", ".feather") or head == b"ARRO" else kind


def _rows(
    path: Path, name: str, stream: IO[bytes], kind: str, split: str, refuse: Refuse
) -> Iterator[Row]:
    """Rows of an unpacked file. name: how places begin."""
    if kind in ("parquet", "arrow"):
        whole = stream if stream.seekable() else io.BytesIO(stream.read())
        yield from columnar_rows(name, whole, kind)
        return
    if kind in (".csv", ".tsv"):
        delimiter = "\t" if kind == ".tsv" else ","
        yield from table(name, text_lines(path, stream), delimiter, refuse)
        return
    if kind == ".txt":
        yield name, {"text": text_of(path, stream.read())}
        return
    begun = b""
    while not begun.strip(b"\xef\xbb\xbf \t\r\n"):
        more = stream.read(1 << 12)
        if not more:
            return
        begun += more
    first = begun.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    yield from json_rows(path, name, Begun(begun, stream), first, split, refuse)


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(
            f"cannot read the data file {path}: {error.strerror}",
            ways_out=["check --data: a path, or a Hub id of the form owner/name"],
        ) from error


def _zipped(path: Path, split: str, refuse: Refuse) -> Iterator[Row]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = _members(archive)
            if not names:
                raise DataError(
                    f"the zip file {path} holds no data file", expected=", ".join(SUFFIXES[:6])
                )
            for name in [names[i] for i in of_part(names, split, f"the zip file {path}")]:
                with archive.open(name) as member:
                    capped: Any = io.BufferedReader(Capped(path, member))
                    place = f"{path}/{name}"
                    yield from _rows(path, place, capped, _kind(name), split, refuse)
    except (zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise DataError(
            f"the zip file {path} cannot be unpacked", found=first_line(error)
        ) from error


def _members(archive: zipfile.ZipFile) -> list[str]:
    """The data files of an archive."""
    return [
        info.filename
        for info in archive.infolist()
        if Path(info.filename).suffix.lower() in SUFFIXES
        and not info.filename.startswith(("__MACOSX/", "."))
    ]


def _saved(path: Path, split: str) -> Iterator[Row]:
    """A folder that ``save_to_disk`` wrote."""
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the saved data set {path}", found=first_line(error)
        ) from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise DataError(
                f"the saved data set {path} has no part {split!r}",
                found=", ".join(map(str, found)),
                ways_out=[f"--dataset_train_split {next(iter(found), '')}"],
            )
        found = found[split]
    for number, row in enumerate(found, 1):
        yield f"{path} row {number}", columns_of(dict(row))


def _hub(name: str, config: str | None, split: str) -> Iterator[Row]:
    from datasets import load_dataset
    from datasets.utils.logging import disable_progress_bar

    disable_progress_bar()
    try:
        table = load_dataset(name, config, split=split)
    except HalfbyteError:
        raise
    except (
        Exception
    ) as error:  # the hub client raises some twenty types; all mean the same to the user
        message = first_line(error)
        raise DataError(
            f"{name!r} is neither a file nor a Hub data set that can be read",
            found=message,
            ways_out=[
                "check the path, or the id and the network",
                "--dataset_train_split and --dataset_config choose a part of a data set",
            ],
        ) from error
    for number, row in enumerate(table, 1):
        yield f"{name}[{split}] row {number}", columns_of(dict(row))

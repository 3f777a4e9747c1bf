"""Data sources to rows: JSON, JSONL, CSV, TSV and parquet files (JSON and text also gzipped), and
Hub data sets.

A row is a mapping of columns with its place in the source (``file:line``), which every later
message about the row names. JSON and CSV are read here because no reader at hand knows lines and
bytes; parquet and the Hub go through pyarrow and datasets. Lines of JSONL end at the newline byte
only: JSON allows U+2028 inside strings. What a row means is not decided here (`data.formats`).
"""

import csv
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError, HalfbyteError, first_line

Row = tuple[str, dict[str, Any]]
"""Where a row stands, and its columns."""

Refuse = Callable[[DataError], None]
"""What happens to a row that cannot be read: raise, or count it and go on (``--skip_bad``)."""

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
UNPACKED_LIMIT = 1 << 30
"""A gzipped file is unpacked up to this many bytes."""


def raise_it(error: DataError) -> None:
    """The default for bad rows."""
    raise error


def read_rows(
    data: str | Path, *, config: str | None = None, split: str = "train", refuse: Refuse = raise_it
) -> Iterator[Row]:
    """The rows of a file or of a Hub data set.

    Args:
        data: a path, or a Hub id (``owner/name``).
        config, split: of a Hub data set.
        refuse: called with the error of each bad row; raises it by default.

    Raises:
        DataError: naming file and line: unreadable, not UTF-8, not JSON, not a table.
    """
    path = Path(data).expanduser()
    if (
        not path.exists()
        and re.fullmatch(r"[\w.-]+/[\w.-]+", str(data))
        and not str(data).endswith((*SUFFIXES, ".gz"))
    ):
        yield from _hub(str(data), config, split)
        return
    suffixes = [suffix.lower() for suffix in path.suffixes]
    kind = next((suffix for suffix in reversed(suffixes) if suffix in SUFFIXES), "")
    if kind == ".parquet":
        yield from _parquet(path)
        return
    raw = _read_bytes(path)
    if raw[:4] == b"PAR1":
        yield from _parquet(path)
    elif kind in (".csv", ".tsv"):
        yield from _table(path, _text(path, raw), "\t" if kind == ".tsv" else ",", refuse)
    elif raw.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        yield from _objects(_array_items(path, _text(path, raw)), refuse)
    else:
        yield from _objects(_lines(path, raw, refuse), refuse)


# --- bytes and text -------------------------------------------------------------------------------


def _read_bytes(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(
            f"{path} is a directory", ways_out=["name a .json, .jsonl, .csv or .parquet file in it"]
        )
    if path.exists() and not path.is_file():
        raise DataError(
            f"{path} is not a regular file", ways_out=["write the rows to a file first"]
        )
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read the data file {path}: {error.strerror}",
            ways_out=["check --data: a path, or a Hub id of the form owner/name"],
        ) from error
    return _unpacked(path, raw) if raw[:2] == b"\x1f\x8b" else raw


def _unpacked(path: Path, raw: bytes) -> bytes:
    """A gzip file's content, no more than `UNPACKED_LIMIT` of it in memory whatever the file
    claims."""
    parts, size = [], 0
    try:
        while raw:
            stream = zlib.decompressobj(31)
            part = stream.decompress(raw, UNPACKED_LIMIT - size + 1)
            size += len(part)
            if size > UNPACKED_LIMIT:
                raise DataError(
                    f"{path} unpacks to more than {UNPACKED_LIMIT >> 30} GiB",
                    ways_out=["unpack it yourself, if it is what you think it is"],
                )
            if not stream.eof:
                raise DataError(f"the gzip file {path} is cut off")
            parts.append(part)
            raw = stream.unused_data
    except zlib.error as error:
        raise DataError(f"the gzip file {path} is damaged", found=str(error)) from error
    return b"".join(parts)


def _not_utf8(path: Path, raw: bytes, line: int, error: UnicodeDecodeError) -> DataError:
    column = error.start - (raw.rfind(b"\n", 0, error.start) + 1)
    return DataError(
        f"the data is not UTF-8: byte 0x{raw[error.start]:02x}",
        where=f"{path}:{line + raw.count(bytes([10]), 0, error.start)}:{column}",
        ways_out=["convert the file to UTF-8, e.g. with iconv"],
    )


def _text(path: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, raw, 1, error) from error


# --- JSON -----------------------------------------------------------------------------------------


def _objects(pairs: Iterator[tuple[str, Any]], refuse: Refuse) -> Iterator[Row]:
    for where, value in pairs:
        if isinstance(value, dict):
            yield where, value
        else:
            refuse(
                DataError(f"a row must be a JSON object, not a {type(value).__name__}", where=where)
            )


def _bad_json(where: str, error: ValueError | RecursionError) -> DataError:
    message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
    return DataError(
        f"not valid JSON: {message}",
        where=where,
        ways_out=["mend or remove this row", "--skip_bad N"],
    )


def _lines(path: Path, raw: bytes, refuse: Refuse) -> Iterator[tuple[str, Any]]:
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(io.BytesIO(raw), 1):
        if not line.strip():
            continue
        try:
            text = line.decode()
            yield f"{path}:{number}", json.loads(text)
        except UnicodeDecodeError as error:
            refuse(_not_utf8(path, line, number, error))
        except (ValueError, RecursionError) as error:
            place = error.pos if isinstance(error, json.JSONDecodeError) else 0
            column = len(line.decode()[:place].encode())
            refuse(_bad_json(f"{path}:{number}:{column}", error))


def _array_items(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0

    def skip_space(start: int) -> int:
        while start < len(text) and text[start] in " \t\r\n":
            start += 1
        return start

    position, before, item = skip_space(position), 0, 0
    while position < len(text) and text[position] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = error.pos if isinstance(error, json.JSONDecodeError) else position
            raise _bad_json(f"{path}:{text.count(chr(10), 0, at) + 1}", error) from error
        # several rows on a line are told apart by their number in the array
        item += 1
        yield f"{path}:{line}" + (f" item {item}" if line == before else ""), value
        before = line
        position = skip_space(end)
        if position < len(text) and text[position] == ",":
            position = skip_space(position + 1)
        elif position < len(text) and text[position] != "]":
            raise DataError(
                "the JSON array is not closed here",
                where=f"{path}:{text.count(chr(10), 0, position) + 1}",
            )
    if position >= len(text):
        raise DataError(
            "the JSON array has no closing bracket: the file is cut off", where=f"{path}:{line}"
        )
    if text[position + 1 :].strip():
        number = text.count("\n", 0, skip_space(position + 1)) + 1
        raise DataError("text follows the end of the JSON array", where=f"{path}:{number}")


# --- tables ---------------------------------------------------------------------------------------


def _table(path: Path, text: str, delimiter: str, refuse: Refuse) -> Iterator[Row]:
    """CSV or TSV with a header line; a row's place is the line it begins on."""
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    begins, header = 1, None
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"not valid CSV: {error}",
                where=f"{path}:{begins}",
                ways_out=["mend the quotes of this row"],
            ) from error
        if cells is None:
            return
        where, begins = f"{path}:{begins}", reader.line_num + 1
        if not cells:
            continue
        if header is None:
            header = cells
            if len(set(header)) != len(header):
                raise DataError("a column name occurs twice", where=where, found=", ".join(header))
            continue
        if len(cells) != len(header):
            refuse(
                DataError(
                    f"a row of {len(cells)} cells under a header of {len(header)}",
                    where=where,
                    ways_out=["put cells that hold commas, quotes or line ends in quotes"],
                )
            )
            continue
        yield where, dict(zip(header, cells, strict=True))


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=512):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except (OSError, pyarrow.ArrowException, ValueError) as error:
        message = first_line(error)
        raise DataError(f"cannot read the parquet file {path}", found=message) from error


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
        yield f"{name}[{split}] row {number}", dict(row)

"""Tables to rows: CSV and TSV, parquet and arrow files."""

import csv
import itertools
from collections.abc import Iterator
from typing import IO, Any

from ..errors import DataError, first_line
from .cells import Refuse, Row


def table(name: str, lines: Iterator[str], delimiter: str, refuse: Refuse) -> Iterator[Row]:
    """CSV or TSV with a header line; a row's place is the line it begins on, of the file so
    named."""
    csv.field_size_limit(1 << 30)
    titles = next(lines, "")
    if delimiter not in titles:
        others = {other: titles.count(other) for other in ",;\t|"}
        delimiter = max(others, key=lambda other: others[other]) if any(others.values()) else ","
    # "prompt, completion": spaces after the delimiter are nobody's
    spaced = f"{delimiter} " in titles
    reader = csv.reader(
        itertools.chain([titles], lines),
        delimiter=delimiter,
        strict=True,
        skipinitialspace=spaced,
    )
    begins, header = 1, None
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"not valid CSV: {error}",
                where=f"{name}:{begins}",
                ways_out=["mend the quotes of this row"],
            ) from error
        if cells is None:
            return
        where, begins = f"{name}:{begins}", reader.line_num + 1
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
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


def _without_nulls(value: Any) -> Any:
    """A cell without what a table of columns filled in: nulls inside of objects."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def columns_of(row: dict[str, Any]) -> dict[str, Any]:
    return {key: _without_nulls(value) for key, value in row.items()}


def columnar_rows(name: str, stream: IO[bytes], kind: str) -> Iterator[Row]:
    """A parquet file; or (kind "arrow") an arrow file, as a stream or with an index."""
    import pyarrow

    try:
        number = 0
        for batch in _batches(stream, kind):
            for row in batch.to_pylist():
                number += 1
                yield f"{name} row {number}", columns_of(row)
    except (OSError, pyarrow.ArrowException, ValueError) as error:
        message = first_line(error)
        raise DataError(f"cannot read the {kind} file {name}", found=message) from error


def _batches(stream: IO[bytes], kind: str) -> Iterator[Any]:
    from pyarrow import ipc, parquet

    if kind == "parquet":
        with parquet.ParquetFile(stream) as file:
            yield from file.iter_batches(batch_size=512)
        return
    indexed = stream.read(6) == b"ARROW1"
    stream.seek(0)
    if indexed:
        reader = ipc.open_file(stream)
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from ipc.open_stream(stream)

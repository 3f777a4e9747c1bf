"""Rows that a script has in memory, as the file that a run keeps of them."""

import hashlib
import json
from typing import Any

from ..errors import DataError


def rows_in_memory(data: Any) -> bytes | None:
    """JSON lines of a list of rows (mappings), or of a ``datasets.Dataset``; None for anything
    else.

    Raises:
        DataError: a row holds what JSON cannot hold.
    """
    table = hasattr(data, "column_names") and hasattr(data, "__iter__")
    if not table and not (isinstance(data, list | tuple) and data and isinstance(data[0], dict)):
        return None
    lines = []
    for number, row in enumerate(data, 1):
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False) + "\n")
        except (TypeError, ValueError) as error:
            raise DataError(
                "a row holds what JSON cannot hold", where=f"row {number}", found=str(error)[:200]
            ) from error
    return "".join(lines).encode("utf-8", "surrogatepass")


def rows_name(rows: bytes) -> str:
    """The name of that file: other rows have another, so that none of an earlier run is written
    over."""
    return f"rows-{hashlib.sha256(rows).hexdigest()[:12]}.jsonl"

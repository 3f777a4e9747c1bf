"""Which part of memory a tensor counts for, while it is made."""

import contextlib
import threading
from collections.abc import Iterator

_part = threading.local()


@contextlib.contextmanager
def counted_as(part: str) -> Iterator[None]:
    """Tensors made within this block belong to this part of a ledger (`ledger.TensorBytes`)."""
    before, _part.name = current_part(), part
    try:
        yield
    finally:
        _part.name = before


def current_part() -> str:
    return getattr(_part, "name", "live layer")

"""All rows of a source to ids and masks: rendered, tokenized and marked by threads that seldom wait
for each other."""

import contextlib
import gc
import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from ..errors import DataError
from ..progress import Progress, no_progress
from .formats import Example
from .renderer import Renderer, Tokenized
from .row_cache import Making
from .stored_rows import StoredRows

BATCH, BATCH_CHARACTERS = 256, 1 << 20
"""Most rows that are tokenized at once, and most characters but for one row's."""
AHEAD = 2
"""So many times these are rendered and tokenized before their masks are made."""
NOTED_EVERY = 20.0
"""Seconds after which it is noted what is tokenized."""


def encode(examples: Iterable[Example], renderer: Renderer) -> tuple[StoredRows, list[DataError]]:
    """Ids and masks of all rows, and an error for each that the template refuses."""
    making = Making(StoredRows())
    encode_into(making, examples, renderer)
    return making.rows, making.refused


def encode_into(
    making: Making,
    examples: Iterable[Example],
    renderer: Renderer,
    progress: Progress = no_progress,
    expected: int = 0,
) -> None:
    """Add ids and masks of all rows that are not read yet, and an error for each that the template
    refuses.

    Args:
        expected: how many rows there are, about; 0 where nobody knows.

    Raises:
        TemplateStopped: the template does not end.
    """
    # what is made here stays or is free at once, so that looking for garbage finds none
    with _no_collection(), ThreadPoolExecutor(AHEAD) as ahead:
        batches = _tokenized(examples, making, renderer, ahead)
        for tokenized in progress(batches, -(-expected // BATCH), "tokenizing"):
            good, refused = renderer.finish(tokenized)
            making.rows.extend(good)
            making.refused += (error.with_traceback(None) for error in refused)
            making.read += len(tokenized)


def _tokenized(
    examples: Iterable[Example], making: Making, renderer: Renderer, ahead: ThreadPoolExecutor
) -> Iterator[list[Tokenized]]:
    """Some rows at a time. The template's process renders the next rows while what it wrote of
    others is tokenized, and the masks of others again are made. Now and then all of it is waited
    for, and noted."""
    waiting, coming = iter(examples), deque[Future[list[Tokenized]]]()
    for _ in range(making.read // BATCH):  # an interrupted command's
        deque(itertools.islice(waiting, BATCH), 0)
        yield []
    batches = _batches(itertools.islice(waiting, making.read % BATCH, None))
    yield renderer.tokenize(next(batches, []))  # here: the process is this thread's
    noted = time.monotonic()
    for batch in batches:
        coming.append(ahead.submit(renderer.tokenize, batch))
        due = time.monotonic() - noted > NOTED_EVERY
        while coming and (due or len(coming) > AHEAD):
            yield coming.popleft().result()
        if due:
            making.noticed = renderer.noticed
            making.note()
            noted = time.monotonic()
    for future in coming:
        yield future.result()


def _batches(examples: Iterable[Example]) -> Iterator[list[Example]]:
    batch: list[Example] = []
    size = 0
    for example in examples:
        batch.append(example)
        size += _characters(example)
        if len(batch) == BATCH or size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(example: Example) -> int:
    """Of a row, about: without what its tools and calls hold."""
    contents = [message.get("content") for message in example.messages or ()]
    said = sum(len(content) for content in contents if isinstance(content, str))
    return said + len(example.prompt) + len(example.completion)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Within this block the garbage collector rests, as far as it was at work."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()

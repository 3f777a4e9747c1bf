"""A data source to rows ready for training or evaluation: read, rendered, cut to length, held out,
counted.

Training, evaluation, ``data check`` and a merge's probes all come through here, so they see the
same ids and masks. Nothing is changed in silence: every row left out, cut or held out is in the
counts (`Data.counts`).
"""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy

from ..config.aliases import ADDING_TOKENS
from ..config.options import DataOptions, TrainConfig
from ..errors import DataError
from ..files import atomic, hub
from ..files.model_config import context_of, declared_ends, read_config
from ..progress import Progress, no_progress
from .bad_rows import refuse_bad
from .batches import Prepared, Schedule, prepare
from .chat_template import read_template
from .encoder import TokenizedExample
from .formats import MIXED, Example, ExampleReader
from .held_out import count_distinct, held_by_default, hold_out, row_digests
from .readers import files_left_out
from .renderer import PARTS, SPLIT, Renderer
from .row_cache import Making, TokenizedData, kept_or_made
from .stored_rows import TRAINED, Rows, StoredRows
from .tokenizing import encode_into

BY_LINE = (".jsonl", ".ndjson", ".csv", ".tsv")
"""Files that hold about a row a line."""


@dataclass
class Data:
    """Rows and everything that was decided about them.

    train: what is trained on. held_out: evaluated, never trained on.
    share_held_out: ``eval_split`` as it was given, or decided. rows_cut: of all, longer than
    max_length. noticed: what people should be told of the rows, and of how many it holds.
    """

    format: str
    renderer: Renderer
    max_length: int
    train: Prepared
    held_out: Sequence[TokenizedExample]
    bad: list[DataError] = field(default_factory=list)
    duplicates: int = 0
    ends: int = 0
    share_held_out: float = 0
    rows_cut: int = 0
    noticed: Counter[str] = field(default_factory=Counter)
    _asked: dict[int, list[tuple[TokenizedExample, list[int], str]]] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        return {
            **self.train.counts(),
            "rows_held_out": len(self.held_out),
            "bad_rows_skipped": len(self.bad),
            "duplicate_rows": self.duplicates,
            "rows_with_trained_end": self.ends,
        }

    def question(self, row: TokenizedExample) -> tuple[list[int], str] | None:
        """Ids that ask for a row's last answer, and the answer; None where there is none, or it is
        too long to ask."""
        # a part of a text was made of none
        pair = self.renderer.question_and_answer(row.example) if row.example else None
        return None if pair is None or len(pair[0]) >= self.max_length else pair

    def questions(self, count: int) -> list[tuple[TokenizedExample, list[int], str]]:
        """The first rows that can be asked, held-out ones before others: row, ids that ask, and the
        answer wanted. They are remembered: a template is not asked again, and its process
        ends."""
        if count not in self._asked:
            found: list[tuple[TokenizedExample, list[int], str]] = []
            for row in itertools.chain(self.held_out, self.train.rows):
                if len(found) >= count:
                    break
                if pair := self.question(row):
                    found.append((row, *pair))
            self._asked[count] = found
            self.renderer.rest()  # what runs templates is no part of any plan
        return self._asked[count]


def read_data(
    source: str,
    options: DataOptions,
    base: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = no_progress,
    renderer: Renderer | None = None,
    clock: datetime | None = None,
    training: bool = True,
) -> Data:
    """Everything that can be known about the data before the weights are read.

    Args:
        source: a file or Hub id.
        base: the model's directory (its config.json and tokenizer are read).
        renderer: used instead of one made from base's tokenizer and the options.
        clock: what a template that asks for it sees.
        training: refuse rows of which none trains an end.

    Raises:
        DataError: naming the row: unreadable, unknown form, refused by the template, too long
            (``over_length error``), ids the model does not have, nothing left to train, or an end
            token that no row trains.
    """
    model_config = read_config(base)
    renderer = renderer or make_renderer(
        hub.load_tokenizer(base), options, clock, declared_ends(base)
    )
    max_length = length_of_rows(options, model_config)
    if max_length < options.max_length and "max_length" in options.model_fields_set:
        say(
            f"max_length {options.max_length} is capped at the model's context, {max_length} "
            "(max_position_embeddings in its config.json, as rope_parameters extend it)"
        )
    renderer.noticed.clear()
    found = _encoded(source, options, renderer, progress, say)
    rows = found.rows
    refuse_bad(found.bad, found.count, options.skip_bad if len(rows) else 0)
    renderer.learn_ends(rows)
    for error in found.bad:
        say(f"skipped a bad row: {error.where}: {error.what}")
    refuse_unknown_ids(rows, model_config.get_text_config().vocab_size)
    share = held_by_default(len(rows)) if options.eval_split is None else options.eval_split
    digests = row_digests(rows, str(options.seed), max_length)
    train_rows, held_out = hold_out(rows, share, digests)
    duplicates = len(rows) - count_distinct(digests)
    del digests
    train = prepare(train_rows, max_length, options.over_length)
    held_out = _prepare_held_out(held_out, max_length, options.over_length, say)
    data = Data(
        format=found.format,
        renderer=renderer,
        max_length=max_length,
        train=train,
        held_out=held_out,
        bad=found.bad,
        duplicates=duplicates,
        ends=_rows_with_supervised_end(train.rows, renderer),
        share_held_out=share,
        rows_cut=int((rows.lengths > max_length).sum()),
        noticed=found.noticed
        + _unread_columns(found.unread)
        + _other_parts(source, options.dataset_train_split),
    )
    if training and data.ends == 0 and data.format != "input_ids":
        raise DataError(
            "no row trains the end of an answer, so the model would never learn to stop",
            where=train.rows.where(0),
            found=f"{train.end_lost} rows lose their end when cut at {max_length} tokens",
            ways_out=["raise --max_length", "--over_length drop leaves too long rows out"],
        )
    return data


def _encoded(
    source: str,
    options: DataOptions,
    renderer: Renderer,
    progress: Progress,
    say: Callable[[str], None],
) -> TokenizedData:
    """All rows of a source, as they are now or as an earlier command made them."""

    def make(making: Making) -> TokenizedData:
        found = examples_of(source, options)
        renderer.noticed.update(making.noticed)
        encode_into(making, found, renderer, progress, rows_expected(found))
        bad, count = found.bad + making.refused, found.count + len(found.bad)
        return TokenizedData(making.rows, found.format, count, bad, found.unread, renderer.noticed)

    read = (options.dataset_config, options.dataset_train_split, options.drop_roles)
    files = [file for file, _ in examples_of(source, options).files()]
    return kept_or_made(source, files, {"read": read, **renderer.identity()}, make, say)


def examples_of(source: str, options: DataOptions) -> ExampleReader:
    """The rows of a source as the options have them read."""
    return ExampleReader(
        source,
        config=options.dataset_config,
        split=options.dataset_train_split,
        drop_roles=options.drop_roles,
    )


def length_of_rows(options: DataOptions, model_config: Any) -> int:
    """Where rows are cut, in tokens: at ``max_length``, and at the model's context."""
    return min(options.max_length, context_of(model_config) or options.max_length)


def _prepare_held_out(
    rows: Rows, max_length: int, over_length: Any, say: Callable[[str], None]
) -> Rows:
    if not len(rows):
        return rows
    try:
        prepared = prepare(rows, max_length, over_length).rows
    except DataError as error:
        error.what = f"of the rows held out for evaluation: {error.what}"
        way = "hold out more rows, or others: --eval_split, --seed"
        error.ways_out = (way, *error.ways_out)
        raise
    if lost := len(rows) - len(prepared):
        say(f"{lost} held-out rows are left out: too long, or without a trained token")
    return prepared


def make_renderer(
    tokenizer: Any,
    options: DataOptions,
    clock: datetime | None = None,
    ends: Iterable[int] = (),
) -> Renderer:
    """The renderer the options describe. ends: as for `Renderer`."""
    template = read_template(options.chat_template) if options.chat_template else None
    return Renderer(
        tokenizer,
        template,
        assistant_only=options.assistant_only_loss,
        completion_only=options.completion_only_loss,
        clock=clock,
        turns=options.turns,
        parse_control_tokens=options.parse_control_tokens,
        ends=ends,
        template_kwargs=options.chat_template_kwargs,
    )


def _unread_columns(unread: Counter[str]) -> Counter[str]:
    return Counter(
        {f"rows hold a column that nothing reads: {name}": count for name, count in unread.items()}
    )


def _other_parts(source: str, split: str) -> Counter[str]:
    if not (names := files_left_out(source, split)):
        return Counter()
    shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
    what = f"files of other parts of the data set are not read: {shown} (--dataset_train_split)"
    return Counter({what: len(names)})


def rows_expected(examples: ExampleReader) -> int:
    """How many rows a source holds, as far as that is seen at once: lines of its files. 0 where it
    is not."""
    files = examples.files()
    if any(file.suffix.lower() not in BY_LINE for file, _ in files):
        return 0
    return sum(times * atomic.lines_in(file) for file, times in files)


def refuse_unknown_ids(rows: StoredRows, vocabulary: int) -> None:
    """Raise DataError for the first row with an id past the model's embeddings."""
    if rows.highest < vocabulary:
        return
    first, highest = next(
        (index, highest)
        for index in range(len(rows))
        if (highest := int((rows.marked(index) & (TRAINED - 1)).max(initial=0))) >= vocabulary
    )
    raise DataError(
        f"a row holds id {highest}, but the model has {vocabulary} embeddings",
        where=rows.where(first),
        ways_out=["use the tokenizer that belongs to the model", ADDING_TOKENS],
    )


def _rows_with_supervised_end(rows: Rows, renderer: Renderer) -> int:
    stops = numpy.array(renderer.stop_ids(), numpy.uint32) | TRAINED
    count = 0
    for _, begins, marked in rows.chunks():
        found = numpy.concatenate(([0], numpy.cumsum(numpy.isin(marked, stops))))
        count += int((numpy.diff(found[begins]) > 0).sum())
    return count


def source_digest(examples: ExampleReader) -> str:
    """sha256 of the data: a file's bytes, those of all its files, or the rows of a Hub data set."""
    named = examples.files()
    if len(named) == 1 and named[0][1] == 1:
        return atomic.sha256_file(named[0][0])
    digest = hashlib.sha256()
    if named:
        for file, times in named:
            digest.update(f"{atomic.sha256_file(file)} {times}\n".encode())
        return digest.hexdigest()
    for example in examples:
        digest.update(json.dumps(_as_read(example), default=str).encode())
    return digest.hexdigest()


def _as_read(example: Example) -> dict[str, Any]:
    """What a row holds, without what it says of being trained where it says nothing."""
    found = asdict(example)
    untrained = sorted(found.pop("untrained"))
    del found["part_of"]
    return {**found, "untrained": untrained} if untrained else found


def schedule_of(config: TrainConfig, data: Data) -> Schedule:
    """Which rows each optimizer step trains on."""
    return Schedule(
        data.train.rows,
        config.seed,
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        data.max_length if config.packing else None,
    )


FORMAT_NAMES = {
    "messages": "conversations (messages)",
    "sharegpt": "conversations (ShareGPT)",
    "alpaca": "instructions (alpaca)",
    "qa": "questions and answers",
    "prompt": "prompts and completions",
    "turns": "prompts and completions (messages)",
    "text": "plain text",
    "input_ids": "ready-made ids",
    MIXED: "rows of several forms",
}


def data_lines(data: Data, use: str = "trained") -> Iterator[str]:
    """What was decided about the data, for people. use: what happens to the supervised tokens."""
    train, limit = data.train, data.max_length
    yield (
        f"{len(train.rows):,} rows taken as {FORMAT_NAMES[data.format]}: {train.tokens:,} tokens, "
        f"{train.supervised:,} of them {use}"
    )
    if getattr(data.renderer.tokenizer, "misread", False):
        yield (
            f"{type(data.renderer.tokenizer).__name__} in this transformers cuts texts otherwise "
            "than the model's tokenizer.json says: it is read as it is written, and copies of it "
            "name a class that does"
        )
    if data.held_out:
        yield f"{len(data.held_out):,} rows are held out for evaluation"
    if data.duplicates:
        yield f"{data.duplicates:,} rows are copies of others; they are kept"
    for what, count in data.noticed.most_common():
        if what == SPLIT:
            yield f"{count:,} {SPLIT} {data.noticed[PARTS]:,} {PARTS}"
        elif what != PARTS:
            yield f"{count:,} {what}"
    if train.truncated:
        yield (
            f"{train.truncated} rows were cut at {limit} tokens; {train.end_lost} of them lost "
            "trained tokens "
            "and their end (--max_length raises the limit, --over_length drop leaves such rows out)"
        )
    if train.dropped_long:
        yield f"{len(train.dropped_long)} rows longer than {limit} tokens were left out"
    if train.dropped_unsupervised:
        yield (
            f"{len(train.dropped_unsupervised)} rows without a trained token in {limit} tokens "
            "were left out"
        )
    if train.texts_split:
        yield (
            f"{train.texts_split:,} texts longer than {limit} tokens became {train.parts:,} rows"
        )
    if data.ends < len(train.rows) - train.end_lost - train.parts + train.texts_split:
        yield (
            f"only {data.ends} of {len(train.rows)} rows train an end token: the model may not "
            "learn to stop"
        )

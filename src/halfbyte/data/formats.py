"""What a row means: the columns of the forms people use, to one `Example`.

Every row has its own form, that of the first where its columns leave it open. Seven are known:
conversations (``messages``, with tools and system; ShareGPT's ``conversations``), alpaca
(``instruction``, ``input``, ``output``, ``system``, ``history``), ``question`` and ``answer``,
prompt and completion (strings or messages), plain ``text``, and ``input_ids``. Preference pairs are
recognized and refused: their second answer would be trained as if it were wanted. Columns that no
form reads are counted (`ExampleReader.unread`): nothing of a row is left out without a word.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any

from ..errors import DataError
from .bad_rows import refuse_bad
from .cells import integers, is_missing, loaded, string
from .messages import read_messages, read_tools, refuse_media, role_of
from .readers import files_of, read_rows, sources

FORMATS = (
    '{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}',
    '{"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}',
    '{"instruction": ..., "input": ..., "output": ...}',
    '{"question": ..., "answer": ...}',
    '{"prompt": ..., "completion": ...}',
    '{"text": ...}',
    '{"input_ids": [...], "labels": [...]}',
)
COLUMNS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "qa": ("question", "answer"),
    "prompt": ("prompt", "completion"),
    "input_ids": ("input_ids",),
    "text": ("text",),
}
"""The columns by which a form is known, in the order they are tried."""
SYSTEM = ("system", "system_prompt")
IDS = ("labels", "attention_mask", "completion_mask", "assistant_masks", "special_tokens_mask")
READ = {
    "messages": (*SYSTEM, "tools", "functions"),
    "sharegpt": (*SYSTEM, "tools", "functions"),
    "alpaca": (*SYSTEM, "input", "history"),
    "qa": SYSTEM,
    "prompt": (*SYSTEM, "tools", "functions", "label"),
    "turns": (*SYSTEM, "tools", "functions", "label"),
    "input_ids": (*IDS, "token_type_ids", "length", "position_ids", "seq_lengths"),
    "text": (),
}
"""What a form reads beside its columns."""
IGNORE, MIXED = -100, "mixed"
ASKING = ("user", "tool")
"""Roles whose turns are answered."""


@dataclass(frozen=True)
class Example:
    """One row: a conversation, a prompt (string) with its completion, or ids.

    messages: the conversation; those before ``supervised_from`` and the ``untrained`` ones are read
    only. tools: handed to the
    template. prompt, completion: strings; a plain text is a completion without a prompt. input_ids,
    loss_mask: ready-made. part_of: the place of the row that this is one answer of.
    """

    where: str
    messages: list[dict[str, Any]] | None = None
    prompt: str = ""
    completion: str = ""
    tools: list[Any] | None = None
    supervised_from: int = 0
    untrained: frozenset[int] = frozenset()
    part_of: str = ""
    input_ids: list[int] | None = None
    loss_mask: list[bool] | None = None


def trained_turns(example: Example) -> list[int]:
    return [
        i
        for i, message in enumerate(example.messages or [])
        if message["role"] == "assistant"
        and i >= example.supervised_from
        and i not in example.untrained
    ]


def last_asked(example: Example | None) -> str:
    """What the last trained answer of a row answers, without what a template puts before it; ""
    where that is no text."""
    if example is None or not (trained := trained_turns(example)):
        return example.prompt if example is not None else ""
    before = (example.messages or [])[: trained[-1]]
    content = next((m.get("content") for m in reversed(before) if m["role"] in ASKING), "")
    return content if isinstance(content, str) else ""


class ExampleReader:
    """The rows of a source, one after the other, and an error for each that cannot be taken. It is
    gone through once; what is said of all rows is known afterwards.

    Args:
        config, split: of a Hub data set.
        drop_roles: messages of these roles (separated by commas) are left out.

    Raises:
        DataError: the file cannot be read on, or has no rows.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        config: str | None = None,
        split: str = "train",
        drop_roles: str = "",
    ) -> None:
        self.bad: list[DataError] = []
        """Rows that are none."""
        self.unread: Counter[str] = Counter()
        """Columns that hold something and that nothing reads, and in how many rows."""
        self.count = 0
        self._data, self._config, self._split = data, config, split
        self._dropped = frozenset(role.strip() for role in drop_roles.split(",") if role.strip())
        self._first, self._forms = "", set[str]()

    def files(self) -> list[tuple[Path, int]]:
        """The files that are read, and how often; none of a Hub data set."""
        named = sources(self._data)
        return [(file, times) for name, times in named for file in files_of(name, self._split)]

    @property
    def format(self) -> str:
        """The form the rows were taken for (`MIXED`: several)."""
        return self._first if len(self._forms) < 2 else MIXED

    def __iter__(self) -> Iterator[Example]:
        refuse = self._refuse
        for where, row in read_rows(
            self._data, config=self._config, split=self._split, refuse=refuse
        ):
            try:
                form = _form_of_next(row, where, self._first)
                self._first = self._first or form
                refuse_media(row, where)
                example = _READERS[form](row, where, self._dropped)
            except DataError as error:
                refuse(error)
                continue
            self._forms.add(form)
            self.count += 1
            known = {*COLUMNS.get(form, COLUMNS["prompt"]), *READ[form]}
            self.unread.update(
                str(column)
                for column, value in row.items()
                if column not in known and not is_missing(value) and value not in ("", [], {})
            )
            yield example
        if not self.count and not self.bad:
            raise DataError(
                f"{self._data} holds no rows",
                expected="a JSON array of objects, one JSON object per line, or a table",
            )

    def _refuse(self, error: DataError) -> None:
        # an error that was raised holds on to the row that was read
        self.bad.append(error.with_traceback(None))


@dataclass(frozen=True)
class Examples:
    """All rows of a source, and what is known of them (`ExampleReader`)."""

    format: str
    rows: list[Example]
    bad: list[DataError]
    unread: Counter[str]


def read_examples(data: str | Path, *, skip_bad: int = 0, **options: Any) -> Examples:
    """All rows of a source at once, for scripts that look at a few. options: as `ExampleReader`.

    Raises:
        DataError: more rows than may be left out (``skip_bad``) cannot be taken.
    """
    reader = ExampleReader(data, **options)
    rows = list(reader)
    refuse_bad(reader.bad, len(rows) + len(reader.bad), skip_bad)
    return Examples(reader.format, rows, reader.bad, reader.unread)


def _form_of_next(row: dict[str, Any], where: str, first: str) -> str:
    """The form of a row after others: theirs if it has its columns, or if it has no other."""
    if first and set(COLUMNS.get(first, COLUMNS["prompt"])) <= row.keys():
        return first
    try:
        return format_of(row, where)
    except DataError:
        if not first:
            raise
        return first


def format_of(row: dict[str, Any], where: str) -> str:
    """Which form a row has, by its columns: one whose columns all hold something, else one whose
    columns are there.

    Raises:
        DataError: preference pairs, or unknown columns.
    """
    full = {key for key, value in row.items() if not is_missing(value)}
    for has in (full, set(row)):
        if {"chosen", "rejected"} <= has:
            raise DataError(
                "these are preference pairs (chosen, rejected): not supervised fine-tuning",
                where=where,
                ways_out=["rename the good answers to `completion` and drop `rejected`"],
            )
        for format, columns in COLUMNS.items():
            if set(columns) <= has:
                return "turns" if format == "prompt" and _is_turns(row["prompt"]) else format
    if {"role", "content"} <= full or {"from", "value"} == full:
        raise DataError(
            "this is a message, and a row is a whole conversation",
            where=where,
            found=", ".join(map(str, row))[:400],
            expected='{"messages": [{"role": "user", "content": ...}, ...]}',
            ways_out=["put the messages of each conversation into a list of its own"],
        )
    raise DataError(
        "the columns fit no known form",
        where=where,
        found=", ".join(map(str, row))[:400] or "no columns",
        expected=" or ".join(FORMATS),
        ways_out=["rename the columns"],
    )


def _is_turns(value: Any) -> bool:
    """Whether a prompt is a list of messages, or a JSON string that holds one; other JSON is
    text."""
    value = loaded(value, dict)
    return isinstance(value, list) and all(
        isinstance(item, dict) and ("role" in item or "from" in item) for item in value
    )


# --- one reader a form ----------------------------------------------------------------------------


def _conversation(
    row: dict[str, Any], turns: Any, where: str, column: str, dropped: frozenset[str]
) -> Example:
    """Turns, the row's system message before them, and its tools."""
    messages, untrained = read_messages(turns, where, column, dropped)
    system = next((text for key in SYSTEM if (text := string(row, key, where, optional=True))), "")
    if system and "system" not in dropped:
        first = messages[0]
        if first["role"] == "system" and first["content"] != system:
            raise DataError(
                "the row has two system messages: its own and the conversation's", where=where
            )
        if first["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
            untrained = frozenset(i + 1 for i in untrained)
    return Example(where, messages, tools=read_tools(row, where), untrained=untrained)


def _turns_of(row: dict[str, Any], column: str, where: str) -> Any:
    if column not in row:
        raise DataError(
            f"a row without {column!r}, which the rows before it have",
            where=where,
            found=", ".join(map(str, row))[:400] or "no columns",
        )
    return row[column]


def _from_messages(row: dict[str, Any], where: str, dropped: frozenset[str]) -> Example:
    return _conversation(row, _turns_of(row, "messages", where), where, "messages", dropped)


def _from_sharegpt(row: dict[str, Any], where: str, dropped: frozenset[str]) -> Example:
    turns = _turns_of(row, "conversations", where)
    return _conversation(row, turns, where, "conversations", dropped)


def _from_alpaca(row: dict[str, Any], where: str, dropped: frozenset[str]) -> Example:
    question = string(row, "instruction", where)
    if extra := string(row, "input", where, optional=True):
        question = f"{question}\n\n{extra}"
    turns: list[dict[str, Any]] = []
    for number, pair in enumerate(loaded(row.get("history"), list) or []):
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise DataError(
                "history must be a list of [question, answer] pairs",
                where=f"{where} history {number}",
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    turns += [
        {"role": "user", "content": question},
        {"role": "assistant", "content": string(row, "output", where)},
    ]
    return _conversation(row, turns, where, "output", dropped)


def _from_qa(row: dict[str, Any], where: str, dropped: frozenset[str]) -> Example:
    turns = [
        {"role": "user", "content": string(row, "question", where)},
        {"role": "assistant", "content": string(row, "answer", where)},
    ]
    return _conversation(row, turns, where, "answer", dropped)


def _from_prompt(row: dict[str, Any], where: str, dropped: frozenset[str]) -> Example:
    label = row.get("label")
    if label is False or (isinstance(label, str) and label.strip().lower() == "false"):
        raise DataError(
            "the row's label says that its completion is not wanted (KTO): not supervised "
            "fine-tuning",
            where=where,
            ways_out=["--skip_bad N leaves such rows out", "or keep rows with label true only"],
        )
    if _is_turns(row.get("prompt")):
        return _from_turns(row, where, dropped)
    answer = string(row, "completion", where)
    if not answer:
        raise DataError("the completion is empty: there is nothing to train", where=where)
    prompt = string(row, "prompt", where)
    for column in (*SYSTEM, "tools", "functions"):
        if not is_missing(row.get(column)) and row[column] not in ("", []):
            raise DataError(
                f"column {column!r} belongs to a conversation, and the prompt is a plain text",
                where=where,
                ways_out=["bring the row as `messages`", "or remove the column"],
            )
    return Example(where, None, prompt, answer)


def _from_turns(row: dict[str, Any], where: str, dropped: frozenset[str]) -> Example:
    prompt, completion = (loaded(row.get(column), dict) for column in ("prompt", "completion"))
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if not isinstance(completion, list):
        raise DataError(
            "column 'completion' must be a list of messages, as the prompt", where=where
        )
    if not any(role_of(turn) == "assistant" for turn in completion):
        raise DataError(
            "the completion has no assistant's turn: there is nothing to train", where=where
        )
    example = _conversation(row, prompt + completion, where, "prompt + completion", dropped)
    trained = sum(role_of(turn) not in dropped for turn in completion)
    return replace(example, supervised_from=len(example.messages or []) - trained)


def _from_text(row: dict[str, Any], where: str, dropped: frozenset[str]) -> Example:
    text = string(row, "text", where)
    if not text.strip():
        raise DataError("the text is empty: there is nothing to train", where=where)
    return Example(where, None, "", text)


def _from_ids(row: dict[str, Any], where: str, dropped: frozenset[str]) -> Example:
    ids = integers(row.get("input_ids"), where, "input_ids")
    columns = {
        name: integers(row[name], where, name) for name in IDS if not is_missing(row.get(name))
    }
    for name, values in columns.items():
        if len(values) != len(ids):
            raise DataError(f"{len(ids)} input_ids but {len(values)} {name}", where=where)
    mask = [True] * len(ids)
    for name in ("completion_mask", "assistant_masks", "attention_mask"):
        if name in columns:
            mask = [flag and bool(value) for flag, value in zip(mask, columns[name], strict=True)]
    labels = columns.get(
        "labels", [i if flag else IGNORE for i, flag in zip(ids, mask, strict=True)]
    )
    if wrong := [
        i for i, (a, b) in enumerate(zip(ids, labels, strict=True)) if b not in (a, IGNORE)
    ]:
        raise DataError(
            f"label {labels[wrong[0]]} at position {wrong[0]} is neither the id there nor {IGNORE}",
            where=where,
            ways_out=["labels stand beside their ids; they are shifted when the loss is computed"],
        )
    mask = [flag and label != IGNORE for flag, label in zip(mask, labels, strict=True)]
    there = [bool(value) for value in columns.get("attention_mask", [1] * len(ids))]
    positions = row.get("position_ids")
    if not all(there):  # padding
        _refuse_no_padding(ids, labels, there, where)
        ids, mask = list(compress(ids, there)), list(compress(mask, there))
    if not is_missing(positions):
        _refuse_other_positions(integers(positions, where, "position_ids"), there, where)
    if isinstance(lengths := row.get("seq_lengths"), list) and len(lengths) > 1:
        raise _several_rows(f"seq_lengths says that the row is {len(lengths)}", where)
    return Example(where, input_ids=ids, loss_mask=mask)


def _refuse_no_padding(ids: list[int], labels: list[int], there: list[bool], where: str) -> None:
    """Raise DataError where an attention_mask leaves out more than padding: ids between others, or
    such as labels train, other than one id that is repeated."""
    if not any(there):
        raise DataError("the attention_mask leaves no id of the row", where=where)
    first, end = there.index(True), len(there) - there[::-1].index(True)
    if not all(there[first:end]):
        raise DataError(
            f"the attention_mask leaves out position {there.index(False, first)}, between others",
            where=where,
            ways_out=["a row is read whole, up to its padding: leave such ids out of it"],
        )
    left_out = {id for id, kept in zip(ids, there, strict=True) if not kept}
    trained = [i for i, kept in enumerate(there) if not kept and labels[i] != IGNORE]
    if trained and len(left_out) > 1:
        raise DataError(
            f"the label at position {trained[0]} trains an id that the attention_mask leaves out",
            where=where,
            ways_out=[f"attention_mask 1 there, or label {IGNORE}"],
        )


def _refuse_other_positions(positions: list[int], there: list[bool], where: str) -> None:
    """Raise DataError where position_ids do not count a row's ids from 0: several rows in one."""
    kept = list(compress(positions, there))
    if len(positions) == len(there) and kept == list(range(len(kept))):
        return
    found = ", ".join(map(str, kept[:8])) + (", ..." if len(kept) > 8 else "")
    raise _several_rows("position_ids do not count the ids of the row from 0", where, found)


def _several_rows(what: str, where: str, found: str = "") -> DataError:
    return DataError(
        f"{what}: rows that were packed elsewhere are not kept apart here",
        where=where,
        found=found,
        ways_out=["a row for each sequence; --packing true packs them, kept apart"],
    )


_READERS: dict[str, Callable[[dict[str, Any], str, frozenset[str]], Example]] = {
    "messages": _from_messages,
    "sharegpt": _from_sharegpt,
    "alpaca": _from_alpaca,
    "qa": _from_qa,
    "prompt": _from_prompt,
    "turns": _from_turns,
    "text": _from_text,
    "input_ids": _from_ids,
}

"""Tests of `data.readers`."""

import datetime
import decimal
import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from halfbyte.config.options import DataOptions
from halfbyte.data.dataset import read_data
from halfbyte.data.formats import read_examples
from halfbyte.data.readers import read_rows
from halfbyte.errors import DataError

from ..helpers import A, Q

GOOD = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("lines", "line", "message"),
    [
        ([b"", b'{"prompt": "a",'], 2, "not valid JSON"),
        ([b'{"prompt": "a", "completion": 3}'], 2, "must be a string"),
        ([b'{"prompt": "a"}'], 2, "must be a string"),
        ([b'{"prompt": "a", "completion": "\xff"}'], 2, "not UTF-8"),
        ([b"[1]"], 2, "must be a JSON object"),
        ([b'{"prompt": "a", "completion": ""}'], 2, "completion is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines: list[bytes], line: int, message: str):
    path = tmp_path / "rows.jsonl"
    first = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([first, *(part for part in lines if part)]) + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        read_examples(path)
    assert caught.value.where.startswith(f"{path}:{line}")


def test_line_separators_inside_strings_are_no_line_ends(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        json.dumps({"prompt": "a\u2028b", "completion": "c"}, ensure_ascii=False) + "\n" * 3
    )
    (example,) = read_examples(path).rows
    assert example.prompt == "a\u2028b"


def test_arrays_name_the_line_of_the_element(tmp_path: Path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([GOOD, GOOD, {"prompt": 3, "completion": "x"}], indent=1))
    with pytest.raises(DataError, match="must be a string") as caught:
        read_examples(path)
    assert caught.value.where == f"{path}:10"
    path.write_text(json.dumps([GOOD, GOOD])[:-1])
    with pytest.raises(DataError, match="cut off"):
        read_examples(path)
    path.write_text(json.dumps([GOOD]) + "\n" + json.dumps([GOOD]))
    with pytest.raises(DataError, match="text follows"):
        read_examples(path)


def test_empty_files_and_directories(tmp_path: Path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no rows"):
        read_examples(tmp_path / "empty.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="is a directory without data files"):
        read_examples(tmp_path / "folder")
    with pytest.raises(DataError, match="cannot read"):
        read_examples(tmp_path / "absent.jsonl")


def test_csv_tsv_parquet_and_gzip_give_the_same_rows(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [{"prompt": 'say "a, b"\nnow', "completion": "c"}, {"prompt": "d", "completion": "é"}]
    (tmp_path / "r.csv").write_text('prompt,completion\n"say ""a, b""\nnow",c\nd,é\n')
    (tmp_path / "r.tsv").write_text('prompt\tcompletion\n"say ""a, b""\nnow"\tc\nd\té\n')
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(lines[:20]) + gzip.compress(lines[20:]))
    (tmp_path / "r.json").write_text(json.dumps(rows))
    for name in ("r.csv", "r.tsv", "r.parquet", "r.jsonl.gz", "r.json"):
        found = read_examples(tmp_path / name)
        assert [{"prompt": r.prompt, "completion": r.completion} for r in found.rows] == rows, name
    assert read_examples(tmp_path / "r.csv").rows[1].where == f"{tmp_path / 'r.csv'}:4", (
        "the second row's first line"
    )


def test_nested_columns_of_parquet_and_json_cells_of_csv(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist([{"messages": [Q, A]}]), tmp_path / "m.parquet")
    assert read_examples(tmp_path / "m.parquet").rows[0].messages == [Q, A]
    cell = json.dumps([Q, A]).replace('"', '""')
    (tmp_path / "m.csv").write_text(f'messages\n"{cell}"\n')
    assert read_examples(tmp_path / "m.csv").rows[0].messages == [Q, A]


def test_parquet_with_odd_types_names_the_row(tmp_path: Path):
    import datetime

    import pyarrow as pa
    from pyarrow import parquet

    path = tmp_path / "odd.parquet"
    parquet.write_table(
        pa.Table.from_pylist([{"prompt": "a", "completion": datetime.datetime(2020, 1, 1)}]), path
    )
    with pytest.raises(DataError, match="'completion' must be a string") as caught:
        read_examples(path)
    assert caught.value.where == f"{path} row 1" and caught.value.found == "a datetime"
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match="cannot read the parquet file"):
        read_examples(path)


@pytest.mark.parametrize(
    ("name", "content", "message", "line"),
    [
        ("r.csv", b"prompt,completion\na,b,c\n", "3 cells under a header of 2", ":2"),
        ("r.csv", b"prompt,prompt\na,b\n", "occurs twice", ":1"),
        ("r.csv", b'prompt,completion\na,"b\n', "not valid CSV", ":2"),
        ("r.jsonl.gz", gzip.compress(b"{}" * 100, mtime=0)[:-9], "cut off", ""),
        ("r.jsonl", b'{"text": "a"}\n\xff\n', "not UTF-8", ":2"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str, line: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_examples(tmp_path / name)
    assert caught.value.where.startswith(f"{tmp_path / name}{line}" if line else "")


def test_bombs_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from halfbyte.data import packed

    monkeypatch.setattr(packed, "UNPACKED_LIMIT", 1 << 20)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b" " * (3 << 20)))
    with pytest.raises(DataError, match="unpacks to more than"):
        read_examples(tmp_path / "b.jsonl.gz")


def test_names_that_are_neither_file_nor_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import datasets

    def load_dataset(*arguments: Any, **more: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match="neither a file nor a Hub data set"):
        read_examples("no-such-owner/no-such-data")


def test_a_hub_data_set_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The network is not here: the library's loader is given a local table instead."""
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> Any:
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"messages": [Q, A]}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_examples("owner/name", config="c", split="test")
    assert asked == [("owner/name", "c", "test")] and found.rows[0].messages == [Q, A]
    assert found.rows[0].where == "owner/name[test] row 1"


def test_skip_bad_counts_and_has_a_limit(tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "a"}\n{nope\n{"text": 3}\n[1]\n{"text": "b"}\n')
    found = read_examples(path, skip_bad=3)
    assert [r.completion for r in found.rows] == ["a", "b"]
    assert [error.where.rsplit(":")[1] for error in found.bad] == ["2", "3", "4"]
    with pytest.raises(DataError, match="JSON object, not a list"):
        read_examples(path, skip_bad=2)


def test_rows_of_an_array_on_one_line_are_told_apart(tmp_path: Path):
    (tmp_path / "r.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}, {"text": "c"}]))
    places = [row.where for row in read_examples(tmp_path / "r.json").rows]
    path = tmp_path / "r.json"
    assert places == [f"{path}:1", f"{path}:1 item 2", f"{path}:1 item 3"]


ROWS = [{"prompt": "a\nb", "completion": "é"}, {"prompt": "c", "completion": "d"}]


def places(path: Path | str, **more: Any) -> tuple[list[dict[str, str]], list[str]]:
    rows = read_examples(path, **more).rows
    return (
        [{"prompt": row.prompt, "completion": row.completion} for row in rows],
        [row.where.removeprefix(str(path)) for row in rows],
    )


def test_packed_files_are_read_whatever_packs_them(tmp_path: Path):
    import bz2
    import lzma
    import zipfile

    import pyarrow

    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "r.jsonl.bz2").write_bytes(bz2.compress(lines))
    (tmp_path / "r.jsonl.xz").write_bytes(lzma.compress(lines))
    (tmp_path / "r.jsonl.zst").write_bytes(pyarrow.compress(lines, "zstd", asbytes=True))
    (tmp_path / "r.csv.gz").write_bytes(gzip.compress(b"prompt,completion\nc,d\n"))
    with zipfile.ZipFile(tmp_path / "r.zip", "w") as archive:
        archive.writestr("in/r.jsonl", lines)
        archive.writestr("__MACOSX/._r.jsonl", b"junk")
        for name in ("in/r.csv", "in/s.csv"):
            archive.writestr(name, "prompt,completion\nc,d\n")
    for name in ("r.jsonl.bz2", "r.jsonl.xz", "r.jsonl.zst"):
        assert places(tmp_path / name) == (ROWS, [":1", ":2"]), name
    assert places(tmp_path / "r.csv.gz")[0] == ROWS[1:]
    assert places(tmp_path / "r.zip") == (
        [*ROWS, ROWS[1], ROWS[1]],
        ["/in/r.jsonl:1", "/in/r.jsonl:2", "/in/r.csv:2", "/in/s.csv:2"],
    )
    for name, whole in (("r.jsonl.xz", lzma.compress(lines)), ("r.jsonl.bz2", bz2.compress(lines))):
        (tmp_path / name).write_bytes(whole[:-9])
        with pytest.raises(DataError, match=r"cut off|damaged"):
            read_examples(tmp_path / name)


def test_json_that_is_not_a_row_a_line(tmp_path: Path):
    one, several, wrapped = (tmp_path / f"{n}.json" for n in ("one", "several", "wrapped"))
    one.write_text(json.dumps(ROWS[0], indent=1))
    assert places(one) == (ROWS[:1], [":1"])
    several.write_text("\n".join(json.dumps(row, indent=1) for row in ROWS))
    assert places(several) == (ROWS, [":1", ":5"])
    for text in (json.dumps({"version": 1, "data": ROWS}, indent=1), json.dumps({"data": ROWS})):
        wrapped.write_text(text)
        assert places(wrapped) == (ROWS, [" data[0]", " data[1]"])
    wrapped.write_text(json.dumps({"train": ROWS, "test": ROWS[:1]}))
    assert places(wrapped, split="test")[0] == ROWS[:1]
    with pytest.raises(DataError, match="under several keys") as caught:
        read_examples(wrapped, split="dev")
    assert caught.value.found == "train, test"
    several.write_text(several.read_text()[:-4])
    with pytest.raises(DataError, match="not valid JSON"):
        read_examples(several)
    # a damaged first line is that row's, and a row's own list of objects is no file of rows
    first = {"question": "a", "answer": "b", "choices": [{"c": 1}]}
    for bad in ('{"question": "a", "answer": "b', '{"question": "a",', "x" * 100):
        several.write_text(f"{bad}\n{json.dumps(first)}\n")
        found = read_examples(several, skip_bad=1)
        assert [row.where for row in found.rows] == [f"{several}:2"] and len(found.bad) == 1
    several.write_text(json.dumps(first))
    assert read_examples(several).format == "qa"
    conversation = tmp_path / "c.json"
    conversation.write_text(json.dumps({"messages": [Q, A]}))
    assert read_examples(conversation).format == "messages"


def test_delimiters_are_those_of_the_header(tmp_path: Path):
    for number, text in enumerate(
        ("prompt;completion\nc;d\n", "prompt, completion\nc, d\n", "prompt\tcompletion\nc\td\n")
    ):
        (tmp_path / f"{number}.csv").write_text(text)
        assert places(tmp_path / f"{number}.csv")[0] == ROWS[1:]


def test_folders_patterns_saved_sets_and_several_sources(tmp_path: Path):
    import datasets
    import pyarrow as pa
    from pyarrow import feather

    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for name, row in (("a.jsonl", ROWS[0]), ("deep/b.json", ROWS[1])):
        (folder / name).write_text(json.dumps(row))
    (folder / "README.md").write_text("# not data")
    assert places(folder)[0] == ROWS
    assert places(f"{folder}/**/*.js*")[0] == ROWS
    assert places(f"{folder}/a.jsonl:2\n{folder}/deep/b.json")[0] == [ROWS[0], ROWS[0], ROWS[1]]
    twice = read_examples(f"{folder}/a.jsonl\n{folder}/a.jsonl:2").rows
    twice += read_examples(f"{folder}\n{folder}/a.jsonl").rows[1:]
    assert len({row.where for row in twice[:3]}) == 3, "every row has a place of its own"
    assert len({row.where for row in twice[3:]}) == 2
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert places(tmp_path / "saved")[0] == ROWS
    parts = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    parts.save_to_disk(tmp_path / "parts")
    assert places(tmp_path / "parts")[0] == ROWS
    with pytest.raises(DataError, match="has no part 'test'"):
        read_examples(tmp_path / "parts", split="test")
    feather.write_feather(pa.Table.from_pylist(ROWS), tmp_path / "r.feather")
    assert places(tmp_path / "r.feather")[0] == ROWS
    (tmp_path / "book.txt").write_text("once upon a time")
    assert read_examples(tmp_path / "book.txt").rows[0].completion == "once upon a time"
    with pytest.raises(DataError, match="no file fits"):
        read_examples(f"{folder}/*.none")


def test_a_row_of_megabytes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from halfbyte.data import json_rows

    monkeypatch.setattr(json_rows, "LONGEST_LINE", 2 << 20)
    path = tmp_path / "r.jsonl"
    path.write_text('{"text": "a"}\n' + json.dumps({"text": "b" * (5 << 20)}) + '\n{"text": "c"}\n')
    found = read_examples(path, skip_bad=1)
    assert [row.completion for row in found.rows] == ["a", "c"]
    assert found.bad[0].what.startswith("a row of 5 MB") and found.bad[0].where == f"{path}:2"
    path.write_text(json.dumps({"text": "b" * (5 << 20)}) + '\n{"text": "c"}\n')
    assert read_examples(path, skip_bad=1).bad[0].where == f"{path}:1", "the first one, too"


def test_nulls_that_columns_filled_in_are_no_values(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    calls = [
        {"type": "function", "function": {"name": "n", "arguments": {"leaf": "green"}}},
        {"type": "function", "function": {"name": "n", "arguments": {"zone": "x"}}},
    ]
    rows = [
        {"messages": [Q, {"role": "assistant", "content": "", "tool_calls": [call]}]}
        for call in calls
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tables, lines = (read_examples(tmp_path / name).rows for name in ("r.parquet", "r.jsonl"))
    assert [row.messages for row in tables] == [row.messages for row in lines]


def test_what_json_has_no_word_for_is_text(tmp_path: Path, stories: Path):
    """A time in each turn, as tables of real conversations have it."""
    when = datetime.datetime(2026, 1, 2, 3, 4, tzinfo=datetime.UTC)
    more = {"at": when, "day": when.date(), "cost": decimal.Decimal("1.5"), "raw": b"x"}
    talk = [{**Q, **more}, {**A, **more}]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk}]), tmp_path / "r.parquet")
    data = read_data(str(tmp_path / "r.parquet"), DataOptions(), stories)
    example = data.train.rows[0].example
    assert example and example.messages
    turn = example.messages[0]
    assert turn["at"] == "2026-01-02T03:04:00+00:00" and turn["day"] == "2026-01-02"
    assert turn["cost"] == 1.5 and turn["raw"] == "<bytes>"
    assert "yo" in data.renderer.tokenizer.decode(data.train.rows[0].input_ids)


def test_a_row_may_be_nothing_but_its_messages(tmp_path: Path):
    ours, theirs = [Q, A], [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    file = tmp_path / "r.json"
    for text in (
        json.dumps([ours, theirs]),
        json.dumps([ours, theirs], indent=1),
        f"{json.dumps(ours)}\n{json.dumps(theirs)}\n",
        f"\n{json.dumps(ours)}\n\n{json.dumps(theirs)}",
    ):
        file.write_text(text)
        rows = [row for _, row in read_rows(file)]
        assert rows == [{"messages": ours}, {"conversations": theirs}]
    file.write_text(json.dumps([[1, 2], [], ["a"], [{"a": 1}]]))
    refused: list[DataError] = []
    assert not list(read_rows(file, refuse=refused.append)) and len(refused) == 4


def test_an_array_on_one_line_is_an_array(tmp_path: Path):
    (tmp_path / "r.json").write_text(json.dumps([{"text": "a"}, {"text": "b"}]) + "\n\n")
    assert [row["text"] for _, row in read_rows(tmp_path / "r.json")] == ["a", "b"]

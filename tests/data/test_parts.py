"""Tests of `data.parts`."""

import json
import zipfile
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from halfbyte.config.options import DataOptions
from halfbyte.data.dataset import data_lines, examples_of, read_data, source_digest
from halfbyte.data.parts import of_part, part_of
from halfbyte.data.readers import files_left_out, files_of, read_rows
from halfbyte.errors import DataError

from ..helpers import A, Q


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train.jsonl", "train"),
        ("train-00000-of-00002.parquet", "train"),
        ("my_dev_set.json", "validation"),
        ("en/valid/0001.jsonl", "validation"),
        ("test.jsonl", "test"),
        ("eval.csv", "test"),
        ("latest.jsonl", ""),
        ("constraint.json", ""),
        ("train_and_test.jsonl", ""),
        ("chats.jsonl", ""),
    ],
)
def test_names_say_parts_as_words(name: str, part: str):
    assert part_of(name) == part


def test_files_of_one_part_are_taken():
    names = ["train.jsonl", "valid.jsonl", "test.jsonl", "more.jsonl"]
    assert of_part(names, "train", "x") == [0, 3]
    assert of_part(names, "dev", "x") == of_part(names, "validation", "x") == [1]
    assert of_part(["a.jsonl", "b.jsonl"], "train", "x") == [0, 1]
    assert of_part(["a.jsonl", "test.jsonl"], "train", "x") == [0]
    assert of_part(["test-1.jsonl", "test-2.jsonl"], "train", "x") == [0, 1], "all there is"
    with pytest.raises(DataError, match="no part 'other'") as caught:
        of_part(names, "other", "the folder x")
    assert "--dataset_train_split test" in str(caught.value)
    with pytest.raises(DataError, match="no part 'train'"):
        of_part(names[1:3], "train", "the folder x")


def test_parts_may_have_names_of_their_own():
    names = ["train_sft.jsonl", "train_gen.jsonl", "test_sft-00000-of-00001.jsonl"]
    assert of_part(names, "train_sft", "x") == [0] and of_part(names, "test_sft", "x") == [2]
    assert of_part(names, "train", "x") == [0, 1]


def test_a_saved_set_is_read_by_its_own_names(tmp_path: Path, stories: Path):
    rows = Dataset.from_list([{"messages": [Q, A]}])
    saved = DatasetDict({"train_sft": rows, "test_sft": rows, "dev": rows})
    saved.save_to_disk(str(tmp_path / "saved"))
    options = DataOptions(dataset_train_split="train_sft")
    assert len(read_data(str(tmp_path / "saved"), options, stories).train.rows) == 1
    assert not files_left_out(str(tmp_path / "saved"), "train_sft")
    assert source_digest(examples_of(str(tmp_path / "saved"), options))


def talk(answer: str) -> str:
    return json.dumps({"messages": [Q, {**A, "content": answer}]}) + "\n"


def test_a_folder_of_parts_is_trained_on_one_and_that_is_said(tmp_path: Path, stories: Path):
    folder = tmp_path / "test set"  # whose own name says nothing
    folder.mkdir()
    for part in ("train", "valid", "test"):
        (folder / f"{part}.jsonl").write_text(talk(part))
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"data/{file.name}")
    for source in (str(folder), f"{folder}/*.jsonl", str(tmp_path / "all.zip")):
        for split, answer in (("train", "train"), ("valid", "valid"), ("eval", "test")):
            rows = [row for _, row in read_rows(source, split=split)]
            assert [row["messages"][1]["content"] for row in rows] == [answer]
        assert len(files_left_out(source, "train")) == 2
        data = read_data(source, DataOptions(), stories)
        assert len(data.train.rows) == 1
        said = "\n".join(data_lines(data))
        assert "2 files of other parts" in said and "test.jsonl" in said
    # what is not read does not make another run of it
    before = source_digest(examples_of(str(folder), DataOptions()))
    (folder / "test.jsonl").write_text(talk("another"))
    assert source_digest(examples_of(str(folder), DataOptions())) == before
    assert files_of(str(folder)) == [folder / "train.jsonl"]
    assert files_of(str(folder / "test.jsonl")), "a file that is named is what was meant"

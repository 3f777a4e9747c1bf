"""Tests of `planning.budget`."""

from pathlib import Path

import pytest

from halfbyte.cli import run
from halfbyte.errors import UsageError
from halfbyte.planning.budget import parse_size

from ..helpers import GIB, limited_training

SIZES = {"24GiB": 24 * GIB, "16 GB": 16 * 10**9, "8": 8 * GIB, "500MiB": 500 << 20, "1.5g": 3 << 29}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes_as_people_write_them(text: str, size: int):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "a lot", "-3GiB", "0", "rtx-9999", "1.2.3GiB"])
def test_no_size(text: str):
    with pytest.raises(UsageError, match="fit_to"):
        parse_size(text)


def test_a_card_is_no_budget_for_a_cpu(middling_model: tuple[Path, Path], tmp_path: Path):
    model, rows = middling_model
    assert (
        run(
            limited_training(
                model, rows, tmp_path / "run", "--fit_to", "rtx-4090", "--device", "cpu"
            )
        )
        == 2
    )

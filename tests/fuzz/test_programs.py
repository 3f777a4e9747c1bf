"""A sample of the fuzzer's programs; `make fuzz MINUTES=60` draws more."""

import ast
from pathlib import Path

import pytest
from hypothesis import given, settings

from .__main__ import Tally, search
from .judge import judge
from .program import Program, from_json, programs

CASES = sorted((Path(__file__).parent / "cases").glob("*.json"))
"""Programs that once differed, as small as they could be made."""


@settings(max_examples=50, deadline=None)
@given(programs())
def test_a_program_is_read_as_it_was_written(program: Program):
    assert from_json(program.to_json()) == program


def test_the_oracle_shares_no_code_with_what_it_judges():
    tree = ast.parse((Path(__file__).parent / "oracle.py").read_text())
    named = [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    named += [
        f"{'.' * node.level}{node.module}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
    ]
    assert ".program" in named and not any("halfbyte" in name for name in named)


def test_a_sample_of_programs_is_equal_or_refused(tmp_path_factory: pytest.TempPathFactory):
    """Six programs of one seed; at least four are compared to the end."""
    tally, home = Tally(), tmp_path_factory.mktemp("fuzz")
    found = search(20, 6, home, tally, float("inf"), shrink=False)
    assert found is None, f"{tally.report()}\n{found.to_json()}"
    assert tally.ends["equal"] >= 4, tally.report()


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_what_once_differed_does_not(case: Path, tmp_path: Path):
    assert judge(from_json(case.read_text()), tmp_path).how == "equal"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1000, 1010))
def test_more_programs_are_equal_or_refused(seed: int, tmp_path_factory: pytest.TempPathFactory):
    found = search(seed, 20, tmp_path_factory.mktemp("fuzz"), Tally(), float("inf"))
    assert found is None, found.to_json()

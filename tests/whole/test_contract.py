"""Of random trainings none exceeds its plan, measured from outside its process."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def contract(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("contract", BENCH / "contract.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "contract", module)
    spec.loader.exec_module(module)
    return module


def test_the_same_seed_draws_the_same_training(contract: Any):
    assert contract.draw(3) == contract.draw(3) != contract.draw(4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_a_training_keeps_to_its_plan(contract: Any, tmp_path: Path, seed: int):
    case = contract.draw(seed)
    model, rows = contract.make_model(case, tmp_path), contract.make_rows(case, tmp_path)
    found = contract.hold(model, rows, case.options, tmp_path / "run")
    assert "failed" not in found, found
    assert found["ratio"] <= contract.OVER, found

"""Each known silent fault, put back, is noticed by the tests it names (`tests/tools/put_back`)."""

import ast
from pathlib import Path

import pytest

from ..tools.put_back import ROOT, Fault, noticed, read_faults

FAULTS = read_faults()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_put_back(fault: Fault):
    """Its edits still fit the sources, and its tests exist."""
    assert fault.what and fault.tests and fault.edits
    for edit in fault.edits:
        text = Path(ROOT / edit.file).read_text()
        assert text.count(edit.old) == 1 and edit.old != edit.new, edit.file
        ast.parse(text.replace(edit.old, edit.new))
    for test in fault.tests:
        path, _, name = test.partition("::")
        defined = ast.walk(ast.parse((ROOT / path).read_text()))
        names = {node.name for node in defined if isinstance(node, ast.FunctionDef)}
        assert name.partition("[")[0] in names, test


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_that_is_put_back_is_noticed(fault: Fault):
    ends = noticed(fault)
    assert set(ends.values()) <= {"failed", "skipped"}, ends
    if "failed" not in ends.values():
        pytest.skip("its tests need ../shared, which is not here")

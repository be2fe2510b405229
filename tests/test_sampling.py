"""The slices of the long tests cover all of them and are reproducible."""

import re
from pathlib import Path

from tests.sampling import SLICES, slice_of

ROOT = Path(__file__).parent.parent


def test_a_test_is_in_one_slice_on_any_worker():
    # Python's own hash() would differ from process to process.
    names = [f"tests/test_usp_grid.py::test_grid[cell-{n}]" for n in range(7)]
    assert [slice_of(name) for name in names] == [27, 8, 20, 19, 11, 28, 23]
    many = [slice_of(f"test[{n}]") for n in range(2800)]
    counts = [many.count(k) for k in range(1, SLICES + 1)]
    assert sum(counts) == 2800 and min(counts) > 70


def test_the_makefile_and_the_weekly_workflow_name_every_slice():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    (listed,) = re.findall(r"slice: \[([\d,\s]+)\]", workflow)
    assert [int(k) for k in listed.split(",")] == list(range(1, SLICES + 1))
    makefile = (ROOT / "Makefile").read_text()
    assert f"one of {SLICES} slices of the long tests: SLICE=1 to {SLICES}" in makefile

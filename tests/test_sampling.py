"""The slices of the long tests cover all of them and are reproducible."""

from pathlib import Path

from tests.sampling import SLICES, slice_of

ROOT = Path(__file__).parent.parent


def test_a_test_is_in_one_slice_on_any_worker():
    # Python's own hash() would differ from process to process.
    names = [f"tests/test_usp_grid.py::test_grid[cell-{n}]" for n in range(7)]
    assert [slice_of(name) for name in names] == [13, 8, 6, 5, 11, 14, 9]
    assert [slice_of(f"{name}@a-group") for name in names] == [*map(slice_of, names)]
    many = [slice_of(f"test[{n}]") for n in range(1400)]
    counts = [many.count(k) for k in range(1, SLICES + 1)]
    assert sum(counts) == 1400 and min(counts) > 70

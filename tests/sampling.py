"""Which of many alike cases `make test` runs; `make test-all` runs them all."""

import hashlib
import itertools
import re

import pytest

SLICES = 7


def slice_of(node_id: str) -> int:
    """The slice of the long tests that a test is in: 1 to 7, the same everywhere."""
    # pytest-xdist adds the name of a group to the ids of its tests.
    plain = re.sub(r"@[\w-]+$", "", node_id)
    digest = hashlib.sha256(plain.encode()).digest()
    return int.from_bytes(digest[:8], "big") % SLICES + 1


def in_the_default_run(test) -> list[tuple]:
    """The cells of a parametrised test that `make test` runs: those not marked long."""
    marks = {mark.name: mark for mark in test.pytestmark}
    _, params = marks["parametrize"].args
    if "long" in marks:
        return []
    return [
        param.values
        for param in params
        if "long" not in {mark.name for mark in param.marks}
    ]


def pairs(cell) -> set:
    """Every two values of a cell, each with the factor that it is of."""
    return set(itertools.combinations(enumerate(cell), 2))


def covering(cells) -> list[tuple]:
    """Some of the cells, in which every pair of values occurs that occurs in any.

    Greedy: always the first of the cells with the most pairs that are still missing.
    """
    of_cell = {cell: pairs(cell) for cell in cells}
    missing = set().union(*of_cell.values())
    sample = []
    while missing:
        best = max(of_cell, key=lambda cell: len(of_cell[cell] & missing))
        sample.append(best)
        missing -= of_cell[best]
    return sample


def thinned(*axes, keep: int):
    """The product of some axes as parameters; all but each `keep`-th are long.

    Which are kept moves by one from row to row of the product, so that they are spread
    over the values of every axis.
    """
    cells = list(itertools.product(*axes))
    row = len(axes[-1])
    params = []
    for i, cell in enumerate(cells):
        kept = (i + (i // row if row % keep == 0 else 0)) % keep == 0
        marks = () if kept else (pytest.mark.long,)
        name = "-".join(map(str, cell))
        params.append(pytest.param(*cell, marks=marks, id=name))
    return params

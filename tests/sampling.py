"""Selects the cases that `make test` runs; `make test-all` runs all of them."""

import hashlib
import itertools

import pytest

# So many that one takes minutes on two cores.
SLICES = 28


def slice_of(node_id: str) -> int:
    """The slice of the long tests that holds a test, from 1; reproducible."""
    digest = hashlib.sha256(node_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % SLICES + 1


def in_the_default_run(test) -> list[tuple]:
    """Cells of a parametrised test that `make test` runs: those not marked long."""
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
    """Pairs of values of a cell, each value with the index of its factor."""
    return set(itertools.combinations(enumerate(cell), 2))


def covering(cells) -> list[tuple]:
    """A subset of the cells that has each pair of values that any cell has.

    Greedy: repeatedly takes the first cell with the most pairs still missing.
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
    """The product of some axes as parameters; one in `keep` is run, the rest are long.

    The kept cell moves by one from row to row of the product, which spreads the kept
    cells over the values of every axis.
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

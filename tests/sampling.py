"""Which of many alike cases `make test` runs; `make test-all` runs them all."""

import hashlib
import itertools

import pytest

SLICES = 7


def slice_of(node_id: str) -> int:
    """The slice of the long tests that a test is in: 1 to 7, the same everywhere."""
    digest = hashlib.sha256(node_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") % SLICES + 1


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

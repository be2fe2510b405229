"""The op equals the oracle to 1e-10 in float64, over a grid that nobody picked from.

Every cell of MESHES x LAYOUTS x MASKS x HEADS x AXIS_TYPES is generated. `make test`
runs a sample in which every pair of values of two factors occurs; the whole grid is
`make test-all`, or `pytest tests/test_usp_grid.py -m long`.
"""

import functools
import itertools

import jax
import numpy as np
import pytest

import usp_jax
from tests.oracle import Order, assert_equal_to, expected, normal, packed, results

BATCH, LENGTH, HEAD_SIZE = 2, 32, 4

MESHES = {
    "8x1": {"ring": 8},
    "4x2": {"ring": 4, "ulysses": 2},
    "2x4": {"ring": 2, "ulysses": 4},
    "1x8": {"ulysses": 8},
    "2x2x2": {"ring": 2, "ulysses": 2, "data": 2},
}
LAYOUTS = ("contiguous", "zigzag", "striped", "data")
MASKS = {
    "causal": {"is_causal": True},
    "full": {},
    "window": {"local_window_size": (7, 2)},
    "packed": {"is_causal": True, "segment_ids": packed(BATCH, LENGTH)},
    "softcap": {"is_causal": True, "logits_soft_cap": 1.5},
}
HEADS = ((8, 8), (8, 2), (8, 1), (12, 3))
AXIS_TYPES = ("auto", "explicit")

GRID = tuple(itertools.product(MESHES, LAYOUTS, MASKS, HEADS, AXIS_TYPES))


def covering_sample(grid):
    """Cells of a grid such that every pair of values of two factors occurs in one.

    Greedy: always the first of the cells with the most pairs that are still missing.
    """

    def pairs(cell):
        return set(itertools.combinations(enumerate(cell), 2))

    of_cell = {cell: pairs(cell) for cell in grid}
    missing = set().union(*of_cell.values())
    sample = []
    while missing:
        best = max(grid, key=lambda cell: len(of_cell[cell] & missing))
        sample.append(best)
        missing -= of_cell[best]
    return tuple(sample)


SAMPLE = covering_sample(GRID)


def name(cell):
    mesh, layout, mask, (n, k), axis_type = cell
    return f"{mesh}-{layout}-{mask}-N{n}K{k}-{axis_type}"


def inputs(heads):
    n, k = heads
    kv = (BATCH, LENGTH, k, HEAD_SIZE)
    q = (BATCH, LENGTH, n, HEAD_SIZE)
    *arrays, dout, dlse = normal(0, q, kv, kv, q, q[:3], dtype="float64")
    return tuple(arrays), (dout, dlse)


@functools.cache
def oracle(mask, heads):
    return jax.tree.map(np.asarray, expected(*inputs(heads), **MASKS[mask]))


def check(cell):
    mesh_name, layout, mask, heads, axis_type = cell
    mesh = usp_jax.make_mesh(**MESHES[mesh_name], explicit=axis_type == "explicit")
    order = Order(layout, mesh, BATCH, LENGTH)
    options = dict(MASKS[mask])
    if "segment_ids" in options:
        options["segment_ids"] = order.store(options["segment_ids"])

    def attend(q, k, v):
        return usp_jax.usp_attention(
            q,
            k,
            v,
            **options,
            positions=order.positions,
            layout=layout,
            mesh=mesh,
            return_residual=True,
        )

    with jax.enable_x64(True):
        stored = jax.tree.map(order.store, inputs(heads))
        program = jax.jit(lambda *args: results(attend, *args))
        # Compiled beside jit's cache, which would keep all the grid's programs.
        actual = program.lower(*stored).compile()(*stored)
        assert_equal_to(oracle(mask, heads), jax.tree.map(order.restore, actual), 1e-10)


def test_the_grid_is_whole_and_the_sample_covers_it():
    assert len(GRID) == 5 * 4 * 5 * 4 * 2
    for i, j in itertools.combinations(range(5), 2):
        assert {(c[i], c[j]) for c in SAMPLE} == {(c[i], c[j]) for c in GRID}
    assert len(SAMPLE) <= 40


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=name(cell), marks=[pytest.mark.long] if i % 3 else [])
        for i, cell in enumerate(SAMPLE)
    ],
)
def test_sample_of_the_grid(cell):
    check(cell)


@pytest.mark.long
@pytest.mark.parametrize("cell", GRID, ids=name)
def test_grid(cell):
    check(cell)

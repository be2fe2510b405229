"""The op equals the oracle over a grid of calls, in three dtypes.

The grid is MESHES x LAYOUTS x MASKS x HEADS x AXIS_TYPES x DTYPES: 2,400 cells.
`make test` runs at most 30 of them, in which each of the 217 pairs of values of two
factors occurs at least once (asserted below); of three values together it promises
nothing. Tolerances: 1e-10 in float64, the kernels' in float32, and in bfloat16 twice
the root mean square error of one device (lse: the kernels' in float32). Each program
runs twice and must give the same bits. The 800 cells in float64, and 160 on a ring of
eight, run with `make test-all`, or `pytest tests/test_usp_grid.py -m long`.
"""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.oracle import (
    Order,
    assert_equal_to,
    assert_within_tolerances,
    expected,
    normal,
    packed,
    results,
)
from tests.sampling import covering, in_the_default_run, pairs

BATCH, LENGTH, HEAD_SIZE = 2, 32, 4

MESHES = {
    # A ring of 8, which is unrolled, compiles three times as long.
    "4x1": {"ring": 4, "data": 2},
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

DTYPES = ("float64", "float32", "bfloat16")

LONG_RING = {"8x1": {"ring": 8}}

FACTORS = (MESHES, LAYOUTS, MASKS, HEADS, AXIS_TYPES, DTYPES)
GRID = tuple(itertools.product(*FACTORS))
# Results that are rounded to 16 bits; lse is not.
ROUNDED = ("out", "dq", "dk", "dv")


def name(cell):
    mesh, layout, mask, (n, k), axis_type, dtype = cell
    return f"{mesh}-{layout}-{mask}-N{n}K{k}-{axis_type}-{dtype}"


def inputs(heads, dtype):
    n, k = heads
    kv = (BATCH, LENGTH, k, HEAD_SIZE)
    q = (BATCH, LENGTH, n, HEAD_SIZE)
    *arrays, dout, dlse = normal(0, q, kv, kv, q, q[:3], dtype=dtype)
    if dtype == "bfloat16":
        # lse is float32, so its cotangent must not be rounded to 16 bits.
        dlse = jnp.zeros(dlse.shape, "float32")
    return tuple(arrays), (dout, dlse)


@functools.cache
def oracle(mask, heads, dtype):
    """Results in float32 or wider, on the inputs as `dtype` rounds them."""
    exact = jnp.promote_types(dtype, "float32")
    arrays = jax.tree.map(lambda x: x.astype(exact), inputs(heads, dtype))
    return jax.tree.map(np.asarray, expected(*arrays, **MASKS[mask]))


def root_mean_squares(mask, heads, actual):
    """The errors of results in bfloat16."""
    exact = oracle(mask, heads, "bfloat16")
    return {
        name: np.sqrt(np.mean((np.float64(actual[name]) - exact[name]) ** 2))
        for name in ROUNDED
    }


@functools.cache
def errors_of_one_device(mask, heads):
    options = {name: x for name, x in MASKS[mask].items() if name != "segment_ids"}
    if "segment_ids" in MASKS[mask]:
        options["segment_ids"] = jnp.asarray(MASKS[mask]["segment_ids"])
    attend = functools.partial(usp_jax.flash_attention, **options, return_residual=True)
    program = jax.jit(lambda *args: results(attend, *args))
    return root_mean_squares(mask, heads, program(*inputs(heads, "bfloat16")))


def check(cell):
    mesh_name, layout, mask, heads, axis_type, dtype = cell
    sizes = (MESHES | LONG_RING)[mesh_name]
    mesh = usp_jax.make_mesh(**sizes, explicit=axis_type == "explicit")
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

    with jax.enable_x64(dtype == "float64"):
        stored = jax.tree.map(order.store, inputs(heads, dtype))
        program = jax.jit(lambda *args: results(attend, *args))
        # Compiled without jit's cache, which would keep all the grid's programs.
        compiled = program.lower(*stored).compile()
        actual = compiled(*stored)
        chex.assert_trees_all_equal(compiled(*stored), actual)
        actual = jax.tree.map(order.restore, actual)
        exact = oracle(mask, heads, dtype)
    if dtype == "float64":
        assert_equal_to(exact, actual, 1e-10)
    elif dtype == "float32":
        assert_within_tolerances(exact, actual, dtype)
    else:
        lse = {"lse": exact["lse"]}
        assert_within_tolerances(lse, {"lse": actual["lse"]}, "float32")
        one = errors_of_one_device(mask, heads)
        here = root_mean_squares(mask, heads, actual)
        assert all(here[name] <= 2 * one[name] for name in ROUNDED), (here, one)


def test_the_default_run_covers_all_217_pairs_of_values():
    assert len(GRID) == 5 * 4 * 5 * 4 * 2 * 3
    run = [cell for (cell,) in in_the_default_run(test_sample_of_the_grid)]
    covered = set().union(*map(pairs, run))
    wanted = {
        ((i, x), (j, y))
        for (i, these), (j, those) in itertools.combinations(enumerate(FACTORS), 2)
        for x, y in itertools.product(these, those)
    }
    assert covered == wanted and len(wanted) == 217
    assert len(run) <= 30


@pytest.mark.parametrize(
    "cell", [pytest.param(cell, id=name(cell)) for cell in covering(GRID)]
)
def test_sample_of_the_grid(cell):
    check(cell)


@pytest.mark.long
@pytest.mark.parametrize(
    "cell",
    [
        cell
        for cell in itertools.product(MESHES | LONG_RING, *FACTORS[1:])
        if cell[-1] == "float64"
    ],
    ids=name,
)
def test_grid(cell):
    check(cell)

"""Gathers of shards, with gradients that compile to reduce-scatters on CPUs and TPUs.

The TPU compiler turns some collectives into an all-reduce, which sends twice as many
bytes: scatters along any dim but the first, scatters whose parts are not whole tiles of
a matrix, and gathers and scatters over many devices. So scatters here are over the rows
of a matrix, and collectives over many devices are best split into several
(`groups_in_turn`). Rows are not enough if the dim was moved to the front: the compiler
may keep the layout from before, in which a part's rows are lanes, 128 to a tile.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import linear_call

# Number of devices in one collective when a gather is split into several.
AT_ONCE = 8
# Elements in a row of a tile.
LANES = 128

# Groups of an axis's devices, by their index; None is one group of all.
Groups = tuple[tuple[int, ...], ...] | None
# The collectives that make up a gather, outermost first: mesh axes and device groups.
Turns = tuple[tuple[str | tuple[str, ...], Groups], ...]


def gathered(x: jax.Array, turns: Turns, dim: int) -> jax.Array:
    """Gathers the shards over some axes along a dim; its transpose is `scattered`."""

    def gather(_: None, x: jax.Array) -> jax.Array:
        for axes, groups in reversed(turns):
            x = lax.all_gather(x, axes, axis=dim, tiled=True, axis_index_groups=groups)
        return x

    def scatter(_: None, dx: jax.Array) -> jax.Array:
        return scattered(dx, turns, dim)

    return linear_call(gather, scatter, None, x)


def scattered(x: jax.Array, turns: Turns, dim: int) -> jax.Array:
    """Sums over some axes and splits the result along a dim."""
    sizes = [len(g[0]) if g else lax.axis_size(axes) for axes, g in turns]
    parts = math.prod(sizes)
    x = jnp.moveaxis(x, dim, 0)
    length, *others = x.shape
    columns = x.size // length
    if columns % LANES and x.size % (parts * LANES) == 0:
        columns = LANES
    x = x.reshape(-1, columns)
    for (axes, groups), size in zip(turns, sizes, strict=True):
        # XLA may leave a moved dim the minor one, whose parts must be whole lanes.
        ragged = dim != 0 and x.shape[0] // size % LANES
        if ragged and x.size % (parts * LANES) == 0:
            x = x.reshape(-1, LANES)
        x = lax.psum_scatter(x, axes, tiled=True, axis_index_groups=groups)
    return jnp.moveaxis(x.reshape(length // parts, *others), 0, dim)


def groups_in_turn(size: int) -> list[Groups]:
    """The groups of an axis's devices for a split gather, outermost first.

    Groups have at most `AT_ONCE` devices if the factors of `size` allow it. The
    outermost groups are of devices far from each other, the innermost of neighbours.
    """
    factors, left = [], size
    while left > 1:
        factors.append(next((n for n in range(AT_ONCE, 1, -1) if left % n == 0), left))
        left //= factors[-1]
    if len(factors) < 2:
        return [None]
    places = np.arange(size).reshape(factors)
    moved = [np.moveaxis(places, turn, -1) for turn in range(places.ndim)]
    return [tuple(map(tuple, x.reshape(-1, x.shape[-1]).tolist())) for x in moved]

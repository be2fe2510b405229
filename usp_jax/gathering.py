"""Gathers of shards, whose gradients are reduce-scatters on every platform.

The TPU compiler makes an all-reduce, which sends twice as many bytes, of a scatter
along any dim but the first, of one whose parts are not whole tiles of a matrix, and of
gathers and scatters over many devices. So a scatter is one of a matrix's rows here; and
what goes over many devices is better taken in turns (`groups_in_turn`).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import linear_call

# So many devices gather at once where they gather in turn.
AT_ONCE = 8
# Elements in a row of a tile.
LANES = 128

# Of an axis's devices, by their places; None is all of them.
Groups = tuple[tuple[int, ...], ...] | None
# The collectives that make up one, outermost first: mesh axes, and groups of devices.
Turns = tuple[tuple[str | tuple[str, ...], Groups], ...]


def gathered(x: jax.Array, turns: Turns, dim: int) -> jax.Array:
    """The shards over some axes, put together along a dim; transposed, `scattered`."""

    def gather(_: None, x: jax.Array) -> jax.Array:
        for axes, groups in reversed(turns):
            x = lax.all_gather(x, axes, axis=dim, tiled=True, axis_index_groups=groups)
        return x

    def scatter(_: None, dx: jax.Array) -> jax.Array:
        return scattered(dx, turns, dim)

    return linear_call(gather, scatter, None, x)


def scattered(x: jax.Array, turns: Turns, dim: int) -> jax.Array:
    """The sum over some axes, split along a dim."""
    parts = 1
    for axes, groups in turns:
        parts *= len(groups[0]) if groups else lax.axis_size(axes)
    x = jnp.moveaxis(x, dim, 0)
    length, *others = x.shape
    columns = x.size // length
    if columns % LANES and x.size % (parts * LANES) == 0:
        columns = LANES
    x = x.reshape(-1, columns)
    for axes, groups in turns:
        x = lax.psum_scatter(x, axes, tiled=True, axis_index_groups=groups)
    return jnp.moveaxis(x.reshape(length // parts, *others), 0, dim)


def groups_in_turn(size: int) -> list[Groups]:
    """The groups of an axis's devices that gather in turn, outermost first.

    At most `AT_ONCE` at a time, for every size whose factors allow that: first devices
    that are far from each other, at last neighbours.
    """
    factors, left = [], size
    while left > 1:
        factors.append(next((n for n in range(AT_ONCE, 1, -1) if left % n == 0), left))
        left //= factors[-1]
    if len(factors) < 2:
        return [None]
    places = np.arange(size).reshape(factors)
    ways = [np.moveaxis(places, turn, -1) for turn in range(places.ndim)]
    return [tuple(map(tuple, way.reshape(-1, way.shape[-1]).tolist())) for way in ways]

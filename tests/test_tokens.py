"""Tokens of all ring shards, gathered once on each device."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from usp_jax.layout import shard_positions
from usp_jax.ring.tokens import gather_tokens


def test_gathers_every_shard_in_ring_order():
    """Two ring shards of two Ulysses pieces: device (r, u) holds piece 2 r + u."""
    x = jnp.arange(2 * 2 * 1 * 3, dtype=jnp.int32).reshape(2, 2, 1, 3)

    def gather(x):
        return gather_tokens(
            x,
            -x,
            layout="data",
            ring_axis="ring",
            ulysses_axis="ulysses",
            length=6,
        )

    tokens = jax.vmap(jax.vmap(gather, axis_name="ulysses"), axis_name="ring")(x)
    for device in np.ndindex(2, 2):
        mine = jax.tree.map(lambda leaf, at=device: leaf[at], tokens)
        for r in range(2):
            shard = mine.shard(r)
            chex.assert_trees_all_equal(shard.positions, x[r].reshape(1, 6))
            chex.assert_trees_all_equal(shard.segment_ids, -x[r].reshape(1, 6))


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "striped"])
def test_without_arrays_the_layout_gives_the_order_and_nothing_is_gathered(layout):
    gather = functools.partial(
        gather_tokens,
        None,
        None,
        layout=layout,
        ring_axis="ring",
        ulysses_axis=None,
        length=4,
    )

    def positions(_):
        tokens = gather()
        assert tokens.positions is None and tokens.segment_ids is None
        return jnp.stack([tokens.shard(r).positions[0] for r in range(2)])

    actual = jax.vmap(positions, axis_name="ring")(jnp.zeros(2))[0]
    expected = [shard_positions(layout, r, 2, 4) for r in range(2)]
    chex.assert_trees_all_equal(actual, jnp.stack(expected))

"""The page of a cache for windowed layers: each row keeps only its last tokens.

A page of C slots has the token at position p in slot p % C, on device p % C % P of the
P = ring · ulysses that share a sequence. A new token replaces the one C positions
before, which no later query sees as long as C is at least the window. So each row has
its own slots, whatever the other rows do, and padding has none.
"""

import jax
import jax.numpy as jnp
from jax import lax

from usp_jax.masking import PADDING, Tokens
from usp_jax.shards import Shards
from usp_jax.varying import vary_like

# Keys and values, or None for a cache whose keys are the values too.
Pair = tuple[jax.Array, jax.Array | None]


def roll(
    shards: Shards, capacity: int, kv: Pair, tokens: Tokens
) -> tuple[Pair, Tokens]:
    """Makes this device's part of a page from the prefill's shards.

    Each device puts its tokens into a page of all slots; a reduce-scatter adds these up
    and deals the slots out.

    Args:
      shards: the devices that share a sequence.
      capacity: C, a multiple of their number.
      kv: this device's keys and values, [B, s, K, H].
      tokens: their positions and segment ids, int32 [B, s].
    """
    axes = shards.split
    last = jnp.max(jnp.where(_is_real(tokens), tokens.positions, -1), 1)
    if axes:
        last = lax.pmax(last, axes)
    kept = _is_real(tokens) & (tokens.positions > last[:, None] - capacity)
    slots = jnp.where(kept, tokens.positions % capacity, capacity)
    # Absent tokens add 0, so ids are counted from 1 here.
    counted = Tokens(tokens.positions, tokens.segment_ids + 1)

    def deal(x: jax.Array) -> jax.Array:
        page = jnp.zeros_like(x, shape=(x.shape[0], capacity, *x.shape[2:]))
        page = _put(page, x, slots)
        if not axes:
            return page
        parts = shards.ring_size * shards.ulysses_size
        page = page.reshape(x.shape[0], capacity // parts, parts, *x.shape[2:])
        return lax.psum_scatter(page, axes, scatter_dimension=2, tiled=False)

    positions, ids = deal(counted.positions), deal(counted.segment_ids)
    return jax.tree.map(deal, kv), Tokens(positions, ids + PADDING)


def write_rolling(
    index: jax.Array | int,
    parts: int,
    kv: Pair,
    tokens: Tokens,
    new_kv: Pair,
    new_tokens: Tokens,
) -> tuple[Pair, Tokens]:
    """Writes this device's share of new tokens into its part of a page.

    Args:
      index: this device's index among those that share a sequence.
      parts: the number of these devices.
      kv: this device's part of the page, [B, C/P, K, H].
      tokens: its positions and segment ids.
      new_kv: keys and values of all new tokens, [B, T, K, H].
      new_tokens: their positions and segment ids.
    """
    length = tokens.positions.shape[1]
    slots = new_tokens.positions % (length * parts)
    mine = _is_real(new_tokens) & (slots % parts == index)
    slots = jnp.where(mine, slots // parts, length)

    def write(old: jax.Array, new: jax.Array) -> jax.Array:
        return _put(vary_like(old, (old, new, slots)), new, slots)

    kv = jax.tree.map(write, kv, new_kv)
    positions = write(tokens.positions, new_tokens.positions)
    return kv, Tokens(positions, write(tokens.segment_ids, new_tokens.segment_ids))


def _is_real(tokens: Tokens) -> jax.Array:
    return tokens.segment_ids != PADDING


def _put(page: jax.Array, x: jax.Array, slots: jax.Array) -> jax.Array:
    """Writes x [B, T, ...] into slots [B, T] of a page, without those past its end."""
    rows = lax.broadcasted_iota(jnp.int32, slots.shape, 0)
    return page.at[rows, slots].set(x, mode="drop")

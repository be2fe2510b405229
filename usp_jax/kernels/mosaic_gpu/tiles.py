"""Sizes and register layouts of the Hopper kernels' tiles, and operations on them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

# A Pallas reference to memory, inside a kernel.
Ref = Any

# A number that may be static.
Index = jax.Array | int

# Rows of one WGMMA, which are those of one warpgroup, and the computing warpgroups.
ROWS, COMPUTING = 64, 2
TILE = ROWS * COMPUTING

MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)


def slot_of(n: Index, stages: int) -> jax.Array:
    """Returns the buffer of a step."""
    return lax.rem(n, jnp.int32(stages)) if stages > 1 else jnp.int32(0)


def by_row(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats one value per row along the columns."""
    return lax.broadcast_in_dim(x, shape, (0,))


def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    """Fills float32 registers with one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def transposed(ref: Ref) -> Ref:
    """[m, n] -> [n, m], in shared memory"""
    return ref.transpose((1, 0))

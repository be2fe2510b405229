"""Sizes and layouts of the Hopper kernels' tiles, and what makes registers of them."""

import math
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

LOG2E = math.log2(math.e)

# Rows of one WGMMA, which are those of one warpgroup; and of a thread block's tile.
ROWS, COMPUTING = 64, 2
TILE = ROWS * COMPUTING

MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)


def slot_of(n: Any, stages: int) -> Any:
    """The buffer of a step."""
    return lax.rem(n, jnp.int32(stages)) if stages > 1 else jnp.int32(0)


def by_row(x: Any, shape: Any) -> Any:
    """Repeats one value a row along the columns."""
    return lax.broadcast_in_dim(x, shape, (0,))


def full(shape: tuple[int] | tuple[int, int], value: float | int, layout: Any) -> Any:
    """Registers of one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def transposed(ref: Any) -> Any:
    return ref.transpose((1, 0))

"""Gradient accumulation: the rows of a batch are processed in parts, in sequence."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from usp_jax.models.execution import wide

# Pytrees of arrays.
Params = TypeVar("Params")
Batch = TypeVar("Batch")
Sums = TypeVar("Sums")


def summed(
    pull: Callable[[Params, Batch], Sums], parts: int, params: Params, batch: Batch
) -> Sums:
    """Sums `pull(params, part)` over the parts of a batch.

    Only one part's activations are in memory at a time. Floats are summed in at least
    float32.

    Args:
      pull: returns a pytree of arrays to be summed.
      parts: number of parts.
      params: passed to every call of `pull`.
      batch: arrays [B, ...], B a multiple of `parts`.
    """
    if parts == 1:
        return pull(params, batch)
    # Deal the rows out in turn: each part is then split over devices as the batch is.
    batch = jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )
    part = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(_zeros, jax.eval_shape(pull, params, part))

    def add(total: Sums, part: Batch) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, pull(params, part)), None

    return lax.scan(add, zeros, batch)[0]


def _zeros(x: jax.ShapeDtypeStruct) -> jax.Array:
    """The initial value of a sum; floats are widened to at least float32."""
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.zeros(x.shape, wide(x.dtype) if is_float else x.dtype)

"""Gradient accumulation: the rows of a batch in parts, one after the other."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def summed(pull: Callable[[Any, Any], Any], parts: int, params: Any, batch: Any) -> Any:
    """The sums of what `pull(params, part)` gives over the parts of a batch.

    Memory for activations is that of one part.

    Args:
      batch: arrays [B, ...], B a multiple of `parts`.
    """
    if parts == 1:
        return pull(params, batch)
    # Rows in turn, so that every part is split over the devices as the batch is.
    batch = jax.tree.map(
        lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
    )
    part = jax.tree.map(lambda x: x[0], batch)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(pull, params, part)
    )

    def add(total: Any, part: Any) -> Any:
        return jax.tree.map(jnp.add, total, pull(params, part)), None

    return lax.scan(add, zeros, batch)[0]

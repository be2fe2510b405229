"""Queries and keys of a given length, as layers give them to the delta rule."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

# In every published model; it keeps the gradient finite at 0.
_EPSILON = 1e-6


def of_length(x: Float[Array, "... H"], length: float) -> Float[Array, "... H"]:
    """Scales the vectors of the last dim to a length, computed in at least float32.

    Args:
      x: [..., H].
      length: 1 for keys, 1 / sqrt(H) for queries.

    Returns:
      The result in the dtype of x.
    """
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(jnp.square(y), -1, keepdims=True)
    return (y * (length * lax.rsqrt(square + _EPSILON))).astype(x.dtype)

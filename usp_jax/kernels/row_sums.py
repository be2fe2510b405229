"""Making an out whose row sums with dout are given, for packages that take out."""

import jax
import jax.numpy as jnp


def out_for(delta: jax.Array, dout: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (out, dout) such that sum(out · dout, -1) = delta.

    The packages take out and compute this sum, while the contract gives delta, which
    differs from the sum of the forward's out if lse has a cotangent. The shortest such
    out is dout · delta / |dout|²; rounding it to 16 bits changes the sum less than
    rounding the forward's out does. Where dout is negligible compared with delta (only
    lse has a cotangent), a tiny dout replaces it; the error in dv is no larger than
    that.

    Args:
      delta: [B, T, N].
      dout: [B, T, N, V].

    Returns:
      Two arrays of the shape and dtype of `dout`.
    """
    dtype, wide, delta = dout.dtype, dout.astype(delta.dtype), delta[..., None]
    size = jnp.max(jnp.abs(wide), -1, keepdims=True)
    # The largest ratio of out to dout that the range of the dtype allows.
    most = 2.0 ** (15 if dtype == jnp.float16 else 40)
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    least = jnp.maximum(jnp.abs(delta) / most, smallest)
    dout = jnp.where((size < least) & (delta != 0), least, wide).astype(dtype)
    wide = dout.astype(delta.dtype)
    size = jnp.max(jnp.abs(wide), -1, keepdims=True)
    unit = wide / jnp.where(size == 0, 1, size)
    length = jnp.sum(unit * unit, -1, keepdims=True) * size
    out = unit * (delta / jnp.where(length == 0, 1, length))
    return out.astype(dtype), dout

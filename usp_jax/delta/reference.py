"""The gated delta rule by its definition, one token at a time: the oracle.

Gated Delta Networks (arXiv 2412.06464, equation 10), with the state transposed.
G = M // N.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from usp_jax.masking import PADDING


def reference_gated_delta(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T N H"],
    value: Float[Array, "B T M V"],
    *,
    log_decay: Float[Array, "B T M"],
    beta: Float[Array, "B T M"],
    segment_ids: Int[Array, "B T"] | None = None,
    initial_state: Float[Array, "B M H V"] | None = None,
) -> tuple[Float[Array, "B T M V"], Float[Array, "B M H V"]]:
    """Computes what `gated_delta` returns, for tokens in natural order.

    Computes and returns promote_types(query.dtype, float32), at the highest precision.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    groups = value.shape[2] // query.shape[2]
    batch, length = query.shape[:2]
    if segment_ids is None:
        segment_ids = jnp.zeros((batch, length), jnp.int32)
    if initial_state is None:
        shape = batch, value.shape[2], query.shape[3], value.shape[3]
        initial_state = jnp.zeros(shape, wide)

    def body(
        carry: tuple[Array, Array, Array], token: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array, Array], Array]:
        state, before, seen = carry
        q, k, v, g, b, ids = token
        real = ids != PADDING
        starts = real & seen & (ids != before)
        decayed = state * jnp.exp(g)[..., None, None]
        decayed = jnp.where(starts[:, None, None, None], 0, decayed)
        error = v - product("BMHV,BMH->BMV", decayed, k)
        new = decayed + product("BMH,BMV->BMHV", k, b[..., None] * error)
        state = jnp.where(real[:, None, None, None], new, state)
        out = product("BMHV,BMH->BMV", state, q)
        out = jnp.where(real[:, None, None], out, 0)
        return (state, ids, seen | real), out

    def product(spec: str, x: Array, y: Array) -> Array:
        return jnp.einsum(spec, x, y, precision=lax.Precision.HIGHEST)

    q, k = (jnp.repeat(x, groups, axis=2) for x in (query, key))
    floats = (x.astype(wide) for x in (q, k, value, log_decay, beta))
    tokens = [jnp.moveaxis(x, 1, 0) for x in (*floats, segment_ids)]
    nothing = segment_ids[:, 0] * 0 + PADDING, segment_ids[:, 0] != segment_ids[:, 0]
    start = (initial_state.astype(wide), *nothing)
    (state, _, _), out = lax.scan(body, start, tuple(tokens))
    return jnp.moveaxis(out, 0, 1), state

"""The oracle: attention written as its definition, O(T·S) in memory."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from usp_jax.masking import PADDING, Mask, visible


def reference_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K V"],
    mask: Mask,
    *,
    scale: float,
    logits_soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    bias: Float[Array, "#B N T S"] | None = None,
    weight_factors: Float[Array, "B N T S"] | None = None,
    also: Bool[Array, "B T S"] | None = None,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]:
    """softmax(soft_cap(scale · q kᵀ) + bias + mask) v, and its log-sum-exp.

    Computes and returns promote_types(query.dtype, float32), at the highest precision.
    Differentiable by jax. A row that sees nothing gives (0, -inf); every row but
    padding sees a sink. `weight_factors`, for dropout, multiply the softmax and do not
    affect the log-sum-exp. If `also` is given, a key must be visible in it too.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    B, T, N, H = query.shape
    q = query.astype(dtype).reshape(B, T, key.shape[2], -1, H)
    k, v = key.astype(dtype), value.astype(dtype)
    highest = lax.Precision.HIGHEST
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k, precision=highest) * scale
    if logits_soft_cap is not None:
        logits = logits_soft_cap * jnp.tanh(logits / logits_soft_cap)
    if bias is not None:
        logits += _by_group(bias, logits)
    seen = visible(mask) if also is None else visible(mask) & also
    seen = seen[:, None, None]
    # Take out rows without a visible key before the softmax, so that their derivative
    # is 0 and not NaN.
    alive = seen.any(-1)
    if sinks is not None:
        ids = mask.q.segment_ids
        padding = jnp.zeros((1, 1), bool) if ids is None else ids == PADDING
        alive = jnp.broadcast_to(~padding[:, None, None], alive.shape)
    logits = jnp.where(seen | ~alive[..., None], logits, -jnp.inf)
    if sinks is not None:
        sink = sinks.astype(dtype).reshape(1, key.shape[2], -1, 1, 1)
        sink = jnp.broadcast_to(sink, (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, sink], -1)
    lse = jax.nn.logsumexp(logits, axis=-1)
    weights = jnp.exp(logits - lse[..., None])[..., : key.shape[1]]
    weights = jnp.where(alive[..., None], weights, 0)
    if weight_factors is not None:
        weights *= _by_group(weight_factors, weights)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, precision=highest)
    lse = jnp.where(alive, lse, -jnp.inf)
    return out.reshape(B, T, N, -1), lse.transpose(0, 3, 1, 2).reshape(B, T, N)


def _by_group(x: jax.Array, like: jax.Array) -> jax.Array:
    """Reshapes [B, N, T, S] to [B, K, G, T, S] like the logits, in their dtype."""
    return x.astype(like.dtype).reshape(x.shape[0], *like.shape[1:])

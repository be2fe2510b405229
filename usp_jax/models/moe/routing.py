"""The router: which experts each token uses, and with what weights.

n is this device's number of tokens, E the number of experts, k of a token's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from usp_jax.models.execution import wide
from usp_jax.models.experts import Experts

# Checkpoint name of the chosen experts. When a layer is computed again with different
# fusions, two scores that are almost equal could change places.
IDS = "experts_ids"


class Routing(NamedTuple):
    """The experts that tokens use.

    Attributes:
      ids: int32 [n, k], the token's experts, best first; E where a token is padding.
      weights: [n, k], at least float32; 0 where a token is padding.
      scores: [n, E], at least float32, without the correction bias.
    """

    ids: Int[Array, "n k"]
    weights: Float[Array, "n k"]
    scores: Float[Array, "n E"]


def router_logits(
    x: Float[Array, "n D"],
    router: Float[Array, "D E"],
    bias: Float[Array, " E"] | None = None,
) -> Float[Array, "n E"]:
    """Computes the router's logits in at least float32, at the highest precision."""
    dtype = wide(x.dtype)
    logits = jnp.einsum(
        "ND,DE->NE", x.astype(dtype), router.astype(dtype), precision="highest"
    )
    return logits if bias is None else logits + bias.astype(dtype)[None]


def route(
    experts: Experts,
    logits: Float[Array, "n E"],
    *,
    correction: Float[Array, " E"] | None = None,
    real: Bool[Array, " n"] | None = None,
) -> Routing:
    """Chooses the experts of each token.

    Between equal scores, the expert with the smaller index is chosen. The choice has no
    gradient; the weights have.

    Args:
      experts: the description.
      logits: at least float32, from `router_logits`.
      correction: the correction bias, for `experts.correction_bias`.
      real: which tokens are not padding; None is all.

    Raises:
      ValueError: `correction` is missing, or given without `correction_bias`.
    """
    if (correction is not None) != experts.correction_bias:
        raise ValueError(
            f"correction={'None' if correction is None else 'an array'} does not fit "
            f"correction_bias={experts.correction_bias}: give a bias only with True"
        )
    softmax = experts.scores == "softmax"
    scores = jax.nn.softmax(logits) if softmax else jax.nn.sigmoid(logits)
    ids = lax.stop_gradient(_chosen(experts, scores, correction))
    ids = checkpoint_name(ids, IDS)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if experts.renormalize:
        # Sigmoids can all be 0.
        weights = weights / (jnp.sum(weights, -1, keepdims=True) + 1e-20)
    weights = weights * experts.scaling
    if real is not None:
        ids = jnp.where(real[:, None], ids, experts.num_experts)
        weights = jnp.where(real[:, None], weights, 0)
    return Routing(ids, weights, scores)


def _chosen(
    experts: Experts, scores: jax.Array, correction: jax.Array | None
) -> jax.Array:
    """The ids [n, k] of the best experts in the best groups."""
    if correction is not None:
        scores = scores + correction.astype(scores.dtype)[None]
    if experts.groups > 1:
        grouped = scores.reshape(len(scores), experts.groups, -1)
        of_groups = jnp.sum(lax.top_k(grouped, 2)[0], -1)
        best = lax.top_k(of_groups, experts.groups_per_token)[1]
        groups = lax.broadcasted_iota(jnp.int32, (1, experts.groups, 1), 1)
        allowed = jnp.any(groups == best[:, None], -1)
        scores = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(scores.shape)
    return lax.top_k(scores, experts.experts_per_token)[1].astype(jnp.int32)


def pairs_of_experts(ids: Int[Array, "..."], num_experts: int) -> Int[Array, " E"]:
    """Counts the pairs of token and expert of each expert; id E is none."""
    own = lax.broadcasted_iota(jnp.int32, (1, num_experts), 1)
    return jnp.sum(ids.reshape(-1, 1) == own, 0, dtype=jnp.int32)

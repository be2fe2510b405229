"""Statistics of the router over real tokens, and the auxiliary losses made of them.

Statistics are sums, so those of a micro-batch are the sums over its devices, however
its tokens are split, permuted or packed. The losses of their means are then the same on
every mesh. Means of each device's losses would not be.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from usp_jax.models.experts import Experts
from usp_jax.models.moe.routing import Routing, pairs_of_experts


class Statistics(NamedTuple):
    """Sums over the real tokens of one layer.

    Attributes:
      pairs: int32 [E], number of tokens that chose each expert; not less what a
        capacity drops.
      probabilities: [E], the router's probability of each expert. Sigmoid scores are
        divided by their sum.
      square_lse: the square of the log-sum-exp of the logits.
      tokens: int32, number of real tokens.
    """

    pairs: Int[Array, " E"]
    probabilities: Float[Array, " E"]
    square_lse: Float[Array, ""]
    tokens: Int[Array, ""]


class AuxiliaryLosses(NamedTuple):
    """Losses of one layer's router, without coefficients.

    Attributes:
      load_balancing: E · sum over experts of (fraction of the pairs) · (mean
        probability), eq. 4-6 of the Switch Transformer (arXiv 2101.03961). It is 1 when
        experts are equally used. transformers has k times this value.
      z: mean square of the log-sum-exp of the logits, ST-MoE (arXiv 2202.08906).
    """

    load_balancing: Float[Array, ""]
    z: Float[Array, ""]


def statistics(
    experts: Experts,
    logits: Float[Array, "n E"],
    routing: Routing,
    real: Bool[Array, " n"] | None = None,
) -> Statistics:
    """Computes the statistics of this device's tokens.

    Sum them over the devices that have different tokens (not over `tensor`), and pass
    the sums to `auxiliary_losses`.
    """
    scores = routing.scores
    if experts.scores == "sigmoid":
        scores = scores / (jnp.sum(scores, -1, keepdims=True) + 1e-20)
    squares = jnp.square(jax.nn.logsumexp(logits, -1))
    tokens = jnp.asarray(len(logits), jnp.int32)
    if real is not None:
        scores = jnp.where(real[:, None], scores, 0)
        squares = jnp.where(real, squares, 0)
        tokens = jnp.sum(real, dtype=jnp.int32)
    return Statistics(
        pairs_of_experts(routing.ids, experts.num_experts),
        jnp.sum(scores, 0),
        jnp.sum(squares),
        tokens,
    )


def auxiliary_losses(experts: Experts, sums: Statistics) -> AuxiliaryLosses:
    """Computes a layer's losses from statistics summed over all devices.

    Both are 0 without any real token. The number of pairs has no gradient. The losses
    are linear in the other sums, so a device's part of each loss is this function of
    its own probabilities and `square_lse` with the pairs and tokens of all devices.
    """
    dtype = sums.probabilities.dtype
    tokens = jnp.maximum(sums.tokens, 1).astype(dtype)
    fractions = sums.pairs.astype(dtype) / (tokens * experts.experts_per_token)
    means = sums.probabilities / tokens
    return AuxiliaryLosses(
        experts.num_experts * jnp.sum(fractions * means), sums.square_lse / tokens
    )


def updated_correction(
    correction: Float[Array, "*l E"], pairs: Int[Array, "*l E"], rate: float
) -> Float[Array, "*l E"]:
    """Updates correction biases without a loss (arXiv 2408.15664, algorithm 1).

    Args:
      correction: one layer's biases, or several layers'.
      pairs: number of tokens that chose each expert, over all devices and
        micro-batches of the step.
      rate: how far each bias moves: up if its expert was chosen less than the mean of
        its layer, down if more.
    """
    load = pairs.astype(correction.dtype)
    return correction + rate * jnp.sign(jnp.mean(load, -1, keepdims=True) - load)

"""Group relative policy optimization (GRPO, arXiv 2402.03300).

Several answers to one prompt are drawn and rewarded. An answer's advantage is its
reward relative to the others of its group; all its tokens share it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from usp_jax.models.logprobs import per_document, per_token

PerToken = Float[Array, "B T"]


class GRPOLoss(NamedTuple):
    """Sums over the tokens of a batch, by their weights.

    Attributes:
      loss: what to minimise.
      clipped: weight of the tokens that get no gradient because they are clipped.
      kl: estimated divergence of the policy from the reference, in nats; 0 without a
        reference.
    """

    loss: Float[Array, ""]
    clipped: Float[Array, ""]
    kl: Float[Array, ""]


def group_advantages(rewards: Float[Array, "G N"]) -> Float[Array, "G N"]:
    """Normalises rewards by the mean and standard deviation of their group.

    Args:
      rewards: [G, N], of N answers to each of G prompts.

    Returns:
      [G, N]; 0 in a group whose rewards are all equal.
    """
    centered = rewards - jnp.mean(rewards, 1, keepdims=True)
    deviation = jnp.sqrt(jnp.mean(jnp.square(centered), 1, keepdims=True))
    # Equal rewards may differ from their mean by rounding.
    differ = deviation > 1e-6 * jnp.max(jnp.abs(rewards), 1, keepdims=True)
    return jnp.where(differ, centered / jnp.where(differ, deviation, 1), 0)


def document_weights(
    mask: Bool[Array, "B T"], segment_ids: Int[Array, "B T"], documents: int
) -> PerToken:
    """Weighs tokens so that all documents weigh the same, and all tokens of one do.

    These are the weights of equation 3: the mean over answers of the mean over their
    tokens.

    Args:
      mask: [B, T], the tokens that count.
      segment_ids: int32 [B, T], ids of documents from 0, -1 for padding.
      documents: number of documents of a row.

    Returns:
      [B, T]; the weights of the batch add up to 1, or to 0 if no token counts.
    """
    lengths = per_document(mask.astype(float), segment_ids, documents)
    number = jnp.maximum(jnp.sum(lengths > 0), 1)
    each = 1 / (jnp.maximum(lengths, 1) * number)
    return jnp.where(mask, per_token(each, segment_ids), 0)


def grpo_loss(
    logprobs: PerToken,
    old_logprobs: PerToken,
    advantages: PerToken,
    weights: PerToken,
    *,
    clip: float | int = 0.2,
    reference_logprobs: PerToken | None = None,
    kl_weight: float | int = 0.0,
) -> GRPOLoss:
    """Computes the clipped loss of equation 3 of arXiv 2402.03300.

    With r = exp(logprobs - old_logprobs), it is the weighted sum over tokens of
    -min(r · A, clip(r, 1 - clip, 1 + clip) · A) + kl_weight · D. D is the estimate of
    equation 4, exp(d) - d - 1 with d = reference_logprobs - logprobs. Only `logprobs`
    gets a gradient.

    Args:
      logprobs: [B, T], of the tokens under the policy.
      old_logprobs: [B, T], under the policy that drew them.
      advantages: [B, T]; `per_token` gives each token that of its document.
      weights: [B, T], of each token in the sum, 0 for those that do not count:
        `document_weights` for a mean over answers, `mask / jnp.sum(mask)` for a mean
        over tokens.
      clip: the largest useful change of a probability, as a ratio.
      reference_logprobs: [B, T], under the reference model.
      kl_weight: weight of D; with 0, a reference only measures it.

    Raises:
      ValueError: the shapes differ, `clip` is not positive, or `kl_weight` is negative,
        or positive without a reference.
    """
    arrays = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "weights": weights,
        "reference_logprobs": reference_logprobs,
    }
    for name, x in arrays.items():
        if x is not None and x.shape != logprobs.shape:
            raise ValueError(
                f"{name}.shape={x.shape} must be {logprobs.shape}, like logprobs"
            )
    if not clip > 0:
        raise ValueError(f"{clip=} must be positive")
    if not kl_weight >= 0:
        raise ValueError(f"{kl_weight=} must be 0 or positive")
    if kl_weight and reference_logprobs is None:
        raise ValueError(f"{kl_weight=} needs reference_logprobs, but they are None")
    advantages, weights = lax.stop_gradient((advantages, weights))
    counts = weights != 0

    def difference(x: jax.Array, y: jax.Array) -> jax.Array:
        # What does not count may be anything, such as -inf.
        return jnp.where(counts, x, 0) - jnp.where(counts, y, 0)

    ratio = jnp.exp(difference(logprobs, lax.stop_gradient(old_logprobs)))
    free = ratio * advantages
    bound = jnp.clip(ratio, 1 - clip, 1 + clip) * advantages
    values = -jnp.minimum(free, bound)
    kl = jnp.zeros_like(ratio)
    if reference_logprobs is not None:
        d = difference(lax.stop_gradient(reference_logprobs), logprobs)
        kl = jnp.expm1(d) - d

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(counts, weights * x, 0))

    return GRPOLoss(total(values + kl_weight * kl), total(bound < free), total(kl))

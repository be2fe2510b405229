"""Direct preference optimization (arXiv 2305.18290).

A packed row holds a prompt with its chosen answer as one document, and the prompt with
the rejected answer as another. The prompts' tokens have no labels:

    labels = shift_labels(jnp.where(is_answer, tokens, -1), segment_ids)
    policy = logprobs(model, tokens, segment_ids, labels=labels).logprobs
    policy = per_document(policy, segment_ids, documents)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class DPOLoss(NamedTuple):
    """Means over all pairs of a batch, and their number; all 0 without pairs.

    Attributes:
      loss: equation 7 of arXiv 2305.18290, in nats.
      accuracy: fraction of pairs whose chosen answer has the higher reward.
      margin: reward of the chosen answer minus that of the rejected one, where a reward
        is beta · (log-prob of the policy - log-prob of the reference).
      pairs: int32, number of pairs, which weighs the means of several batches.
    """

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    margin: Float[Array, ""]
    pairs: Int[Array, ""]


def dpo_loss(
    policy: Float[Array, "B documents"],
    reference: Float[Array, "B documents"],
    pairs: Int[Array, "B P 2"],
    *,
    beta: float | int = 0.1,
) -> DPOLoss:
    """Computes -log sigmoid(margin), averaged over pairs (equation 7).

    Args:
      policy: log-prob of each document's answer, from `per_document`.
      reference: the same under the reference model; it gets no gradient.
      pairs: for each pair, the documents of the chosen and of the rejected answer, both
        in this row; negative for no pair. An id that is not one of the documents makes
        the loss NaN.
      beta: strength of the pull towards the reference.

    Raises:
      ValueError: a shape does not fit, or beta is not positive.
    """
    _check(policy, reference, pairs)
    if not beta > 0:
        raise ValueError(f"{beta=} must be positive")
    rewards = beta * (policy - lax.stop_gradient(reference))
    is_pair = jnp.all(pairs >= 0, -1)
    places = jnp.where(is_pair[..., None], pairs, 0).reshape(pairs.shape[0], -1)
    own = jnp.take_along_axis(rewards, places, 1, mode="fill", fill_value=jnp.nan)
    chosen, rejected = jnp.moveaxis(own.reshape(pairs.shape), -1, 0)
    margins = chosen - rejected
    count = jnp.sum(is_pair, dtype=jnp.int32)

    def mean(values: jax.Array) -> jax.Array:
        total = jnp.sum(jnp.where(is_pair, values, 0))
        return total / jnp.maximum(count, 1).astype(rewards.dtype)

    accuracy = mean((margins > 0).astype(rewards.dtype))
    return DPOLoss(mean(-jax.nn.log_sigmoid(margins)), accuracy, mean(margins), count)


def _check(policy: jax.Array, reference: jax.Array, pairs: jax.Array) -> None:
    if policy.ndim != 2 or reference.shape != policy.shape:
        raise ValueError(
            f"policy.shape={policy.shape} and reference.shape={reference.shape} must "
            "both be [B, documents], as `per_document` returns them"
        )
    rows = policy.shape[0]
    if pairs.ndim != 3 or (pairs.shape[0], pairs.shape[2]) != (rows, 2):
        raise ValueError(
            f"pairs.shape={pairs.shape} must be [{rows}, P, 2]: the documents of the "
            "chosen and the rejected answer of P pairs in each row"
        )

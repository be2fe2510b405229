"""Log-probs and entropies of single tokens, without the logits of a whole sequence.

    predicted = logprobs(model, tokens, segment_ids)
    sums = per_document(predicted.logprobs, segment_ids, documents=2)  # [B, 2]

`tiles.py` computes them; `dpo.py` and `grpo.py` are losses of them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from usp_jax.layout import from_layout, to_layout
from usp_jax.models.execution import wide
from usp_jax.models.llama import Llama
from usp_jax.models.loss import shift_labels, stored_labels
from usp_jax.models.tiles import predict
from usp_jax.models.transformer import Transformer
from usp_jax.models.weights import Weights

Ids = Int[Array, "B T"]


class TokenLogprobs(NamedTuple):
    """What a model predicts after each token, in the order of the tokens.

    Attributes:
      logprobs: [B, T], natural logarithm of the label's probability, at least float32;
        0 where `mask` is False.
      entropies: [B, T], entropy of the predicted distribution in nats, likewise.
      mask: bool [B, T], whether the token has a label.
    """

    logprobs: Float[Array, "B T"]
    entropies: Float[Array, "B T"]
    mask: Bool[Array, "B T"]


def logprobs(
    model: Llama,
    tokens: Ids,
    segment_ids: Ids | None = None,
    *,
    labels: Ids | None = None,
    positions: Ids | None = None,
    layout: str = "natural",
    temperature: float | int = 1.0,
    validate_args: bool = False,
) -> TokenLogprobs:
    """Computes the log-prob of the token that follows each token.

    Both results are differentiable in the parameters (once: the backward pass is
    written by hand). The losses of routers are not part of them. To leave out tokens,
    such as a prompt's, make labels of the others:
    `shift_labels(jnp.where(counts, tokens, -1), segment_ids)`.

    Args:
      model: on any mesh.
      tokens: int32 [B, T]; B a multiple of data · fsdp.
      segment_ids: int32 [B, T], the document of each token of a packed row, -1 for
        padding; None is one document per row.
      labels: int32 [B, T] in the order of `tokens`, the token that follows each, or -1
        for none, as in `loss`. None is the next token of the same document, which the
        last token of a document and padding do not have.
      positions: int32 [B, T], for RoPE; None counts from the start of each row.
      layout: "natural" for tokens in their original order; otherwise the layout in
        which all these arrays are stored. "data" needs labels.
      temperature: divides the logits, after a soft cap, as in `generate`.
      validate_args: whether tokens that are not in the vocabulary raise, and labels
        that are neither in it nor -1. It cannot be used inside `jax.jit`.

    Raises:
      ValueError: a shape, dtype or length does not fit, the temperature is not
        positive, or labels are missing; with `validate_args`, a token or label is out
        of range, or they are traced.
    """
    if not temperature > 0:
        raise ValueError(f"{temperature=} must be positive")
    batch = model.batch(tokens, segment_ids, positions, layout)
    if labels is None:
        labels = _next_tokens(model, tokens, segment_ids, layout)
    extra = stored_labels(model, batch, tokens, labels, validate_args)
    split = model.split
    # An array, so that another temperature does not compile the program again.
    divisor = jnp.asarray(temperature, wide(model.config.dtype)), jax.P()
    specs = split.tokens, split.tokens
    found = model.run(_predictions, batch, specs, extra, divisor)
    nats, entropies = (batch.order.restore(x) for x in found)
    mask = labels >= 0
    return TokenLogprobs(jnp.where(mask, -nats, 0), entropies, mask)


def per_document(
    values: Float[Array, "B T"], segment_ids: Ids, documents: int
) -> Float[Array, "B documents"]:
    """Sums values over each document of packed rows.

    The order of the tokens is of no importance, so any stored layout will do.

    Args:
      values: [B, T], such as log-probs.
      segment_ids: int32 [B, T], ids of documents from 0, -1 for padding.
      documents: number of documents of a row. If a row has an id beyond, its sums are
        NaN.

    Returns:
      [B, documents] sums of values; 0 for a document without tokens.
    """
    # A comparison and not a scatter, which would gather values that are split along T.
    own = segment_ids[:, None] == jnp.arange(documents)[None, :, None]
    sums = jnp.sum(jnp.where(own, values[:, None], 0), -1)
    fits = jnp.all(segment_ids < documents, -1, keepdims=True)
    return jnp.where(fits, sums, jnp.nan)


def per_token(values: Float[Array, "B documents"], segment_ids: Ids) -> Array:
    """Gives each token the value of its document, the transpose of `per_document`.

    Args:
      values: [B, documents].
      segment_ids: int32 [B, T], ids of documents from 0, -1 for padding.

    Returns:
      [B, T], 0 for padding, and NaN for an id from `documents` on.
    """
    documents = values.shape[1]
    own = segment_ids[:, None] == jnp.arange(documents)[None, :, None]
    spread = jnp.sum(jnp.where(own, values[..., None], 0), 1)
    return jnp.where(segment_ids < documents, spread, jnp.nan)


def _next_tokens(
    model: Llama, tokens: jax.Array, segment_ids: jax.Array | None, layout: str
) -> jax.Array:
    """Labels in the order of `tokens`."""
    if layout == "natural":
        return shift_labels(tokens, segment_ids)
    if layout == "data":
        raise ValueError(
            'layout="data" needs labels=, an int32 array [B, T]: the token that '
            "follows each is not known from positions; see shift_labels"
        )

    def natural(x: jax.Array) -> jax.Array:
        return jnp.asarray(from_layout(x, layout, model.mesh))

    ids = None if segment_ids is None else natural(segment_ids)
    labels = shift_labels(natural(tokens), ids)
    return jnp.asarray(to_layout(labels, layout, model.mesh))


def _predictions(
    transformer: Transformer,
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    labels: jax.Array,
    temperature: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Nats and entropies at this device's tokens."""
    x, _ = transformer.hidden(weights, tokens, positions, segment_ids)
    found = predict(transformer, weights, x, labels, temperature, entropies=True)
    assert found.entropies is not None
    return found.nats, found.entropies

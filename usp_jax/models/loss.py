"""Cross-entropy of the next token without the logits of a whole sequence (`tiles.py`).

`logprobs.py` has log-probs and entropies of single tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from usp_jax.models.batch import Batch, check_ids
from usp_jax.models.llama import Llama
from usp_jax.models.router_report import RouterReport, router_report
from usp_jax.models.tiles import NO_LABEL as NO_LABEL, predict
from usp_jax.models.transformer import Transformer
from usp_jax.models.weights import Weights

Ids = Int[Array, "B T"]


def loss(
    model: Llama,
    tokens: Ids,
    labels: Ids,
    *,
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    layout: str = "natural",
    validate_args: bool = False,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Computes the summed negative log-likelihood of the labels, in nats.

    The mean loss is the sum divided by the number of labels. To average over several
    batches, sum both first; padding then has no weight.

    Args:
      model: on any mesh.
      tokens: int32 [B, T]; B a multiple of data · fsdp. An id that is not in the
        vocabulary is embedded as zeros, without an error.
      labels: int32 [B, T], in the order of `tokens`: the token that follows each token,
        or -1 for none. `shift_labels` makes them. Any negative label is none; one from
        vocab_size on counts as a label whose logit is 0, without an error.
      segment_ids: int32 [B, T], the document of each token of a packed row, -1 for
        padding; None is one document per row.
      positions: int32 [B, T], for RoPE; None counts from the start of each row.
      layout: "natural" for tokens in their original order; otherwise the layout in
        which all these arrays are stored.
      validate_args: whether tokens that are not in the vocabulary raise, and labels
        that are neither in it nor -1. It reads both on the host, so it cannot be used
        inside `jax.jit`.

    Returns:
      The sum of nats and the number of labels, scalars over all devices. The sum is
        float32, or float64 when the computation is; the number is int32.

    Raises:
      ValueError: a shape, dtype or length does not fit; with `validate_args`, a token
        or label is out of range, or they are traced.
    """
    batch = model.batch(tokens, segment_ids, positions, layout)
    extra = stored_labels(model, batch, tokens, labels, validate_args)
    nats, count, _ = model.run(_loss, batch, jax.P(), extra)
    return nats, count


def routed_loss(
    model: Llama,
    tokens: Ids,
    labels: Ids,
    *,
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    layout: str = "natural",
    validate_args: bool = False,
) -> tuple[Float[Array, ""], Int[Array, ""], RouterReport | None]:
    """Computes `loss`, and what the model's routers did.

    The arguments and errors are those of `loss`.

    Returns:
      The sum of nats, the number of labels, and the routers' report; None for a model
        without experts.
    """
    batch = model.batch(tokens, segment_ids, positions, layout)
    extra = stored_labels(model, batch, tokens, labels, validate_args)
    return model.run(_loss, batch, jax.P(), extra)


def token_nats(
    model: Llama,
    tokens: Ids,
    labels: Ids,
    *,
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    layout: str = "natural",
    validate_args: bool = False,
) -> Float[Array, "B T"]:
    """Computes the negative log-likelihood of each label, in nats.

    The arguments and errors are those of `loss`, which returns the sum of these values.

    Returns:
      [B, T] in the order of `tokens`, at least float32; 0 where there is no label.
    """
    batch = model.batch(tokens, segment_ids, positions, layout)
    extra = stored_labels(model, batch, tokens, labels, validate_args)
    nats = model.run(_token_nats, batch, model.split.tokens, extra)
    return batch.order.restore(nats)


def shift_labels(tokens: Ids, segment_ids: Ids | None = None) -> Ids:
    """Makes the labels of tokens in natural order: each is the token that follows.

    Args:
      tokens: int32 [B, T].
      segment_ids: int32 [B, T], the document of each token, -1 for padding; None is one
        document per row.

    Returns:
      int32 [B, T], -1 for the last token of a row or document and for padding.
    """
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=NO_LABEL)
    if segment_ids is None:
        return following
    ids = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where((ids == segment_ids) & (ids >= 0), following, NO_LABEL)


def stored_labels(
    model: Llama,
    batch: Batch,
    tokens: jax.Array,
    labels: jax.Array,
    validate_args: bool,
) -> tuple[jax.Array, jax.P]:
    """Checks labels and makes them an extra argument of `Llama.run`.

    Args:
      model: on any mesh.
      batch: the batch of `tokens`.
      tokens: int32 [B, T].
      labels: int32 [B, T], in the order of `tokens`.
      validate_args: whether tokens and labels that are out of range raise.

    Raises:
      ValueError: the labels' shape or dtype does not fit; with `validate_args`, a token
        or label is out of range, or they are traced.
    """
    if labels.shape != tokens.shape or labels.dtype != jnp.int32:
        raise ValueError(
            f"labels is {labels.dtype}{list(labels.shape)}; it must be int32 "
            f"{list(tokens.shape)}, like tokens"
        )
    if validate_args:
        vocab_size = model.config.vocab_size
        check_ids("tokens", tokens, vocab_size)
        check_ids("labels", labels, vocab_size, least=NO_LABEL)
    return batch.order.store(labels, NO_LABEL), model.split.tokens


def _loss(
    transformer: Transformer,
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    labels: jax.Array,
) -> tuple[jax.Array, jax.Array, RouterReport | None]:
    """(sum of nats, number of labels, what routers did) over all devices."""
    x, counts = transformer.hidden(weights, tokens, positions, segment_ids)
    split = transformer.split.ends
    nats = jnp.sum(predict(transformer, weights, x, labels).nats)
    nats = split.sum(nats, split.batch + split.sequence)
    count = jnp.sum(labels >= 0, dtype=jnp.int32)
    count = split.sum(count, split.batch + split.sequence)
    return nats, count, router_report(transformer.config, transformer.split, counts)


def _token_nats(
    transformer: Transformer,
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array | None,
    labels: jax.Array,
) -> jax.Array:
    """The nats of each of this device's labels."""
    x, _ = transformer.hidden(weights, tokens, positions, segment_ids)
    return predict(transformer, weights, x, labels).nats

"""Cross-entropy of the next token without the logits of a whole sequence.

Each device takes its own tokens a chunk at a time, forward and backward, so that no
[T, V] array exists, and the sums over devices do not depend on how tokens are split.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from usp_jax.models.llama import Batch, Llama

Ids = Int[Array, "B T"]
NO_LABEL = -1


def loss(
    model: Llama,
    tokens: Ids,
    labels: Ids,
    *,
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    layout: str = "natural",
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Negative log-likelihood of the labels: (sum of nats float32, number of labels).

    Divide the one by the other, each first summed over whatever else there is to sum
    over, and the mean depends on real tokens only.

    Args:
      labels: int32 [B, T], stored like the tokens: the token that follows each, -1
        where there is none (`shift_labels` makes them).
      tokens, segment_ids, positions, layout: as a `Llama` takes them.

    Raises:
      ValueError: shapes, dtypes or lengths that do not fit.
    """
    if labels.shape != tokens.shape or labels.dtype != jnp.int32:
        raise ValueError(
            f"labels is {labels.dtype}{list(labels.shape)}, it must be int32 "
            f"{list(tokens.shape)}, as tokens"
        )
    batch = Batch.of(model.mesh, tokens, segment_ids, positions, layout)
    run = model.run(_loss, (model.split.tokens,), (jax.P(), jax.P()))
    return run(batch, batch.store(labels, NO_LABEL))


def shift_labels(tokens: Ids, segment_ids: Ids | None = None) -> Ids:
    """The label of each token in natural order: the token that follows it.

    -1 for the last of a row or of a document, and for padding (segment id -1).
    """
    following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=NO_LABEL)
    if segment_ids is None:
        return following
    ids = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return jnp.where((ids == segment_ids) & (ids >= 0), following, NO_LABEL)


def _loss(transformer, weights, tokens, positions, segment_ids, labels):
    x = transformer.hidden(weights, tokens, positions, segment_ids)
    split, chunk = transformer.split, transformer.config.loss_chunk
    x, labels = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    chunk = min(chunk, labels.size)
    padding = -labels.size % chunk
    x = jnp.pad(x, ((0, padding), (0, 0))).reshape(-1, chunk, x.shape[-1])
    labels = jnp.pad(labels, (0, padding), constant_values=NO_LABEL)
    labels = labels.reshape(-1, chunk)
    nats = _nats(split, x, transformer.output_matrix(weights), labels)
    count = jnp.sum(labels >= 0, dtype=jnp.int32)
    everyone = split.batch + split.sequence
    return split.sum(nats, everyone), split.sum(count, everyone)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nats(split, x, matrix, labels):
    """The sum of nats of this device's labels.

    Args:
      x: [n, c, D], n chunks of c tokens.
      matrix: [v, D], this device's part of the vocabulary.
      labels: int32 [n, c].
    """
    return _nats_fwd(split, x, matrix, labels)[0]


def _nats_fwd(split, x, matrix, labels):
    def body(total, chunk):
        x, labels = chunk
        logits, hot = _chunk(split, x, matrix, labels)
        top = jnp.max(logits, -1)
        if split.tensor:
            top = lax.pmax(top, split.tensor)
        weights = jnp.exp(logits - top[:, None])
        lse = top + jnp.log(split.sum(jnp.sum(weights, -1), split.tensor))
        label = split.sum(jnp.sum(jnp.where(hot, logits, 0), -1), split.tensor)
        total += jnp.sum(jnp.where(labels >= 0, lse - label, 0))
        return total, lse

    # Zero, varying over the axes that the sum varies over.
    zero = jnp.sum(x[:0].astype(jnp.float32)) + jnp.sum(labels[:0])
    total, lse = lax.scan(body, zero, (x, labels))
    return total, (x, matrix, labels, lse)


def _nats_bwd(split, saved, dtotal):
    x, matrix, labels, lse = saved

    def body(dmatrix, chunk):
        x, labels, lse = chunk
        logits, hot = _chunk(split, x, matrix, labels)
        dlogits = jnp.exp(logits - lse[:, None]) - hot
        dlogits *= jnp.where(labels >= 0, dtotal, 0)[:, None]
        dlogits = dlogits.astype(x.dtype)
        dx = split.sum(jnp.einsum("TV,VD->TD", dlogits, matrix), split.tensor)
        dmatrix += jnp.einsum(
            "TV,TD->VD", dlogits, x, preferred_element_type=jnp.float32
        )
        return dmatrix, dx

    dmatrix, dx = lax.scan(body, jnp.zeros_like(matrix, jnp.float32), (x, labels, lse))
    return dx, dmatrix.astype(matrix.dtype), None


_nats.defvjp(_nats_fwd, _nats_bwd)


def _chunk(split, x, matrix, labels):
    """Logits of this device's vocabulary, and which of them is the label's."""
    logits = jnp.einsum("TD,VD->TV", x, matrix, preferred_element_type=jnp.float32)
    first = split.index(split.tensor) * matrix.shape[0]
    own = first + lax.iota(jnp.int32, matrix.shape[0])
    return logits, labels[:, None] == own[None]

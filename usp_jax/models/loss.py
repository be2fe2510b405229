"""Cross-entropy of the next token without the logits of a whole sequence.

Each device computes the logits of its own tokens in tiles, chunks of tokens by blocks
of the vocabulary, with the softmax's running maximum and sum over the blocks. The
backward pass computes them again. No [T, V] array exists, no sequence is gathered, and
only one block of the output matrix and of its gradient is whole at a time.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from usp_jax.models.batch import Batch, check_ids
from usp_jax.models.execution import wide
from usp_jax.models.llama import Llama
from usp_jax.models.router_report import RouterReport, router_report
from usp_jax.models.sharding import Split
from usp_jax.models.transformer import Transformer, capped
from usp_jax.models.weights import Weights

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
    batch, extra = _batch(
        model, tokens, labels, segment_ids, positions, layout, validate_args
    )
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
    batch, extra = _batch(
        model, tokens, labels, segment_ids, positions, layout, validate_args
    )
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
    batch, extra = _batch(
        model, tokens, labels, segment_ids, positions, layout, validate_args
    )
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


@dataclasses.dataclass(frozen=True)
class _Output:
    """How logits are computed.

    Attributes:
      split: how the mesh splits arrays.
      limit: maximum number of tokens whose logits are computed at once.
      soft_cap: soft cap of the logits, or None.
    """

    split: Split
    limit: int
    soft_cap: float | None


def _batch(
    model: Llama,
    tokens: jax.Array,
    labels: jax.Array,
    segment_ids: jax.Array | None,
    positions: jax.Array | None,
    layout: str,
    validate_args: bool,
) -> tuple[Batch, tuple[jax.Array, jax.P]]:
    """The checked batch, and its labels as an extra argument of `Llama.run`."""
    if labels.shape != tokens.shape or labels.dtype != jnp.int32:
        raise ValueError(
            f"labels is {labels.dtype}{list(labels.shape)}; it must be int32 "
            f"{list(tokens.shape)}, like tokens"
        )
    batch = model.batch(tokens, segment_ids, positions, layout)
    if validate_args:
        vocab_size = model.config.vocab_size
        check_ids("tokens", tokens, vocab_size)
        check_ids("labels", labels, vocab_size, least=NO_LABEL)
    return batch, (batch.order.store(labels, NO_LABEL), model.split.tokens)


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
    terms = _terms(transformer, weights, x, labels)
    split = terms[0].split
    nats = split.sum(_nats(*terms), split.batch + split.sequence)
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
    terms = _terms(transformer, weights, x, labels)
    nats, _ = _nats_and_lse(*terms)
    return nats.reshape(-1)[: labels.size].reshape(labels.shape)


def _terms(
    transformer: Transformer,
    weights: Weights,
    x: jax.Array,
    labels: jax.Array,
) -> tuple[_Output, jax.Array, jax.Array, jax.Array]:
    """The arguments of `_nats` for a device's part of a batch, from `hidden`."""
    config = transformer.config
    output = _Output(transformer.split.ends, config.loss_chunk, config.final_soft_cap)
    return output, x, _blocks(weights.lm_head, config.loss_block), labels


def _blocks(matrix: jax.Array, limit: int) -> jax.Array:
    """[v, d] -> [number, block, d]: the largest equal blocks of at most `limit`."""
    size = matrix.shape[0]
    number = next(n for n in range(-(-size // limit), size + 1) if size % n == 0)
    return matrix.reshape(number, size // number, -1)


def _chunks(x: jax.Array, limit: int, pad_value: int = 0) -> jax.Array:
    """[b, t, ...] -> [n, c, ...]: n chunks of c <= limit tokens, the last padded."""
    x = x.reshape(-1, *x.shape[2:])
    chunk = min(limit, x.shape[0])
    padding = ((0, -x.shape[0] % chunk), *((0, 0) for _ in x.shape[1:]))
    x = jnp.pad(x, padding, constant_values=pad_value)
    return x.reshape(-1, chunk, *x.shape[1:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nats(
    output: _Output, x: jax.Array, blocks: jax.Array, labels: jax.Array
) -> jax.Array:
    """Sums the nats of this device's labels.

    Args:
      output: how logits are computed.
      x: [b, t, D], or the part of it that `Split.enter` completes.
      blocks: [m, w, d], this device's part of the output matrix in m blocks.
      labels: int32 [b, t].
    """
    return _nats_fwd(output, x, blocks, labels)[0]


def _nats_fwd(
    output: _Output, x: jax.Array, blocks: jax.Array, labels: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    nats, lse = _nats_and_lse(output, x, blocks, labels)
    return jnp.sum(nats), (x, blocks, labels, lse)


def _nats_bwd(
    output: _Output, saved: tuple[jax.Array, ...], dnats: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    split, limit = output.split, output.limit
    part, blocks, labels, lse = saved
    shape = *labels.shape, part.shape[-1]
    x, labels = _chunks(split.enter(part), limit), _chunks(labels, limit, NO_LABEL)
    weight = jnp.where(labels >= 0, dnats, 0)

    def body(
        dx: jax.Array, block: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        matrix = split.gather(block[1], "lm_head", split.each)

        def tile(
            dmatrix: jax.Array, chunk: tuple[jax.Array, ...]
        ) -> tuple[jax.Array, jax.Array]:
            x, labels, lse, weight, dx = chunk
            logits, hot = _tile(output, x, matrix, labels, block[0], blocks)
            dlogits = (jnp.exp(logits - lse[:, None]) - hot) * weight[:, None]
            if output.soft_cap is not None:
                dlogits *= 1 - jnp.square(logits / output.soft_cap)
            dlogits = dlogits.astype(x.dtype)
            dx += _matmul("TV,VD->TD", dlogits, matrix)
            return dmatrix + _matmul("TV,TD->VD", dlogits, x), dx

        zeros = split.vary(jnp.zeros(matrix.shape, lse.dtype))
        dmatrix, dx = lax.scan(tile, zeros, (x, labels, lse, weight, dx))
        return dx, split.scatter(dmatrix.astype(matrix.dtype), "lm_head", split.each)

    zeros = split.vary(jnp.zeros(x.shape, lse.dtype))
    dx, dblocks = lax.scan(body, zeros, _numbered(blocks))
    dx = dx.reshape(-1, shape[-1])[: shape[0] * shape[1]].reshape(shape)
    return split.leave(dx).astype(x.dtype), dblocks, None


_nats.defvjp(_nats_fwd, _nats_bwd)


def _nats_and_lse(
    output: _Output, x: jax.Array, blocks: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Nats and log-sum-exp of each label, [n, c]: n chunks of c tokens, padded."""
    split, limit = output.split, output.limit
    x, labels = _chunks(split.enter(x), limit), _chunks(labels, limit, NO_LABEL)

    def body(
        carry: tuple[jax.Array, jax.Array, jax.Array],
        block: tuple[jax.Array, jax.Array],
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        matrix = split.gather(block[1], "lm_head", split.each)

        def tile(
            _: None, chunk: tuple[jax.Array, ...]
        ) -> tuple[None, tuple[jax.Array, jax.Array, jax.Array]]:
            x, labels, top, total, hit = chunk
            logits, hot = _tile(output, x, matrix, labels, block[0], blocks)
            higher = jnp.maximum(top, jnp.max(logits, -1))
            now = jnp.sum(jnp.exp(logits - higher[:, None]), -1)
            total = total * jnp.exp(top - higher) + now
            return None, (higher, total, hit + jnp.sum(jnp.where(hot, logits, 0), -1))

        return lax.scan(tile, None, (x, labels, *carry))[1], None

    zeros = split.vary(jnp.zeros(labels.shape, wide(x.dtype)))
    carry = (zeros - jnp.inf, zeros, zeros)
    (top, total, hit), _ = lax.scan(body, carry, _numbered(blocks))
    highest = split.max(top, split.tensor)
    total = split.sum(total * jnp.exp(top - highest), split.tensor)
    lse = highest + jnp.log(total)
    return jnp.where(labels >= 0, lse - split.sum(hit, split.tensor), 0), lse


def _numbered(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    return lax.iota(jnp.int32, blocks.shape[0]), blocks


def _tile(
    output: _Output,
    x: jax.Array,
    matrix: jax.Array,
    labels: jax.Array,
    number: jax.Array,
    blocks: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Logits of a chunk of tokens for one block, and a mask of those of the labels."""
    part = output.split.index(output.split.tensor)
    first = (part * blocks.shape[0] + number) * blocks.shape[1]
    own = first + lax.iota(jnp.int32, blocks.shape[1])
    logits = capped(_matmul("TD,VD->TV", x, matrix), output.soft_cap)
    return logits, labels[:, None] == own[None]


def _matmul(dims: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(dims, x, y, preferred_element_type=wide(x.dtype))

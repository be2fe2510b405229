"""The softmax over the vocabulary in tiles: chunks of tokens by blocks of logits.

Each device computes the logits of its own tokens, one tile at a time, with the running
maximum and sums of the softmax over the blocks. The backward pass computes them again.
No [T, V] array exists, no sequence is gathered, and only one block of the output matrix
and of its gradient is whole at a time.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from usp_jax.models.execution import wide
from usp_jax.models.sharding import Split
from usp_jax.models.transformer import Transformer, capped
from usp_jax.models.weights import Weights

NO_LABEL = -1


class Predictions(NamedTuple):
    """What the model predicts at each token, at least float32; 0 without a label.

    Attributes:
      nats: negative log-likelihood of the label, [b, t].
      entropies: entropy of the predicted distribution in nats, [b, t], or None.
    """

    nats: jax.Array
    entropies: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Output:
    """How logits are computed.

    Attributes:
      split: how the mesh splits arrays.
      limit: maximum number of tokens whose logits are computed at once.
      soft_cap: soft cap of the logits, or None.
      frozen: whether the output matrix has no gradient.
      entropies: whether entropies are computed.
    """

    split: Split
    limit: int
    soft_cap: float | None
    frozen: bool = False
    entropies: bool = False


class _Sums(NamedTuple):
    """Sums over the logits of each token so far.

    Attributes:
      top: largest logit.
      total: sum of exp(logit - top).
      hit: the label's logit, 0 until its block.
      moment: sum of exp(logit - top) · (logit - top), or None.
    """

    top: jax.Array
    total: jax.Array
    hit: jax.Array
    moment: jax.Array | None

    def lifted(self, top: jax.Array) -> "_Sums":
        """The sums relative to a higher top."""
        # Before the first block, top is -inf.
        shift = jnp.where(self.total > 0, self.top - top, 0)
        scale = jnp.exp(shift)
        moment = self.moment
        if moment is not None:
            moment = (moment + self.total * shift) * scale
        return _Sums(top, self.total * scale, self.hit, moment)

    def add(self, logits: jax.Array, hot: jax.Array) -> "_Sums":
        """The sums with one more tile."""
        top = jnp.maximum(self.top, jnp.max(logits, -1))
        _, total, hit, moment = self.lifted(top)
        below = logits - top[:, None]
        weights = jnp.exp(below)
        if moment is not None:
            moment += jnp.sum(weights * below, -1)
        total += jnp.sum(weights, -1)
        return _Sums(top, total, hit + jnp.sum(jnp.where(hot, logits, 0), -1), moment)

    def over(self, split: Split) -> "_Sums":
        """The sums over the parts of the vocabulary on all devices."""
        axes = split.tensor
        top, *sums = self.lifted(split.max(self.top, axes))
        total, hit, moment = jax.tree.map(lambda x: split.sum(x, axes), sums)
        return _Sums(top, total, hit, moment)


# x, blocks, labels, temperature, lse and entropies.
_Saved = tuple[
    jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array, jax.Array | None
]


class _Tokens(NamedTuple):
    """What the backward pass has of each token, in chunks.

    Attributes:
      x: [n, c, D].
      labels: int32 [n, c].
      lse: log-sum-exp of the logits, [n, c].
      entropies: [n, c], or None.
      given: gradients of the predictions, [n, c].
    """

    x: jax.Array
    labels: jax.Array
    lse: jax.Array
    entropies: jax.Array | None
    given: Predictions


def predict(
    transformer: Transformer,
    weights: Weights,
    x: jax.Array,
    labels: jax.Array,
    temperature: jax.Array | None = None,
    *,
    entropies: bool = False,
) -> Predictions:
    """Computes the predictions at a device's tokens, differentiable in x and weights.

    Args:
      transformer: the model on one device.
      weights: its weights.
      x: from `Transformer.hidden`.
      labels: int32 [b, t], the next tokens; a negative one is none.
      temperature: scalar that divides the logits; None is 1.
      entropies: whether entropies are computed.
    """
    config = transformer.config
    output = Output(
        transformer.split.ends,
        config.loss_chunk,
        config.final_soft_cap,
        frozen=config.lora is not None,
        entropies=entropies,
    )
    blocks = _blocks(weights.lm_head, config.loss_block)
    return tiled(output, x, blocks, labels, temperature)


def _blocks(matrix: jax.Array, limit: int) -> jax.Array:
    """[v, d] -> [number, block, d]: the largest equal blocks of at most `limit`."""
    size = matrix.shape[0]
    number = next(n for n in range(-(-size // limit), size + 1) if size % n == 0)
    return matrix.reshape(number, size // number, -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled(
    output: Output,
    x: jax.Array,
    blocks: jax.Array,
    labels: jax.Array,
    temperature: jax.Array | None,
) -> Predictions:
    """Computes the predictions at this device's tokens.

    Args:
      output: how logits are computed.
      x: [b, t, D], or the part of it that `Split.enter` completes.
      blocks: [m, w, d], this device's part of the output matrix in m blocks.
      labels: int32 [b, t].
      temperature: scalar that divides the logits, or None; it gets no gradient.
    """
    return _tiled_fwd(output, x, blocks, labels, temperature)[0]


def _tiled_fwd(
    output: Output,
    x: jax.Array,
    blocks: jax.Array,
    labels: jax.Array,
    temperature: jax.Array | None,
) -> tuple[Predictions, _Saved]:
    sums = _sums(output, x, blocks, labels, temperature)
    lse, entropies = sums.top + jnp.log(sums.total), None
    if sums.moment is not None:
        entropies = jnp.log(sums.total) - sums.moment / sums.total

    def of_labels(x: jax.Array) -> jax.Array:
        x = x.reshape(-1)[: labels.size].reshape(labels.shape)
        return jnp.where(labels >= 0, x, 0)

    predictions = jax.tree.map(of_labels, Predictions(lse - sums.hit, entropies))
    return predictions, (x, blocks, labels, temperature, lse, entropies)


def _sums(
    output: Output,
    x: jax.Array,
    blocks: jax.Array,
    labels: jax.Array,
    temperature: jax.Array | None,
) -> _Sums:
    """Sums over all logits of each token, [n, c]: n chunks of c tokens, padded."""
    split, limit = output.split, output.limit
    x, labels = _chunks(split.enter(x), limit), _chunks(labels, limit, NO_LABEL)

    def body(sums: _Sums, block: tuple[jax.Array, jax.Array]) -> tuple[_Sums, None]:
        matrix = split.gather(block[1], "lm_head", split.each)

        def tile(
            _: None, chunk: tuple[jax.Array, jax.Array, _Sums]
        ) -> tuple[None, _Sums]:
            x, labels, sums = chunk
            logits, hot = _tile(output, x, matrix, labels, block[0], blocks)
            return None, sums.add(_divided(logits, temperature), hot)

        return lax.scan(tile, None, (x, labels, sums))[1], None

    zeros = split.vary(jnp.zeros(labels.shape, wide(x.dtype)))
    start = _Sums(zeros - jnp.inf, zeros, zeros, zeros if output.entropies else None)
    return lax.scan(body, start, _numbered(blocks))[0].over(split)


def _tiled_bwd(
    output: Output, saved: _Saved, gradients: Predictions
) -> tuple[jax.Array, jax.Array | None, None, None]:
    split, limit = output.split, output.limit
    part, blocks, labels, temperature, lse, entropies = saved
    x, hidden = split.enter(part), labels < 0
    given = jax.tree.map(lambda x: _chunks(jnp.where(hidden, 0, x), limit), gradients)
    labels = _chunks(labels, limit, NO_LABEL)
    tokens = _Tokens(_chunks(x, limit), labels, lse, entropies, given)

    def body(
        dx: jax.Array, block: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array | None]:
        matrix = split.gather(block[1], "lm_head", split.each)

        def tile(
            dmatrix: jax.Array | None, chunk: tuple[_Tokens, jax.Array]
        ) -> tuple[jax.Array | None, jax.Array]:
            tokens, dx = chunk
            logits, hot = _tile(
                output, tokens.x, matrix, tokens.labels, block[0], blocks
            )
            dlogits = _dlogits(output, tokens, logits, hot, temperature)
            dlogits = dlogits.astype(tokens.x.dtype)
            dx += _matmul("TV,VD->TD", dlogits, matrix)
            if dmatrix is not None:
                dmatrix += _matmul("TV,TD->VD", dlogits, tokens.x)
            return dmatrix, dx

        start = None
        if not output.frozen:
            start = split.vary(jnp.zeros(matrix.shape, lse.dtype))
        dmatrix, dx = lax.scan(tile, start, (tokens, dx))
        if dmatrix is None:
            return dx, None
        return dx, split.scatter(dmatrix.astype(matrix.dtype), "lm_head", split.each)

    zeros = split.vary(jnp.zeros(tokens.x.shape, lse.dtype))
    dx, dblocks = lax.scan(body, zeros, _numbered(blocks))
    dx = dx.reshape(-1, x.shape[-1])[: x.shape[0] * x.shape[1]].reshape(x.shape)
    return split.leave(dx).astype(x.dtype), dblocks, None, None


tiled.defvjp(_tiled_fwd, _tiled_bwd)


def _chunks(x: jax.Array, limit: int, pad_value: int = 0) -> jax.Array:
    """[b, t, ...] -> [n, c, ...]: n chunks of c <= limit tokens, the last padded."""
    x = x.reshape(-1, *x.shape[2:])
    chunk = min(limit, x.shape[0])
    padding = ((0, -x.shape[0] % chunk), *((0, 0) for _ in x.shape[1:]))
    x = jnp.pad(x, padding, constant_values=pad_value)
    return x.reshape(-1, chunk, *x.shape[1:])


def _numbered(blocks: jax.Array) -> tuple[jax.Array, jax.Array]:
    return lax.iota(jnp.int32, blocks.shape[0]), blocks


def _tile(
    output: Output,
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


def _dlogits(
    output: Output,
    tokens: _Tokens,
    logits: jax.Array,
    hot: jax.Array,
    temperature: jax.Array | None,
) -> jax.Array:
    """The gradient of a tile's logits before the soft cap.

    With probabilities p and entropy H, d(nats) = p - hot and dH = -p (log p + H).
    """
    log_p = _divided(logits, temperature) - tokens.lse[:, None]
    p, given = jnp.exp(log_p), tokens.given
    dlogits = (p - hot) * given.nats[:, None]
    if tokens.entropies is not None:
        assert given.entropies is not None
        surprise = log_p + tokens.entropies[:, None]
        dlogits -= p * surprise * given.entropies[:, None]
    dlogits = _divided(dlogits, temperature)
    if output.soft_cap is not None:
        dlogits *= 1 - jnp.square(logits / output.soft_cap)
    return dlogits


def _divided(x: jax.Array, temperature: jax.Array | None) -> jax.Array:
    return x if temperature is None else x / temperature


def _matmul(dims: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(dims, x, y, preferred_element_type=wide(x.dtype))

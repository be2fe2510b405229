"""Blocks of packed rows through a package's calls for sequences of several lengths.

The rows of a batch, which have different documents, become one row of B · T tokens:

    q [B, T, N, H], starts [B, P + 1]  ->  [B · T, N, H], [B · P + 1]
"""

import dataclasses
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from usp_jax.kernels.bands import Block, Window
from usp_jax.kernels.contract import Grads
from usp_jax.kernels.documents import Documents, documents_of
from usp_jax.kernels.folding import folded

# dq, dk and dv of one row of tokens.
SequencesGrads = tuple[
    Float[Array, "M N H"], Float[Array, "L K H"], Float[Array, "L K V"]
]

# The lse of a query whose weights are to be 0: no logit comes near it, and its product
# with log2(e) is finite.
_NO_WEIGHT = 1e38


@dataclasses.dataclass(frozen=True)
class Sequences:
    """The sequences of one row of tokens.

    Attributes:
      starts: int32 [P + 1], of queries and of keys; the last is the number of tokens.
      longest: the most queries and the most keys that a sequence may have.
    """

    starts: tuple[jax.Array, jax.Array]
    longest: tuple[int, int]


@runtime_checkable
class SequencesForward(Protocol):
    """Attention within each sequence, in a window counted from its end.

    Returns:
      out [M, N, V] in 16 bits, and lse [N, M] in float32, natural logarithm. Those of
      queries that see no key have no meaning.
    """

    def __call__(
        self,
        q: Float[Array, "M N H"],
        k: Float[Array, "L K H"],
        v: Float[Array, "L K V"],
        sequences: Sequences,
        scale: float,
        window: Window,
    ) -> tuple[Float[Array, "M N V"], Float[Array, "N M"]]: ...


@runtime_checkable
class SequencesBackward(Protocol):
    """dq, dk, dv in 16 bits, from an lse that may cover more keys.

    `out` is used only for sum(out · dout, -1).
    """

    def __call__(
        self,
        q: Float[Array, "M N H"],
        k: Float[Array, "L K H"],
        v: Float[Array, "L K V"],
        lse: Float[Array, "N M"],
        out: Float[Array, "M N V"],
        dout: Float[Array, "M N V"],
        sequences: Sequences,
        scale: float,
        window: Window,
    ) -> SequencesGrads: ...


@dataclasses.dataclass(frozen=True)
class PackedCalls:
    """The two calls of a package for sequences of several lengths."""

    forward: SequencesForward
    backward: SequencesBackward


def packed_forward(
    calls: PackedCalls,
    block: Block,
    ids: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    scale: float,
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]:
    """Computes the attention of a full block or a square, within documents.

    Returns:
      out and lse: 0 and -inf for queries that see no key, and NaN in rows whose
      documents cannot be honoured (`Documents.is_exact`).
    """
    documents = documents_of(block, *ids)

    def call(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, k, v, q_starts, kv_starts = arrays
        sequences = _joined_sequences(q_starts, kv_starts, q, k)
        q_, k_, v_ = map(_joined, (q, k, v))
        out, lse = calls.forward(q_, k_, v_, sequences, scale, block.window)
        return _rows(out, q), lse.reshape(lse.shape[0], *q.shape[:2]).swapaxes(0, 1)

    out, lse = folded(call)(q, k, v, *documents.starts)
    out = _kept(out, documents.q_seen, documents)
    seen = documents.q_seen[:, None]
    is_exact = documents.is_exact[:, None, None]
    return out, jnp.where(is_exact, jnp.where(seen, lse, -jnp.inf), jnp.nan)


def packed_backward(
    calls: PackedCalls,
    block: Block,
    ids: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    lse: Float[Array, "B N T"],
    out: Float[Array, "B T N V"],
    dout: Float[Array, "B T N V"],
    scale: float,
) -> Grads:
    """Computes dq, dk, dv of a full block or a square, within documents."""
    documents = documents_of(block, *ids)
    # A sequence may hold queries of other documents: they get no weights.
    lse = jnp.where(documents.q_seen[:, None], lse, _NO_WEIGHT)
    out, dout = (_zeroed(x, documents.q_seen) for x in (out, dout))

    def call(*arrays: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v, lse, out, dout, q_starts, kv_starts = arrays
        sequences = _joined_sequences(q_starts, kv_starts, q, k)
        lse = lse.swapaxes(0, 1).reshape(lse.shape[1], -1)
        q_, k_, v_, out, dout = map(_joined, (q, k, v, out, dout))
        grads = calls.backward(
            q_, k_, v_, lse, out, dout, sequences, scale, block.window
        )
        dq, dk, dv = map(_rows, grads, (q, k, v))
        return dq, dk, dv

    dq, dk, dv = folded(call)(q, k, v, lse, out, dout, *documents.starts)
    return (
        _kept(dq, documents.q_seen, documents),
        _kept(dk, documents.kv_seen, documents),
        _kept(dv, documents.kv_seen, documents),
    )


def _kept(x: jax.Array, seen: jax.Array, documents: Documents) -> jax.Array:
    is_exact = documents.is_exact[:, None, None, None]
    return jnp.where(is_exact, _zeroed(x, seen), jnp.nan)


def _zeroed(x: jax.Array, seen: jax.Array) -> jax.Array:
    return jnp.where(seen[..., None, None], x, jnp.zeros((), x.dtype))


def _joined(x: jax.Array) -> jax.Array:
    """[B, T, N, H] -> [B · T, N, H]"""
    return x.reshape(-1, *x.shape[2:])


def _rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """[B · T, N, H] -> [B, T, N, H]"""
    return x.reshape(*like.shape[:2], *x.shape[1:])


def _joined_sequences(
    q_starts: jax.Array, kv_starts: jax.Array, q: jax.Array, k: jax.Array
) -> Sequences:
    """Puts the sequences of all rows one after the other."""
    longest = q.shape[1], k.shape[1]
    starts = _joined_starts(q_starts, longest[0]), _joined_starts(kv_starts, longest[1])
    return Sequences(starts, longest)


def _joined_starts(starts: jax.Array, length: int) -> jax.Array:
    """[B, P + 1] -> [B · P + 1]"""
    before = jnp.arange(starts.shape[0], dtype=jnp.int32)[:, None] * length
    ends = (starts[:, 1:] + before).reshape(-1)
    return jnp.pad(ends, (1, 0))

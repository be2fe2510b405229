"""Dropout of the attention weights by a hash of the tokens.

A hash of (seed, batch row, head, segment, query position, key position), all global,
decides whether a weight is kept. The forward and the backward agree without storing a
mask, and which weights are kept does not depend on the mesh, the layout, the schedule
or the block sizes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, UInt32

from usp_jax.masking import Leaf, Tokens

# An odd number with no pattern in its bits: the golden ratio's fraction.
_STEP = np.uint32(0x9E3779B9)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dropout:
    """Settings of the dropout of the attention weights.

    Attributes:
      rate: the fraction of the weights that is dropped, below 1.
      seed: uint32 [].
      rows: int32 [B], the index of each batch row in the global batch.
      heads: int32 [n], the global index of each query head.
    """

    rate: float = dataclasses.field(metadata={"static": True})
    seed: Leaf
    rows: Leaf
    heads: Leaf

    def factors(
        self, rows: jax.Array | np.ndarray, q: Tokens, kv: Tokens, dtype: DTypeLike
    ) -> Float[Array, "*B n T S"]:
        """Computes the factors of the weights: 0, or 1 / (1 - rate).

        Args:
          rows: integers [*B], global indices of batch rows.
          q: tokens [*B, T].
          kv: tokens [*B, S].
          dtype: the dtype of the result.
        """
        state = _mixed(self.seed, rows[..., None, None])
        state = _mixed(state, self.heads[:, None])
        ids = 0 if q.segment_ids is None else q.segment_ids[..., None, :]
        state = _mixed(_mixed(state, ids), q.positions[..., None, :])
        state = _mixed(state[..., None], kv.positions[..., None, None, :])
        kept = state >= np.uint32(round(self.rate * 2**32))
        return jnp.where(kept, 1 / (1 - self.rate), 0).astype(dtype)


def _mixed(state: UInt32[Array, "..."], word: ArrayLike) -> UInt32[Array, "..."]:
    """Mixes one more word into `state`.

    The rounds are those of the "lowbias32" mixer (C. Wellons, "Prospecting for Hash
    Functions", 2018).
    """
    state, word = jnp.broadcast_arrays(state, jnp.asarray(word).astype(jnp.uint32))
    x = (state ^ word) + _STEP
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)

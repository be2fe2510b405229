"""Dropout of attention's weights, as a function of what the tokens are.

Whether a weight is kept is a hash of (seed, batch row, head, segment, query position,
key position), all of them global. So the forward and the backward agree without storing
a mask, and the result does not depend on the mesh, the layout, the schedule or the
block sizes.
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
    """Which weights are dropped.

    Attributes:
      rate: the share of the weights that is dropped, below 1.
      seed: uint32 [].
      rows: int32 [B], the number of each batch row in the whole batch.
      heads: int32 [n], the number of each query head among all.
    """

    rate: float = dataclasses.field(metadata={"static": True})
    seed: Leaf
    rows: Leaf
    heads: Leaf

    def factors(
        self, rows: jax.Array | np.ndarray, q: Tokens, kv: Tokens, dtype: DTypeLike
    ) -> Float[Array, "*B n T S"]:
        """What the weights are multiplied by: 0, or 1 / (1 - rate).

        Args:
          rows: numbers of batch rows [*B].
          q, kv: [*B, T] and [*B, S].
        """
        state = _mixed(self.seed, rows[..., None, None])
        state = _mixed(state, self.heads[:, None])
        ids = 0 if q.segment_ids is None else q.segment_ids[..., None, :]
        state = _mixed(_mixed(state, ids), q.positions[..., None, :])
        state = _mixed(state[..., None], kv.positions[..., None, None, :])
        kept = state >= np.uint32(round(self.rate * 2**32))
        return jnp.where(kept, 1 / (1 - self.rate), 0).astype(dtype)


def _mixed(state: UInt32[Array, "..."], word: ArrayLike) -> UInt32[Array, "..."]:
    """`state` with one more word in it, every bit of which may change all of its bits.

    The rounds are those of the "lowbias32" mixer of a published search for such
    functions (C. Wellons, "Prospecting for Hash Functions", 2018).
    """
    state, word = jnp.broadcast_arrays(state, jnp.asarray(word).astype(jnp.uint32))
    x = (state ^ word) + _STEP
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)

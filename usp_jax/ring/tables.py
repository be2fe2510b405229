"""Block tables of a ring's masks, made before its steps.

The tables of a mask (`Chunk.tables`) depend on tokens, not on q, k, v. `call.py` makes
them for the forward and the backward pass together and saves them for the latter. In a
scan over layers they are then the same in all layers, and when jax differentiates the
scan it makes them once, before it. In a scan that is not differentiated they are made
in each layer.
"""

import dataclasses

import jax
from jax import lax
from jaxtyping import Array, Int

from usp_jax.masking import Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingTables:
    """The tables of this device's queries; None or a missing entry: not made before.

    Attributes:
      shards: tables of all queries against each shard of keys, [R, B, ...].
      own: tables of some queries against this device's own keys, [1, B, ...], by the
        first query and the one after the last.
    """

    shards: Leaf = None
    own: Leaf = None

    def of(self, place: Int[Array, ""] | int) -> Leaf:
        """Returns the tables of all queries against the keys of one shard."""
        return jax.tree.map(
            lambda x: lax.dynamic_index_in_dim(x, place, keepdims=False), self.shards
        )

    def of_own(self, start: int, stop: int) -> Leaf:
        """Returns the tables of some queries against this device's own keys."""
        return jax.tree.map(lambda x: x[0], (self.own or {}).get((start, stop)))

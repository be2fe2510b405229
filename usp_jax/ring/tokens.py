"""The facts about all ring shards that masks need, gathered once per call."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from usp_jax.layout import shard_positions
from usp_jax.masking import Stretch, Tokens, join
from usp_jax.mesh import AxisName


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RingTokens:
    """Positions and segment ids of all ring shards.

    Attributes:
      positions: int32 [R, B, t], or None for those of the layout.
      segment_ids: int32 [R, B, t], or None.
      length: t, the number of tokens in a ring shard.
      prefix: int32 [B], or None. As queries of a causal mask, the first `prefix` tokens
        of a row see each other.
    """

    positions: Any
    segment_ids: Any
    layout: str = dataclasses.field(metadata={"static": True})
    ring_size: int = dataclasses.field(metadata={"static": True})
    length: int = dataclasses.field(metadata={"static": True})
    prefix: Any = None

    def shard(self, index: Int[Array, ""] | int) -> Tokens:
        """The tokens of one ring shard."""
        stretches = None
        if self.positions is None:
            stored = self.layout, self.ring_size, self.length
            positions = shard_positions(stored[0], index, *stored[1:])[None]
            stretches = (Stretch(*stored, 0, self.length),)
        else:
            positions = self.positions[index]
        if self.prefix is not None:
            # A token in the prefix sees as much as the last token of the prefix.
            positions = jnp.maximum(positions, self.prefix[:, None] - 1)
            stretches = None
        ids = None if self.segment_ids is None else self.segment_ids[index]
        return Tokens(positions, ids, stretches)

    def all(self) -> Tokens:
        """The tokens of all ring shards, in order."""
        return join(*(self.shard(index) for index in range(self.ring_size)))


def gather_tokens(
    positions: Int[Array, "B t"] | None,
    segment_ids: Int[Array, "B t"] | None,
    *,
    layout: str,
    ring_axis: AxisName | None,
    ulysses_axis: AxisName | None,
    length: int,
) -> RingTokens:
    """Gathers the tokens of all shards; a ring shard has `length` tokens."""

    def gather(x: Any) -> jax.Array | None:
        if x is None:
            return None
        if ulysses_axis is not None:
            x = lax.all_gather(x, ulysses_axis, axis=1, tiled=True)
        return x[None] if ring_axis is None else lax.all_gather(x, ring_axis)

    ring_size = 1 if ring_axis is None else lax.axis_size(ring_axis)
    return RingTokens(gather(positions), gather(segment_ids), layout, ring_size, length)

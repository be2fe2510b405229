"""The bidirectional ring: half of every shard goes round each way.

On a torus each link carries traffic both ways at once; a ring that only sends to the
next device leaves half of that unused. Here the first half of the tokens of every shard
travels forwards and the second half backwards, so that a hop takes half the time, at
the same bytes for each device.
"""

from typing import Any

import jax
import jax.numpy as jnp

from usp_jax.masking import Tokens, join
from usp_jax.ring import Ring


class BothWays(Ring):
    """A ring whose device r holds half of shard r - s and half of r + s at step s."""

    def rotate(self, x: Any) -> Any:
        """Sends one half of the tokens of [B, S, ...] to either neighbour."""
        forwards = [(i, (i + 1) % self.size) for i in range(self.size)]
        backwards = [(j, i) for i, j in forwards]
        half = -(-x.shape[1] // 2)
        first, second = x[:, :half], x[:, half:]
        if second.size:
            second = self.send(second, backwards)
        return jnp.concatenate([self.send(first, forwards), second], 1)

    def held(self, step: int | jax.Array) -> Tokens:
        """The tokens of the two halves."""
        shard = self.kv_tokens.shard
        first = shard((self.index - step) % self.size)
        second = shard((self.index + step) % self.size)
        half = -(-self.kv_tokens.length // 2)
        return join(first.cut(slice(half)), second.cut(slice(half, None)))

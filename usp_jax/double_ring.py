"""The double ring: a ring of rings on one axis, for links of two speeds.

LoongTrain (arXiv 2406.18485, section 4.3). The axis is cut into groups of `inner`
neighbours. A shard first goes round its group, over fast links, while its copy is
already on the way to the same place in the next group: the outer rotation, over slow
links, is in flight during a whole inner turn. The number of rotations is that of one
ring, R - 1, of which R / inner - 1 are outer ones.
"""

import dataclasses

from jaxtyping import Array, Int

from usp_jax.masking import Tokens
from usp_jax.ring import ALL, Ring, ring_backward, ring_forward


@dataclasses.dataclass(frozen=True)
class DoubleRing(Ring):
    """The outer ring: what it does at a step is a turn of the inner one.

    Attributes:
      inner: the number of devices of an inner ring; divides that of the axis.
    """

    inner: int = 1

    @property
    def size(self) -> int:
        """The number of inner rings."""
        return self.devices // self.inner

    def rotate(self, x):
        """Sends `x` to the same place in the next inner ring."""
        n = self.devices
        return self.send(x, [(i, (i + self.inner) % n) for i in range(n)])

    def attend(self, step, q, kv, carry):
        """A turn of the inner ring."""
        return ring_forward(self._inner_ring(step), q, kv, carry)

    def pull_back(self, step, kv, rows, q, dout, lse, delta):
        """The gradients of a turn of the inner ring; always of all rows."""
        assert rows == ALL, "a turn of the inner ring is not cut"
        return ring_backward(self._inner_ring(step), q, kv, dout, lse, delta)

    def own_rows(self, length):
        """All at once: a second run would send the inner ring's shards again."""
        return [ALL]

    def _inner_ring(self, step):
        return self.into(_InnerRing, inner=self.inner, outer_step=step)


@dataclasses.dataclass(frozen=True)
class _InnerRing(Ring):
    inner: int = 1
    outer_step: Int[Array, ""] | int = 0

    @property
    def size(self) -> int:
        return self.inner

    def rotate(self, x):
        n = self.inner
        return self.send(
            x, [(i, i // n * n + (i + 1) % n) for i in range(self.devices)]
        )

    def held(self, step) -> Tokens:
        groups = self.devices // self.inner
        group = (self.index // self.inner - self.outer_step) % groups
        place = (self.index % self.inner - step) % self.inner
        return self.kv_tokens.shard(group * self.inner + place)

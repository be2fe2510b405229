"""The double ring: a ring of rings on one axis, for links of two speeds.

LoongTrain (arXiv 2406.18485, section 4.3). The axis is cut into groups of `inner`
neighbours. A shard first goes round its group, over fast links, while its copy is
already on the way to the same place in the next group: the outer rotation, over slow
links, is in flight during a whole inner turn. The number of rotations is that of one
ring, R - 1, of which R / inner - 1 are outer ones.
"""

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Int

from usp_jax.kernels import Carry
from usp_jax.masking import Tokens
from usp_jax.ring import ALL, Ring, Step, ring_backward, ring_forward


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

    def rotate(self, x: Any) -> Any:
        """Sends `x` to the same place in the next inner ring."""
        n = self.devices
        return self.send(x, [(i, (i + self.inner) % n) for i in range(n)])

    def attend(
        self, step: Step, q: jax.Array, kv: jax.Array, carry: Carry | None
    ) -> Carry:
        """A turn of the inner ring."""
        return ring_forward(self._inner_ring(step), q, kv, carry)

    def pull_back(
        self,
        step: Step,
        kv: jax.Array,
        rows: slice,
        q: jax.Array,
        dout: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        """The gradients of a turn of the inner ring, or of what it has left."""
        inner = self._inner_ring(step, rows)
        if self.inner == 1 or rows.start:
            return inner.pull_back(0, kv, rows, q, dout, lse, delta)
        return ring_backward(inner, q, kv, dout, lse, delta)

    def own_rows(self, length: int) -> list[slice]:
        """A third of the queries meets their own shard beside the last outer hop only.

        The own turn of the inner ring, beside the first, is not made again for them.
        """
        left = length // 3
        return [slice(length - left), slice(length - left, length)][: 1 + bool(left)]

    def _inner_ring(self, step: Step, rows: slice = ALL) -> Ring:
        return self.into(_InnerRing, inner=self.inner, outer_step=step, own=rows.stop)


@dataclasses.dataclass(frozen=True)
class _InnerRing(Ring):
    """A turn of it, at a step of the outer ring.

    Attributes:
      own: how many queries meet their own shard in it; None is all of them.
    """

    inner: int = 1
    outer_step: Int[Array, ""] | int = 0
    own: int | None = None

    @property
    def size(self) -> int:
        return self.inner

    def own_rows(self, length: int) -> list[slice]:
        return super().own_rows(length if self.own is None else self.own)

    def rotate(self, x: Any) -> Any:
        n = self.inner
        return self.send(
            x, [(i, i // n * n + (i + 1) % n) for i in range(self.devices)]
        )

    def held(self, step: Step) -> Tokens:
        groups = self.devices // self.inner
        group = (self.index // self.inner - self.outer_step) % groups
        place = (self.index % self.inner - step) % self.inner
        return self.kv_tokens.shard(group * self.inner + place)

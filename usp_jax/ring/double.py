"""The double ring: a ring of rings on one axis, for links of two speeds.

LoongTrain (arXiv 2406.18485, section 4.3). The axis is cut into groups of `inner`
neighbours. A shard first travels around its group, over fast links, while a copy of it
is already on its way to the same place in the next group. The outer hop, over slow
links, is thus in flight during a whole inner turn. There are R - 1 hops, as in one
ring, of which R / inner - 1 are outer ones.
"""

import dataclasses

from usp_jax.checks import check_positive_int
from usp_jax.ring.ring import Turn


@dataclasses.dataclass(frozen=True)
class Double:
    """Nests rings of neighbours inside an outer ring.

    Attributes:
      inner: number of devices in an inner ring; must divide the ring axis.

    Raises:
      ValueError: `inner` is not a positive int.
    """

    inner: int

    def __post_init__(self) -> None:
        check_positive_int("inner", self.inner)

    def turns(self, devices: int) -> tuple[Turn, ...]:
        """A turn of the outer ring; each of its steps is a turn of the inner rings."""
        return Turn(devices // self.inner, stride=self.inner), Turn(self.inner)

"""The double ring: a ring of rings on one axis, for links of two speeds.

LoongTrain (arXiv 2406.18485, section 4.3). The axis is cut into groups of `inner`
neighbours. A shard first goes round its group, over fast links, while its copy is
already on the way to the same place in the next group: the outer hop, over slow links,
is in flight during a whole inner turn. The number of hops is that of one ring, R - 1,
of which R / inner - 1 are outer ones.
"""

import dataclasses

from usp_jax.checks import check_positive_int
from usp_jax.ring.ring import Turn


@dataclasses.dataclass(frozen=True)
class Double:
    """Rings of neighbours inside an outer ring.

    Attributes:
      inner: the number of devices of an inner ring; divides that of the ring axis.

    Raises:
      ValueError: `inner` is not a positive int.
    """

    inner: int

    def __post_init__(self) -> None:
        check_positive_int("inner", self.inner)

    def turns(self, devices: int) -> tuple[Turn, ...]:
        """A turn of the outer ring, each step of which is a turn of the inner ones."""
        return Turn(devices // self.inner, stride=self.inner), Turn(self.inner)

"""The plain ring: each hop sends every shard of keys to the next device."""

import dataclasses

from usp_jax.checks import check_positive_int
from usp_jax.ring.ring import Turn


@dataclasses.dataclass(frozen=True)
class Unidirectional:
    """Rotates keys and values around the ring; leaves out hops known to be empty.

    Attributes:
      shards: the largest number of shards that one kernel call of the forward pass
        attends to (`grouped.py`).

    Raises:
      ValueError: `shards` is not a positive int.
    """

    shards: int = 1

    def __post_init__(self) -> None:
        check_positive_int("shards", self.shards)

    def turns(self, devices: int) -> tuple[Turn, ...]:
        """One turn: device r holds shard r - s at step s."""
        return (Turn(devices),)

"""The bidirectional ring: half of every shard travels in each direction.

On a torus each link carries traffic in both directions at once, so a ring that only
sends to the next device leaves half of the bandwidth unused. Here the first half of
every shard's tokens travels forwards and the second half backwards. A hop takes half
the time, and each device sends the same bytes.
"""

import dataclasses

from usp_jax.ring.ring import Turn


@dataclasses.dataclass(frozen=True)
class Bidirectional:
    """Sends half of each shard's keys in each direction around the ring."""

    def turns(self, devices: int) -> tuple[Turn, ...]:
        """One turn: device r holds half of shards r - s and r + s at step s."""
        return (Turn(devices, lanes=(1, -1)),)

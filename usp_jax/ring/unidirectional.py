"""The plain ring: each hop sends every shard of keys to the next device."""

import dataclasses

from usp_jax.ring.ring import Turn


@dataclasses.dataclass(frozen=True)
class Unidirectional:
    """Rotates keys and values around the ring; leaves out hops known to be empty."""

    def turns(self, devices: int) -> tuple[Turn, ...]:
        """One turn: device r holds shard r - s at step s."""
        return (Turn(devices),)

"""The plain ring: at each step every shard of keys goes to the next device."""

import dataclasses

from usp_jax.ring.ring import Turn


@dataclasses.dataclass(frozen=True)
class Unidirectional:
    """Keys and values go round the ring; hops known to be empty do not exist."""

    def turns(self, devices: int) -> tuple[Turn, ...]:
        """Device r holds shard r - s at step s."""
        return (Turn(devices),)

"""The forward ring with several shards a kernel call, to write the carry less often.

A call reads and writes the carry, float32 [B, T, n, V]. Where query heads share key
heads, that is more than the keys of several shards. So a device attends to its own
shard and the next one alone, then to groups that grow to `shards`. For R = 8 and groups
of up to 4, in time:

    computed    0    1    2 3      4 5 6 7
    hop         1    2    4

One hop during each call sends the shards of the next group from where they are held, as
many places along the ring as shards are held there. So each hop is in flight during a
call, and R - 1 shards are sent, as in the plain ring. A device holds two groups.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from usp_jax.kernels import Carry
from usp_jax.masking import join
from usp_jax.ring.ring import Index, Ring
from usp_jax.ring.steps import loop, together


def grouped_forward(
    ring: Ring,
    shards: int,
    q: Float[Array, "B T n H"],
    kv: Float[Array, "B S m D"],
    carry: Carry | None = None,
) -> Carry:
    """Computes `ring_forward` with groups of up to `shards` shards."""
    length, devices = kv.shape[1], ring.devices

    def attend(
        step: Index, kv: jax.Array, carry: Carry | None, *, is_last: bool = False
    ) -> Carry:
        """Attends to the shards of a step and of those after it."""
        steps = range(kv.shape[1] // length)
        places = [ring.whole_turn.moved(ring.index, -step - n) for n in steps]
        if len(places) == 1:
            mask = ring.shard_mask(places[0])
        else:
            mask = ring.mask(join(*map(ring.kv_tokens.shard, places)))
        return ring.chunk_forward(mask, q, kv, carry, is_last=is_last)

    def send(held: jax.Array, count: int) -> jax.Array:
        """Sends the first `count` shards as many places as there are shards."""
        places = held.shape[1] // length
        pairs = [(i, (i + places) % devices) for i in range(devices)]
        return ring.send(held[:, : count * length], pairs)

    # `held` are the last shards of those that came, up to `shards`. The group that is
    # next to be attended to are the last `size` of them.
    held, came, size = kv, 1, 1
    while came < devices:
        count = min(held.shape[1] // length, devices - came)
        trips = (devices - came) // shards
        if size == count == shards and trips > 1:

            def body(
                n: Index,
                state: tuple[jax.Array, Carry | None],
                first: int = came - size,
            ) -> tuple[jax.Array, Carry | None]:
                group, carry = state
                return together(
                    send(group, shards), attend(first + n * shards, group, carry)
                )

            held, carry = loop(0, trips, body, (held, carry))
            came += trips * shards
            continue
        group = held[:, -size * length :]
        arrived, held, carry = together(
            send(held, count), held, attend(came - size, group, carry)
        )
        held = jnp.concatenate([held, arrived], 1)[:, -shards * length :]
        came, size = came + count, count
    return attend(came - size, held[:, -size * length :], carry, is_last=True)

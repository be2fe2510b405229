"""The states before each chunk, from the affine maps of all chunks of the ring.

Maps compose, so a chunk need not wait for those before it: each device computes the
maps of its own chunks from no state, devices exchange maps, and each composes those
before its chunks. Two ways, of which `states_before` takes one by size:

    all-gather   one collective of all maps; each device goes through them in order.
                 Sends (R-1) · slots maps from a device, and holds R · slots.
    doubling     for each slot log2(R) permutes of a map (a Hillis-Steele scan) and one
                 of a state; between slots a sum of a state. Sends slots · log2(R) maps
                 and holds a few.

The backward is the same with transposed maps and the chunks in reverse.

slots = chunks of a device: 2 in zigzag, else 1.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from usp_jax.delta.contract import Map
from usp_jax.layout import shard_runs
from usp_jax.mesh import AxisName
from usp_jax.varying import vary_like

# Bytes of gathered maps that a device holds at most; more are composed by doubling.
MOST_GATHERED = 2**26


@dataclasses.dataclass(frozen=True)
class Order:
    """The chunks of all ring devices in the order in which a state passes them.

    Attributes:
      chunks: (device, slot) of each chunk.
    """

    chunks: tuple[tuple[int, int], ...]

    @property
    def slots(self) -> int:
        """Number of chunks on a device."""
        return 1 + max(slot for _, slot in self.chunks)

    @property
    def ring_size(self) -> int:
        """Number of devices."""
        return len(self.chunks) // self.slots

    @functools.cached_property
    def places(self) -> np.ndarray:
        """The place of each chunk in the order: [R, slots]."""
        places = np.empty((self.ring_size, self.slots), np.int32)
        for place, chunk in enumerate(self.chunks):
            places[chunk] = place
        return places

    @property
    def chains(self) -> list[tuple[int, list[int]]]:
        """Each slot and its devices, in order: a slot's chunks follow each other."""
        slots = dict.fromkeys(slot for _, slot in self.chunks)
        return [(slot, [d for d, s in self.chunks if s == slot]) for slot in slots]

    @property
    def reversed(self) -> "Order":
        """The order in which the gradient of a state passes the chunks."""
        return Order(self.chunks[::-1])


@functools.cache
def order_of(layout: str, ring_size: int) -> Order:
    """Makes the order of a layout whose shards are runs of consecutive positions."""
    first = shard_runs(layout, ring_size, 2)["first"]
    places = np.argsort(first, axis=None)
    return Order(tuple(divmod(place, first.shape[1]) for place in places.tolist()))


def gathers(maps: Map, ring_size: int) -> bool:
    """Returns True if the maps [B, slots, ...] of all devices may be held at once."""
    size = (maps.a.size + maps.b.size) * maps.b.dtype.itemsize
    return ring_size * size <= MOST_GATHERED


def states_before(
    maps: Map, start: jax.Array, order: Order, axis: AxisName, index: jax.Array | int
) -> jax.Array:
    """Computes the states before a device's own chunks.

    Args:
      maps: of the own chunks, [B, slots, ..., H, H] and [B, slots, ..., H, V].
      start: the state before the first chunk, [B, ..., H, V], the same on all devices.
      order: of all chunks.
      axis: the ring.
      index: this device's index on it.

    Returns:
      [B, slots, ..., H, V].
    """
    run = from_gathered if gathers(maps, order.ring_size) else by_doubling
    return run(maps, start, order, axis, index)


def from_gathered(
    maps: Map, start: jax.Array, order: Order, axis: AxisName, index: jax.Array | int
) -> jax.Array:
    """`states_before` by one all-gather of all maps."""
    gathered = lax.all_gather(_side_by_side(maps), axis)
    # [R, B, slots, ...] -> [R · slots, B, ...]
    chunks = jnp.moveaxis(gathered, 2, 1)
    chunks = chunks.reshape(-1, *chunks.shape[2:])
    stored = np.array([device * order.slots + slot for device, slot in order.chunks])

    def body(state: jax.Array, both: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _apply(_apart(both), state), state

    # No chunk comes after the last one.
    ordered = chunks[stored[:-1]]
    last, before = lax.scan(body, vary_like(start, ordered), ordered)
    before = jnp.concatenate([before, last[None]])
    return jnp.moveaxis(before[jnp.asarray(order.places)[index]], 0, 1)


def by_doubling(
    maps: Map, start: jax.Array, order: Order, axis: AxisName, index: jax.Array | int
) -> jax.Array:
    """`states_before` by permutes, each over twice the distance of the one before."""
    states: dict[int, jax.Array] = {}
    for slot, devices in order.chains:
        place = jnp.asarray(np.argsort(devices))[index]
        total = _of_all(Map(maps.a[:, slot], maps.b[:, slot]), axis, devices, place)
        after = _apply(total, start)
        before = _passed(after, axis, devices, 1)
        states[slot] = jnp.where(place == 0, start, before)
        if len(states) < order.slots:
            # The next chain starts where this one ends.
            end = jnp.where(place == len(devices) - 1, after, 0)
            start = vary_like(lax.psum(end, axis), after)
    return jnp.stack([states[slot] for slot in range(order.slots)], 1)


def _of_all(own: Map, axis: AxisName, devices: list[int], place: jax.Array) -> Map:
    """The map of a device's chunk and all chunks before it in its chain."""
    total, step = own, 1
    while step < len(devices):
        arrived = _apart(_passed(_side_by_side(total), axis, devices, step))
        more = _composed(arrived, total)
        # At the head of the chain nothing arrives: what is there is whole already.
        whole = place < step
        total = Map(
            jnp.where(whole, total.a, more.a), jnp.where(whole, total.b, more.b)
        )
        step *= 2
    return total


def _passed(x: jax.Array, axis: AxisName, devices: list[int], step: int) -> jax.Array:
    """Sends from each device of a chain to the one `step` places later."""
    pairs = list(zip(devices, devices[step:], strict=False))
    return lax.ppermute(x, axis, pairs)


def _composed(first: Map, then: Map) -> Map:
    """The map of two runs of chunks, one after the other."""
    return Map(_product(then.a, first.a), _apply(then, first.b))


def _apply(chunk: Map, state: jax.Array) -> jax.Array:
    return _product(chunk.a, state) + chunk.b


def _product(a: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.matmul(a, x, precision=lax.Precision.HIGHEST)


def _side_by_side(maps: Map) -> jax.Array:
    return jnp.concatenate([maps.a, maps.b], -1)


def _apart(both: jax.Array) -> Map:
    size = both.shape[-2]
    return Map(both[..., :size], both[..., size:])

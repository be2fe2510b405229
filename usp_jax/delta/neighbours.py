"""The few tokens before each run of a device's tokens, from the devices that have them.

`Halo` sends them; here they are put in front of the runs. Numpy makes the tables on the
host. D = number of devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from usp_jax.halo import Halo, halo_of
from usp_jax.masking import MaskRule


@dataclasses.dataclass(frozen=True, eq=False)
class Neighbours:
    """The tokens just before each run of a device's tokens.

    Attributes:
      halo: how they get there.
      table: [D, runs, W - 1], their indices in the device's own tokens, its halo and,
        after these, one token that is not there.
    """

    halo: Halo
    table: np.ndarray


@functools.cache
def neighbours_of(
    layout: str, ring_size: int, ulysses_size: int, length: int, reach: int
) -> Neighbours:
    """Makes the tables for `length` tokens on a device and `reach` tokens before each.

    Args:
      layout: one whose shards are runs of consecutive positions.
    """
    rule = MaskRule(is_causal=True, left=reach)
    halo = halo_of(layout, ring_size, ulysses_size, length, rule)
    table = np.full((*halo.own.shape, reach), length + halo.length)
    for device, firsts in enumerate(halo.own):
        there = {
            first + i: slot * halo.piece + i
            for slot, first in enumerate(firsts)
            for i in range(halo.piece)
        }
        start = length
        for block in halo.blocks:
            for i in range(*block.new[device]):
                there[block.first[device] + i] = start + i
            start += block.length
        for slot, first in enumerate(firsts):
            for i, position in enumerate(range(first - reach, first)):
                table[device, slot, i] = there.get(position, table[device, slot, i])
    return Neighbours(halo, table)


@dataclasses.dataclass(frozen=True)
class Past:
    """The neighbours as one device sees them.

    Attributes:
      axes: those that split the sequence.
      device: this device's index on them.
    """

    neighbours: Neighbours
    axes: tuple[str, ...]
    device: jax.Array | int

    def shifted(self, x: jax.Array) -> list[jax.Array]:
        """The token j before each token, [B, t, ...], for j < W; 0 before the row."""
        halo, table = self.neighbours.halo, jnp.asarray(self.neighbours.table)
        nothing = jnp.zeros_like(x[:, :1])
        there = jnp.concatenate([x, halo.receive(x, self.axes), nothing], 1)
        before = there[:, table[self.device]]
        runs = x.reshape(len(x), table.shape[1], -1, *x.shape[2:])
        both, reach = jnp.concatenate([before, runs], 2), table.shape[2]
        starts = range(reach, -1, -1)
        return [both[:, :, i : i + runs.shape[2]].reshape(x.shape) for i in starts]

    def positions(self) -> jax.Array:
        """The positions of the device's own tokens, [t]."""
        return self.neighbours.halo.own_positions(self.device)

    def places(self, positions: jax.Array) -> jax.Array:
        """The indices of the tokens at some positions; t for those of other devices."""
        halo = self.neighbours.halo
        firsts = jnp.asarray(halo.own, jnp.int32)[self.device]
        offset = positions[..., None] - firsts.reshape((1,) * positions.ndim + (-1,))
        runs = jnp.arange(len(firsts), dtype=jnp.int32) * halo.piece
        places = offset + runs.reshape((1,) * positions.ndim + (-1,))
        is_there = (offset >= 0) & (offset < halo.piece)
        length = halo.piece * len(firsts)
        return jnp.where(is_there, places, length).min(-1)

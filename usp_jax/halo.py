"""The halo: the keys around a device's own tokens that a window reaches.

To a window, all devices that share a sequence are one chain, whichever axes they are
on. Their tokens are cut into pieces of consecutive positions, one or two per device. A
piece needs the ends of the pieces before it as far as the window reaches backwards, and
the starts of those after it as far as it reaches forwards. Which device sends what to
which is computed with numpy on the host; no token is sent to a device that has it.

    own keys [B, t, ...]
      | receive      ppermutes over the chain, each of the tokens in reach
    halo [B, s, ...], to be put after the own keys
      | send_back    the transpose, for their gradients
    [B, t, ...]

D = number of devices.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from usp_jax.layout import shard_runs
from usp_jax.masking import MaskRule, Tokens

Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Hop:
    """One permute.

    Attributes:
      rows: the tokens of a device's shard that are sent.
      pairs: the (source, target) devices.
    """

    rows: slice
    pairs: Pairs


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """Consecutive tokens that a device receives from one other, or from none.

    Attributes:
      length: number of tokens.
      hops: the permutes; at most one of them sends to any device.
      first: [D], the position of the first token on each device.
      new: [D, 2], start and stop of the tokens that a device does not have already.
    """

    length: int
    hops: tuple[Hop, ...]
    first: np.ndarray
    new: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Halo:
    """The tables of a halo, for all devices.

    Attributes:
      own: [D, pieces], the first position of each of a device's pieces.
      piece: number of tokens in a piece.
      hidden: a position that no query sees.
    """

    own: np.ndarray
    piece: int
    blocks: tuple[Block, ...]
    hidden: int

    @property
    def length(self) -> int:
        """s, the number of tokens that a device has room for."""
        return sum(block.length for block in self.blocks)

    @property
    def sent(self) -> int:
        """Number of tokens that all permutes together send."""
        return sum(block.length * len(block.hops) for block in self.blocks)

    def receive(
        self, x: Shaped[Array, "B t *rest"], axes: tuple[str, ...]
    ) -> Shaped[Array, "B s *rest"]:
        """Sends the ends of this device's pieces, and receives the halo.

        Tokens that a device does not receive are 0.

        Args:
          axes: the axes of the chain, outermost first.
        """

        def arrived(block: Block) -> jax.Array:
            # All but at most one of the parts are zeros.
            parts = (_permuted(x[:, hop.rows], axes, hop.pairs) for hop in block.hops)
            return functools.reduce(operator.add, parts)

        if not self.blocks:
            return x[:, :0]
        return jnp.concatenate([arrived(block) for block in self.blocks], 1)

    def send_back(
        self, dx: Float[Array, "B S *rest"], axes: tuple[str, ...]
    ) -> Float[Array, "B t *rest"]:
        """Adds the gradients of the halo to those of the devices that own the tokens.

        Args:
          dx: gradients of this device's tokens and, after them, of its halo.
          axes: the axes of the chain, outermost first.
        """
        start = dx.shape[1] - self.length
        total = dx[:, :start]
        for block in self.blocks:
            part = dx[:, start : start + block.length]
            start += block.length
            for hop in block.hops:
                back = tuple((target, source) for source, target in hop.pairs)
                total = total.at[:, hop.rows].add(_permuted(part, axes, back))
        return total

    def own_positions(self, device: Int[Array, ""] | int) -> Int[Array, " t"]:
        """Positions of a device's own tokens."""
        first = jnp.asarray(self.own, jnp.int32)[device]
        return (first[:, None] + lax.iota(jnp.int32, self.piece)[None]).reshape(-1)

    def positions(self, device: Int[Array, ""] | int) -> Int[Array, " s"]:
        """Positions of a device's halo; those of tokens that are not new are hidden."""

        def of_block(block: Block) -> jax.Array:
            first = jnp.asarray(block.first, jnp.int32)[device]
            start, stop = jnp.asarray(block.new, jnp.int32)[device]
            tokens = lax.iota(jnp.int32, block.length)
            is_new = (tokens >= start) & (tokens < stop)
            return jnp.where(is_new, first + tokens, self.hidden)

        none = jnp.zeros((0,), jnp.int32)
        return jnp.concatenate([none, *map(of_block, self.blocks)])

    def tokens(
        self,
        device: Int[Array, ""] | int,
        segment_ids: tuple[jax.Array, jax.Array] | None,
        arrived_ids: Int[Array, "B s"] | None,
    ) -> tuple[Tokens, Tokens]:
        """The tokens of a device's queries, and of its own keys and its halo.

        Args:
          segment_ids: those of the queries and of the own keys, [B, t], or None.
          arrived_ids: those of the halo's keys.
        """
        own = self.own_positions(device)
        keys = jnp.concatenate([own, self.positions(device)])[None]
        if segment_ids is None or arrived_ids is None:
            return Tokens(own[None]), Tokens(keys)
        ids = jnp.concatenate([segment_ids[1], arrived_ids], 1)
        return Tokens(own[None], segment_ids[0]), Tokens(keys, ids)


def has_runs(layout: str, ring_size: int) -> bool:
    """Returns True if a ring shard of a layout is runs of consecutive positions."""
    return bool((shard_runs(layout, ring_size, 2 * ring_size)["stride"] == 1).all())


def _permuted(x: jax.Array, axes: tuple[str, ...], pairs: Pairs) -> jax.Array:
    """`lax.ppermute` over a chain; a device that receives nothing gets zeros."""
    # jax numbers the devices by the axes in the order of the mesh.
    names = jax.sharding.get_abstract_mesh().axis_names
    ordered = tuple(name for name in names if name in axes)
    sizes = [lax.axis_size(name) for name in axes]
    chain = np.arange(math.prod(sizes)).reshape(sizes)
    chain = chain.transpose([axes.index(name) for name in ordered]).ravel()
    number = np.argsort(chain).tolist()
    return lax.ppermute(x, ordered, [(number[i], number[j]) for i, j in pairs])


@functools.cache
def halo_of(
    layout: str, ring_size: int, ulysses_size: int, length: int, rule: MaskRule
) -> Halo:
    """Makes the tables of the halo around the `length` tokens of each device.

    Args:
      layout: one that `has_runs`.
      rule: a mask with bounds on both sides.
    """
    assert rule.before is not None and rule.after is not None
    runs = shard_runs(layout, ring_size, ulysses_size * length).ravel()
    # Two pieces per device if some device's tokens are in two runs.
    piece = math.gcd(length, *runs["count"].tolist())
    # The first position of each piece, in the order in which devices store them.
    own = np.concatenate([x["first"] + np.arange(0, x["count"], piece) for x in runs])
    chain = _Chain(piece, length // piece, tuple(np.argsort(own).tolist()))
    blocks = (
        chain.block(slot, offset, size)
        for offset, size in _offsets(rule.before, rule.after, piece, len(own))
        for slot in range(chain.slots)
    )
    return Halo(
        own=own.reshape(-1, chain.slots),
        piece=piece,
        blocks=tuple(block for block in blocks if block.hops),
        hidden=-rule.before - 1,
    )


def _offsets(
    before: int, after: int, piece: int, count: int
) -> Iterator[tuple[int, int]]:
    """Yields the distances in pieces from a source to its targets, nearest first.

    Each with the number of tokens sent; a source before its target has a positive one.
    """
    for n in range(1, count):
        for reach, offset in ((before, n), (after, -n)):
            if (size := min(piece, reach - (n - 1) * piece)) > 0:
                yield offset, size


@dataclasses.dataclass(frozen=True, eq=False)
class _Chain:
    """All pieces in the order of their positions, and what each device has received.

    Attributes:
      slots: number of pieces on a device.
      places: for each piece, device · slots + slot.
      had: numbers of a piece's first and of its last tokens that a device has, by
        device and piece.
    """

    piece: int
    slots: int
    places: tuple[int, ...]
    had: dict[tuple[int, int], tuple[int, int]] = dataclasses.field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        for number, place in enumerate(self.places):
            self.had[place // self.slots, number] = self.piece, 0

    def block(self, slot: int, offset: int, size: int) -> Block:
        """The block of all devices for the pieces in one slot, from one distance."""
        # The last tokens of a piece before the target, or the first of one after it.
        start = self.piece - size if offset > 0 else 0
        devices = len(self.places) // self.slots
        first, new = np.zeros(devices, int), np.zeros((devices, 2), int)
        pairs: dict[int, list[tuple[int, int]]] = {}
        for number, place in enumerate(self.places):
            source = number - offset
            if place % self.slots != slot or not 0 <= source < len(self.places):
                continue
            target = place // self.slots
            begin, end = self._received(target, source, start, start + size)
            if begin < end:
                first[target] = source * self.piece + start
                new[target] = begin - start, end - start
                device, of = divmod(self.places[source], self.slots)
                pairs.setdefault(of, []).append((device, target))
        hops = []
        for of, sent in sorted(pairs.items()):
            begin = of * self.piece + start
            hops.append(Hop(slice(begin, begin + size), tuple(sent)))
        return Block(size, tuple(hops), first, new)

    def _received(
        self, device: int, piece: int, start: int, stop: int
    ) -> tuple[int, int]:
        """Notes that a device receives some tokens, and returns which are new to it."""
        head, tail = self.had.get((device, piece), (0, 0))
        new = max(start, head), min(stop, self.piece - tail)
        if start == 0:
            head = max(head, stop)
        if stop == self.piece:
            tail = max(tail, stop - start)
        self.had[device, piece] = head, tail
        return new

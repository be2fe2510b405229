"""The ring as one device sees it, and a turn of it as data.

Step s of a turn is between hop s and hop s + 1; at step 0 a device holds its own shard.
`Turn` defines which device sends to which, and which shard each then holds. `Ring`
sends, and passes the held shard to the kernel.
"""

import dataclasses
import itertools
from collections.abc import Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from usp_jax.kernels import Carry, Chunk
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask, MaskRule, Tokens, join
from usp_jax.mesh import AxisName, axis_names
from usp_jax.ring.keys import Keys, SideBySide, Stays
from usp_jax.ring.tables import RingTables
from usp_jax.ring.tokens import RingTokens

# An index on the axis or a number of steps: an int, or the counter of a loop.
Index = Int[Array, ""] | int
Pairs = Iterable[tuple[int, int]]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One turn of a ring, or of several equal rings along the axis.

    Attributes:
      size: number of devices in one ring, and so of steps.
      stride: distance on the axis between neighbours in the ring.
      lanes: direction in which each equal part of a shard's tokens travels: 1 to the
        next device, -1 to the previous one.
    """

    size: int
    stride: int = 1
    lanes: tuple[int, ...] = (1,)

    def moved(self, device: Index, steps: Index) -> Index:
        """The device that is `steps` further along the ring."""
        place = device // self.stride % self.size
        start = device - place * self.stride
        return start + (place + steps) % self.size * self.stride

    def pairs(self, devices: int, direction: int = 1) -> Pairs:
        """The (source, target) pairs of one hop, for all devices of the axis."""
        return [(i, int(self.moved(i, direction))) for i in range(devices)]


@dataclasses.dataclass(frozen=True)
class Ring:
    """A ring of devices, and the computation of each on the shard that it holds.

    Attributes:
      index: this device's index on the axis.
      chunk: the kernel.
      keys: what a visit makes of the array that travels.
      held: the shard that each equal part of the held keys comes from; () is this
        device's own.
      rounds_dkv: whether kv's gradient may be rounded to its dtype after the ring, as
        nothing else is added to it.
      is_sent: whether kv is in one array for a collective. If not, compilers leave out
        that array, and a kernel that reads it would need a copy.
      tables: the block tables of masks that were made before.
    """

    axis_name: AxisName | None
    index: Index
    chunk: Chunk
    keys: Keys
    rule: MaskRule
    logits: Logits
    q_tokens: RingTokens
    kv_tokens: RingTokens
    held: tuple[Index, ...] = ()
    rounds_dkv: bool = False
    is_sent: bool = True
    tables: RingTables = RingTables()

    @property
    def devices(self) -> int:
        """Number of devices on the axis."""
        return self.kv_tokens.ring_size

    @property
    def whole_turn(self) -> Turn:
        """The turn in which every shard visits every device in order."""
        return Turn(self.devices)

    def at(self, turn: Turn, step: Index) -> "Ring":
        """Returns the ring with the shards this device holds at a step of a turn."""
        (start,) = self.held or (self.index,)
        held = tuple(turn.moved(start, -direction * step) for direction in turn.lanes)
        return dataclasses.replace(self, held=held)

    def send(self, x: T, pairs: Pairs) -> T:
        """Sends `x` from each pair's first device to its second.

        A device that receives nothing must not read the result. It gets zeros, or under
        `jax.vmap`, where all devices must permute, another device's value.
        """
        pairs = list(pairs)
        assert self.axis_name is not None
        manual = jax.sharding.get_abstract_mesh().manual_axes
        if not set(axis_names(self.axis_name)) <= set(manual):
            sources, targets = (set(side) for side in zip(*pairs, strict=True))
            idle = [n for n in range(self.devices) if n not in sources]
            free = [n for n in range(self.devices) if n not in targets]
            pairs += zip(idle, free, strict=True)
        sent: T = jax.tree.map(
            lambda leaf: lax.ppermute(leaf, self.axis_name, pairs), x
        )
        return sent

    def hop(self, turn: Turn, x: T) -> T:
        """Sends `x` one hop along a turn, and receives a neighbour's.

        With several lanes, the tokens of arrays [B, S, ...] are split among them.
        """

        def sent(leaf: jax.Array) -> jax.Array:
            lanes = zip(_parts(leaf.shape[1], len(turn.lanes)), turn.lanes, strict=True)
            parts = [
                self.send(leaf[:, rows], turn.pairs(self.devices, direction))
                for rows, direction in lanes
                if rows.start < rows.stop
            ]
            return jnp.concatenate(parts, 1)

        if len(turn.lanes) == 1:
            return self.send(x, turn.pairs(self.devices, turn.lanes[0]))
        moved: T = jax.tree.map(sent, x)
        return moved

    def held_tokens(self) -> Tokens:
        """The tokens of the keys that this device holds."""
        shards = [self.kv_tokens.shard(place) for place in self.held or (self.index,)]
        if len(shards) == 1:
            return shards[0]
        rows = _parts(self.kv_tokens.length, len(shards))
        return join(*(shard.cut(own) for shard, own in zip(shards, rows, strict=True)))

    def mask(self, keys: Tokens) -> Mask:
        """The mask of this device's queries against some keys."""
        return Mask(self.rule, self.q_tokens.shard(self.index), keys)

    def shard_mask(self, place: Index) -> Mask:
        """The mask of this device's queries against a whole shard of keys."""
        mask = self.mask(self.kv_tokens.shard(place))
        return dataclasses.replace(mask, tables=self.tables.of(place))

    def held_mask(self, rows: slice = slice(None)) -> Mask:
        """The mask of some of this device's queries against the held keys."""
        places = self.held or (self.index,)
        start, stop, _ = rows.indices(self.q_tokens.length)
        if (start, stop) != (0, self.q_tokens.length):
            mask = self.mask(self.held_tokens()).rows(rows)
            return dataclasses.replace(mask, tables=self.tables.of_own(start, stop))
        if len(places) > 1:
            return self.mask(self.held_tokens())
        return self.shard_mask(places[0])

    def chunk_forward(
        self,
        mask: Mask,
        q: jax.Array,
        kv: jax.Array,
        carry: Carry | None,
        *,
        is_last: bool = False,
    ) -> Carry:
        """Runs the kernel's forward pass on the keys made of `kv`.

        Args:
          is_last: whether out is not merged any more, so that a kernel may round it to
            the dtype of q.
        """
        direct, logits = self.chunk.direct, self.logits
        if direct is None:
            return self.chunk.forward(q, *self.keys.of(kv), mask, carry, logits)
        dtype = q.dtype if is_last else None
        return direct.forward(q, *self._uncopied(kv), mask, carry, logits, dtype=dtype)

    def chunk_backward(
        self,
        mask: Mask,
        q: jax.Array,
        kv: jax.Array,
        dout: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        *,
        is_only: bool = False,
    ) -> tuple[Stays, jax.Array]:
        """Runs the kernel's backward pass: the gradients that stay, and that of kv.

        Args:
          is_only: whether no other chunk adds to these gradients, so that a kernel may
            round dq, and kv's gradient if `rounds_dkv`.
        """
        direct, logits = self.chunk.direct, self.logits
        if direct is None:
            k, v = self.keys.of(kv)
            dq, dk, dv = self.chunk.backward(q, k, v, dout, lse, delta, mask, logits)
            params, dkv = self.keys.gradients(kv, dk, dv)
            return (dq, params), dkv
        dq_dtype = q.dtype if is_only else None
        dtypes = dq_dtype, dq_dtype if self.rounds_dkv else None
        keys, values = self._uncopied(kv)
        dq, dkv, more = direct.backward(
            q, keys, values, dout, lse, delta, mask, logits, dtypes=dtypes
        )
        params = None
        if more is not None:
            params, dkv = self.keys.gradients(kv, dkv, more)
        return (dq, params), dkv

    def _uncopied(self, kv: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """The keys and values of a `Direct` kernel."""
        if self.is_sent and isinstance(self.keys, SideBySide):
            return kv, None
        return self.keys.of(kv)

    def held_forward(
        self,
        q: jax.Array,
        kv: jax.Array,
        carry: Carry | None,
        *,
        is_last: bool = False,
    ) -> Carry:
        """Attends with this device's queries to the held keys."""
        return self.chunk_forward(self.held_mask(), q, kv, carry, is_last=is_last)

    def held_backward(
        self,
        kv: jax.Array,
        rows: slice,
        q: jax.Array,
        dout: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        *,
        is_only: bool = False,
    ) -> tuple[Stays, jax.Array]:
        """Gradients of `held_forward` for some query rows, as in `chunk_backward`.

        Args:
          rows: the rows of q, dout, lse and delta to use.
        """
        mask = self.held_mask(rows)
        q, dout, lse, delta = (x[:, rows] for x in (q, dout, lse, delta))
        return self.chunk_backward(mask, q, kv, dout, lse, delta, is_only=is_only)


def _parts(length: int, count: int) -> list[slice]:
    """Splits tokens into equal runs; the last is shorter if `count` does not divide."""
    size = -(-length // count)
    bounds = [min(i * size, length) for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]

"""The ring: key/value shards travel round, and every device attends to each in turn.

Ring Attention (Liu et al., arXiv 2310.01889) over any chunk implementation. At step s
the device with ring index r holds the keys and values of shard (r - s) mod R; step 0 is
its own. Each rotation is issued beside a chunk that does not need it, so that it can be
in flight while the chunk is computed, and no rotation is made that nobody reads:
R - 1 forward, and backward R - 1 of k, v and R - 1 of dk, dv.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from usp_jax.kernels import Carry, Chunk
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask, MaskRule, Tokens
from usp_jax.tokens import RingTokens

ALL = slice(None)
# Of a turn: a number, or a loop's counter.
Step = int | jax.Array
Pair = tuple[jax.Array, jax.Array]


def side_by_side(
    k: Float[Array, "B S K H"], v: Float[Array, "B S K V"]
) -> Float[Array, "B S K H+V"]:
    """k, v as one array, so that one collective moves both."""
    return jnp.concatenate([k, v], -1)


def apart(
    kv: Float[Array, "B S K D"], head_size: int
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """The inverse of `side_by_side` for keys of a head size."""
    return kv[..., :head_size], kv[..., head_size:]


@dataclasses.dataclass(frozen=True)
class Ring:
    """A ring of devices, and what each does with the keys and values that it holds.

    Attributes:
      index: this device's place on the axis.
    """

    axis_name: str | None
    index: Int[Array, ""] | int
    chunk: Chunk
    rule: MaskRule
    logits: Logits
    q_tokens: RingTokens
    kv_tokens: RingTokens

    @property
    def devices(self) -> int:
        """The number of devices of the axis."""
        return self.kv_tokens.ring_size

    @property
    def size(self) -> int:
        """The number of steps of one turn."""
        return self.devices

    def send(
        self,
        x: jax.Array | Pair,
        pairs: Iterable[tuple[int, int]],
    ) -> Any:
        """`x` from each pair's first device to its second.

        Who is sent nothing has to read nothing: it gets zeros, or under `jax.vmap`,
        which permutes all or none, what another has.
        """
        pairs = list(pairs)
        if self.axis_name not in jax.sharding.get_abstract_mesh().manual_axes:
            sources, targets = (set(side) for side in zip(*pairs, strict=True))
            idle = [n for n in range(self.devices) if n not in sources]
            free = [n for n in range(self.devices) if n not in targets]
            pairs += zip(idle, free, strict=True)
        return jax.tree.map(lambda leaf: lax.ppermute(leaf, self.axis_name, pairs), x)

    def rotate(self, x: jax.Array | Pair) -> Any:
        """Sends `x` to the next device of the ring, and receives the previous one's."""
        return self.send(x, [(i, (i + 1) % self.size) for i in range(self.size)])

    def held(self, step: Step) -> Tokens:
        """The tokens of the keys that this device holds at a step."""
        return self.kv_tokens.shard((self.index - step) % self.size)

    def mask(self, keys: Tokens) -> Mask:
        """This device's queries against some keys."""
        return Mask(self.rule, self.q_tokens.shard(self.index), keys)

    def chunk_forward(
        self, mask: Mask, q: jax.Array, kv: jax.Array, carry: Carry | None
    ) -> Carry:
        """The chunk's forward, of k, v side by side."""
        k, v = apart(kv, q.shape[-1])
        return self.chunk.forward(q, k, v, mask, carry, self.logits)

    def chunk_backward(
        self,
        mask: Mask,
        q: jax.Array,
        kv: jax.Array,
        dout: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
    ) -> Pair:
        """The chunk's backward: dq, and dk, dv side by side."""
        k, v = apart(kv, q.shape[-1])
        dq, *dkv = self.chunk.backward(q, k, v, dout, lse, delta, mask, self.logits)
        return dq, side_by_side(*dkv)

    def attend(
        self, step: Step, q: jax.Array, kv: jax.Array, carry: Carry | None
    ) -> Carry:
        """This device's queries to the keys that it holds at a step."""
        return self.chunk_forward(self.mask(self.held(step)), q, kv, carry)

    def pull_back(
        self,
        step: Step,
        kv: jax.Array,
        rows: slice,
        q: jax.Array,
        dout: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
    ) -> Pair:
        """dq of some rows of queries, and dk, dv side by side, from the keys held."""
        mask = self.mask(self.held(step)).rows(rows)
        q, dout, lse, delta = (x[:, rows] for x in (q, dout, lse, delta))
        return self.chunk_backward(mask, q, kv, dout, lse, delta)

    def own_rows(self, length: int) -> list[slice]:
        """How the queries are cut for step 0: work for the first hop and the last."""
        half = -(-length // 2)
        return [slice(half), slice(half, length)][:length]

    def into(self, kind: type["Ring"], **more: Any) -> "Ring":
        """The same devices, tokens and chunk as a ring of another kind."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(Ring)}
        return kind(**fields, **more)


def ring_forward(
    ring: Ring,
    q: Float[Array, "B T n H"],
    kv: Float[Array, "B S m D"],
    carry: Carry | None = None,
) -> Carry:
    """Attention of this device's queries to the keys of the whole ring.

    Args:
      kv: this device's keys and values, `side_by_side`.
      carry: what was seen before the ring, an attention sink for instance.

    Returns:
      out [B, T, n, V] and lse [B, T, n] in the accumulation dtype.
    """

    def body(step: Step, state: tuple[Any, ...]) -> tuple[Any, ...]:
        kv, carry = state
        return ring.rotate(kv), ring.attend(step, q, kv, carry)

    if ring.size == 1:
        return ring.attend(0, q, kv, carry)
    # Together, or a hop inside the next step would not have to wait for this one.
    kv, carry = together(*body(0, (kv, carry)))
    kv, carry = _loop(1, ring.size - 1, body, (kv, carry))
    return ring.attend(ring.size - 1, q, kv, carry)


def ring_backward(
    ring: Ring,
    q: Float[Array, "B T n H"],
    kv: Float[Array, "B S m D"],
    dout: Float[Array, "B T n V"],
    lse: Float[Array, "B T n"],
    delta: Float[Array, "B T n"],
) -> tuple[Float[Array, "B T n H"], Float[Array, "B S m D"]]:
    """dq and dk, dv (side by side) of `ring_forward`, in the accumulation dtype."""

    def part(step: Step, kv: jax.Array, rows: slice) -> Pair:
        return ring.pull_back(step, kv, rows, q, dout, lse, delta)

    def join(first: list[jax.Array], rest: Pair) -> Pair:
        dq = first[0], rest[0]
        return _all_rows(*dq, q.shape[1]), first[1] + rest[1]

    return turn(ring, kv, part, ring.own_rows(q.shape[1]), add=jnp.add, join=join)


def turn(
    ring: Ring,
    visitor: Any,
    part: Callable[[Step, Any, slice], tuple[Any, Any]],
    own_rows: list[slice],
    *,
    add: Callable[[Any, Any], Any],
    join: Callable[[Any, Any], Any],
) -> tuple[Any, Any]:
    """One turn of a ring in which sums follow the visitors that they belong to.

    The sums travel one hop late: at each step the sum over the steps before is on its
    way while this step's part is computed. The own visitor's part stays at home; the
    travelling sum starts at step 1 and comes home after the last. The first hop and the
    last have no such step: beside each, some rows of the queries meet their own shard.

    Args:
      visitor: what travels and is read only.
      part: (step, visitor, rows) -> (what stays on this device, what follows).
      own_rows: the runs of queries, one or two, that step 0 is cut into.
      add: adds two followers.
      join: puts the results of the two runs together.

    Returns:
      The total that stayed, and the total of this device's own visitor.
    """
    last = ring.size - 1
    if not last:
        return part(0, visitor, ALL)

    def late(
        step: Step,
        visitor: jax.Array | Pair,
        stays: jax.Array | None,
        travels: jax.Array,
    ) -> tuple[jax.Array | None, jax.Array]:
        """One step after the first: the sum arrives while this step's part is made."""
        arrived = ring.rotate(travels)
        more, new = part(step, visitor, ALL)
        return _sum(stays, more), add(arrived, new)

    def body(step: Step, state: tuple[Any, ...]) -> tuple[Any, ...]:
        visitor, *sums = state
        return together(ring.rotate(visitor), *late(step, visitor, *sums))

    own = visitor
    visitor, *home = together(ring.rotate(own), *part(0, own, own_rows[0]))
    following = ring.rotate(visitor) if last > 1 else None
    visitor, *sums = together(following, *part(1, visitor, ALL))
    if last > 1:
        visitor, *sums = _loop(2, last, body, (visitor, *sums))
        sums = late(last, visitor, *sums)
    own, stays, travels = together(own, *sums)
    arrived = ring.rotate(travels)
    for rows in own_rows[1:]:
        home = join(home, part(0, own, rows))
    return together(_sum(stays, home[0]), add(arrived, home[1]))


def together(*values: Any) -> Any:
    """The values, none of them there before the others.

    A hop then has no later work to wait beside: schedulers would leave some without.
    """
    return lax.optimization_barrier(values)


def _all_rows(dq: jax.Array, more: jax.Array, length: int) -> jax.Array:
    """dq of all rows: `more` goes on after those of `dq`, or into its last ones.

    Rows that neither has are 0.
    """
    if dq.shape[1] == length:
        return dq.at[:, -more.shape[1] :].add(more)
    dq = jnp.concatenate([dq, more], 1)
    return jnp.pad(dq, [(0, 0), (0, length - dq.shape[1]), (0, 0), (0, 0)])


def _sum(a: jax.Array | None, b: jax.Array | None) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _loop(
    start: int, stop: int, body: Callable[..., Any], state: tuple[Any, ...]
) -> tuple[Any, ...]:
    """A loop in the compiled program; none when it has no trips."""
    return lax.fori_loop(start, stop, body, state) if start < stop else state

"""The steps of the ring, forward and backward, for schedules that are lists of turns.

Ring Attention (Liu et al., arXiv 2310.01889) over any kernel. The keys and values of
each shard travel round the ring, and every device attends to each in turn. A hop is
issued beside a chunk that does not need it, so that it can be in flight while the chunk
is computed, and no hop is made that nobody reads: R - 1 forward, and backward R - 1 of
k, v and R - 1 of dk, dv.

A schedule is a tuple of turns, outermost first. With several, one step of a turn is a
whole turn of the next one, starting from what is then held.
"""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from usp_jax.kernels import Carry
from usp_jax.ring.ring import Index, Ring, Turn

ALL = slice(None)
V = TypeVar("V")
S = TypeVar("S")
F = TypeVar("F")
Ts = TypeVarTuple("Ts")


def ring_forward(
    ring: Ring,
    turns: tuple[Turn, ...],
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
    turn, *inner = turns

    def attend(step: Index, kv: jax.Array, carry: Carry | None) -> Carry:
        here = ring.at(turn, step)
        if inner:
            return ring_forward(here, tuple(inner), q, kv, carry)
        return here.held_forward(q, kv, carry)

    def body(step: Index, state: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
        kv, carry = state
        return ring.hop(turn, kv), attend(step, kv, carry)

    if turn.size == 1:
        return attend(0, kv, carry)
    # Together, or a hop inside the next step would not have to wait for this one.
    first = together(ring.hop(turn, kv), attend(0, kv, carry))
    kv, carry = _loop(1, turn.size - 1, body, first)
    return attend(turn.size - 1, kv, carry)


def ring_backward(
    ring: Ring,
    turns: tuple[Turn, ...],
    q: Float[Array, "B T n H"],
    kv: Float[Array, "B S m D"],
    dout: Float[Array, "B T n V"],
    lse: Float[Array, "B T n"],
    delta: Float[Array, "B T n"],
    own: int | None = None,
) -> tuple[Float[Array, "B T n H"], Float[Array, "B S m D"]]:
    """dq and dk, dv (side by side) of `ring_forward`, in the accumulation dtype.

    Args:
      own: how many of the queries meet their own shard at step 0; None is all.
    """
    turn, *inner = turns

    def part(step: Index, kv: jax.Array, rows: slice) -> tuple[jax.Array, jax.Array]:
        here = ring.at(turn, step)
        # What the own inner turn left over is one chunk of its own.
        if inner and inner[0].size > 1 and not rows.start:
            turns = tuple(inner)
            return ring_backward(here, turns, q, kv, dout, lse, delta, own=rows.stop)
        return here.held_backward(kv, rows, q, dout, lse, delta)

    def join(
        first: tuple[jax.Array, jax.Array], rest: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return _all_rows(first[0], rest[0], q.shape[1]), first[1] + rest[1]

    # An inner turn beside the first outer hop takes longer than a chunk at the end.
    rows = own_rows(q.shape[1] if own is None else own, 3 if inner else 2)
    return take_turn(ring, turn, kv, part, rows, add=jnp.add, join=join)


def own_rows(length: int, share: int = 2) -> list[slice]:
    """How the queries are cut for step 0: work for the first hop, and for the last.

    Args:
      share: the last hop gets one in so many of the queries.
    """
    left = length // share
    return [slice(length - left), slice(length - left, length)][: 1 + bool(left)]


def take_turn(
    ring: Ring,
    turn: Turn,
    visitor: V,
    part: Callable[[Index, V, slice], tuple[S, F]],
    rows: list[slice],
    *,
    add: Callable[[F, F], F],
    join: Callable[[tuple[S, F], tuple[S, F]], tuple[S, F]],
) -> tuple[S, F]:
    """One turn of a ring in which sums follow the visitors that they belong to.

    The sums travel one hop late, so that both hops of a step have work beside them. The
    own visitor's part stays at home; the travelling sum starts at step 1 and comes home
    after the last. The first hop and the last have no other step beside them, so some
    rows of the queries meet their own shard beside each. For R = 4, in time:

        computed       own, rows[0]   step 1   step 2   step 3    own, rows[1]
        visitor hop    1              2        3
        sum hop                                1        2         3, home

    Args:
      visitor: what travels and is read only.
      part: (step, visitor, rows) -> (what stays on this device, what follows).
      rows: of `own_rows`.
      add: adds two followers.
      join: puts the results of the two runs of rows together.

    Returns:
      The total that stayed, and the total of this device's own visitor.
    """
    last = turn.size - 1
    if not last:
        return part(0, visitor, ALL)

    def late(step: Index, visitor: V, stays: S, travels: F) -> tuple[S, F]:
        """One step after the first: the sum arrives while this step's part is made."""
        arrived = ring.hop(turn, travels)
        more, new = part(step, visitor, ALL)
        return _sum(stays, more), add(arrived, new)

    def body(step: Index, state: tuple[V, S, F]) -> tuple[V, S, F]:
        visitor, stays, travels = state
        return together(ring.hop(turn, visitor), *late(step, visitor, stays, travels))

    own = visitor
    visitor, stays, travels = together(ring.hop(turn, own), *part(0, own, rows[0]))
    at_home = stays, travels
    if last == 1:
        stays, travels = together(*part(1, visitor, ALL))
    else:
        state = together(ring.hop(turn, visitor), *part(1, visitor, ALL))
        visitor, stays, travels = _loop(2, last, body, state)
        stays, travels = late(last, visitor, stays, travels)
    own, stays, travels = together(own, stays, travels)
    arrived = ring.hop(turn, travels)
    for more in rows[1:]:
        at_home = join(at_home, part(0, own, more))
    return together(_sum(stays, at_home[0]), add(arrived, at_home[1]))


def together(*values: *Ts) -> tuple[*Ts]:
    """The values, none of them ready before the others.

    A hop then has no later work to wait beside: schedulers would leave some without.
    """
    after: tuple[*Ts] = lax.optimization_barrier(values)
    return after


def _all_rows(dq: jax.Array, more: jax.Array, length: int) -> jax.Array:
    """dq of all rows: `more` follows the rows of `dq`, or is added to its last ones.

    Rows that neither has are 0.
    """
    if dq.shape[1] == length:
        return dq.at[:, -more.shape[1] :].add(more)
    dq = jnp.concatenate([dq, more], 1)
    return jnp.pad(dq, [(0, 0), (0, length - dq.shape[1]), (0, 0), (0, 0)])


def _sum(a: S, b: S) -> S:
    total: S = jax.tree.map(jnp.add, a, b)
    return total


def _loop(start: int, stop: int, body: Callable[[Index, S], S], state: S) -> S:
    """A loop in the compiled program; none when it has no trips."""
    return lax.fori_loop(start, stop, body, state) if start < stop else state

"""The steps of the ring, forward and backward, for schedules that are lists of turns.

Ring Attention (Liu et al., arXiv 2310.01889) over any kernel. The keys and values of
each shard travel around the ring, and every device attends to each in turn. A hop is
issued together with a chunk that does not need it, so that it can be in flight while
the chunk is computed. There are no unused hops: R - 1 forward, and backward R - 1 of
k, v and R - 1 of dk, dv.

A schedule is a tuple of turns, outermost first. If there are several, one step of a
turn is a whole turn of the next one, starting from the shard then held.
"""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from usp_jax.kernels import Carry
from usp_jax.ring.keys import Stays
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
    *,
    is_last: bool = True,
) -> Carry:
    """Attends with this device's queries to the keys of the whole ring.

    Args:
      kv: the array that travels; `ring.keys` makes keys and values of it.
      carry: the result over anything seen before the ring, such as attention sinks.
      is_last: whether no other turn follows.

    Returns:
      out [B, T, n, V] and lse [B, T, n] in the accumulation dtype. Out is in q's dtype
        instead if the kernel of the last step rounds it.
    """
    turn, *inner = turns

    def attend(step: Index, kv: jax.Array, carry: Carry | None) -> Carry:
        here = ring.at(turn, step)
        final = is_last and isinstance(step, int) and step == turn.size - 1
        if inner:
            return ring_forward(here, tuple(inner), q, kv, carry, is_last=final)
        return here.held_forward(q, kv, carry, is_last=final)

    def body(step: Index, state: tuple[jax.Array, Carry]) -> tuple[jax.Array, Carry]:
        kv, carry = state
        return ring.hop(turn, kv), attend(step, kv, carry)

    if turn.size == 1:
        return attend(0, kv, carry)
    # Without `together`, a hop inside the next step need not wait for this one.
    first = together(ring.hop(turn, kv), attend(0, kv, carry))
    kv, carry = loop(1, turn.size - 1, body, first)
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
) -> tuple[Stays, Float[Array, "B S m D"]]:
    """Gradients of `ring_forward`, in the accumulation dtype.

    Args:
      own: number of queries that meet their own shard at step 0; None means all.

    Returns:
      The gradients that stay, dq [B, T, n, H] and those of `ring.keys`; that of kv.
    """
    turn, *inner = turns

    def part(step: Index, kv: jax.Array, rows: slice) -> tuple[Stays, jax.Array]:
        here = ring.at(turn, step)
        # The rows that the own inner turn left over are a separate chunk.
        if inner and inner[0].size > 1 and not rows.start:
            turns = tuple(inner)
            return ring_backward(here, turns, q, kv, dout, lse, delta, own=rows.stop)
        return here.held_backward(kv, rows, q, dout, lse, delta)

    def join(
        first: tuple[Stays, jax.Array], rest: tuple[Stays, jax.Array]
    ) -> tuple[Stays, jax.Array]:
        ((dq, params), dkv), ((more, more_params), more_dkv) = first, rest
        dq = _all_rows(dq, more, q.shape[1])
        return (dq, added(params, more_params)), dkv + more_dkv

    # The inner turn during the first outer hop takes longer than a chunk at the end.
    rows = own_rows(q.shape[1] if own is None else own, 3 if inner else 2)
    return take_turn(ring, turn, kv, part, rows, add=jnp.add, join=join)


def own_rows(length: int, share: int = 2) -> list[slice]:
    """Splits the queries for step 0 into work during the first hop and the last.

    Args:
      share: the last hop gets 1 / share of the queries.
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
    """Runs one turn of a ring in which sums follow the visitors that they belong to.

    Sums travel one hop late, so that both hops of a step overlap with work. The part of
    a device's own visitor stays at home; the travelling sum starts at step 1 and comes
    home after the last step. The first hop and the last have no other step to overlap
    with, so some rows of the queries meet their own shard during each. For R = 4, in
    time:

        computed       own, rows[0]   step 1   step 2   step 3    own, rows[1]
        visitor hop    1              2        3
        sum hop                                1        2         3, home

    Args:
      visitor: the value that travels and is only read.
      part: (step, visitor, rows) -> (sum that stays here, sum that follows).
      rows: the result of `own_rows`.
      add: adds two sums that follow.
      join: joins the results of the two runs of rows.

    Returns:
      The sum that stayed here, and the sum of this device's own visitor.
    """
    last = turn.size - 1
    if not last:
        return part(0, visitor, ALL)

    def late(step: Index, visitor: V, stays: S, travels: F) -> tuple[S, F]:
        """Runs a step after step 1: the sum arrives while this part is computed."""
        arrived = ring.hop(turn, travels)
        more, new = part(step, visitor, ALL)
        return added(stays, more), add(arrived, new)

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
        visitor, stays, travels = loop(2, last, body, state)
        stays, travels = late(last, visitor, stays, travels)
    own, stays, travels = together(own, stays, travels)
    arrived = ring.hop(turn, travels)
    for more in rows[1:]:
        at_home = join(at_home, part(0, own, more))
    return together(added(stays, at_home[0]), add(arrived, at_home[1]))


def together(*values: *Ts) -> tuple[*Ts]:
    """Returns the values, with a barrier: none is ready before the others.

    So a hop cannot be delayed past later work; schedulers would leave some hops without
    any to overlap with.
    """
    after: tuple[*Ts] = lax.optimization_barrier(values)
    return after


def _all_rows(dq: jax.Array, more: jax.Array, length: int) -> jax.Array:
    """Extends dq to all rows: `more` follows the rows of `dq` or is added to the last.

    Rows in neither are 0.
    """
    if dq.shape[1] == length:
        return dq.at[:, -more.shape[1] :].add(more)
    dq = jnp.concatenate([dq, more], 1)
    return jnp.pad(dq, [(0, 0), (0, length - dq.shape[1]), (0, 0), (0, 0)])


def added(a: S, b: S) -> S:
    """Adds two pytrees leaf by leaf."""
    total: S = jax.tree.map(jnp.add, a, b)
    return total


def loop(start: int, stop: int, body: Callable[[Index, S], S], state: S) -> S:
    """Runs a loop in the compiled program; leaves it out if it has no trips."""
    return lax.fori_loop(start, stop, body, state) if start < stop else state

"""Which shards see anything of which, where it is known before running.

In the contiguous layout a causal device sees no later shard, and behind a window no
shard beyond it; in zigzag a window leaves the neighbours. A hop that no visible pair
crosses then does not exist, and one that only a window crosses carries the window's
tokens: a halo. What hops there are, and which tokens each sends, is numpy on the host,
from the layout's runs of positions; the two functions below make those visits.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from usp_jax.kernels import Carry
from usp_jax.layout import shard_runs
from usp_jax.masking import Mask, MaskRule
from usp_jax.ring.ring import Ring, apart, side_by_side
from usp_jax.ring.steps import own_rows, together

# Every visit is a chunk of its own in the compiled program; more compile for minutes.
MAX_VISITS = 16


@dataclasses.dataclass(frozen=True)
class Visit:
    """One hop: some tokens of each device go straight to the device `offset` further.

    Attributes:
      pairs: who sends to whom.
      rows: the tokens of a shard that are sent.
    """

    offset: int
    pairs: tuple[tuple[int, int], ...]
    rows: slice


def static_visits(ring: Ring) -> tuple[Visit, ...] | None:
    """The hops of a ring some of whose visits see nothing; None for a whole turn."""
    q, kv = ring.q_tokens, ring.kv_tokens
    if any(x is not None for x in (q.positions, kv.positions, q.prefix)):
        return None
    visits = _visits(q.layout, kv.layout, ring.rule, ring.devices, q.length, kv.length)
    if visits is None:
        return None
    whole = len(visits) == ring.devices - 1 and all(
        len(visit.pairs) == ring.devices and visit.rows == slice(0, kv.length)
        for visit in visits
    )
    return None if whole else visits


@functools.cache
def _visits(
    q_layout: str,
    kv_layout: str,
    rule: MaskRule,
    size: int,
    q_length: int,
    kv_length: int,
) -> tuple[Visit, ...] | None:
    """One visit for each offset at which anything is seen, but the own one.

    None where those are more than MAX_VISITS.
    """
    q = shard_runs(q_layout, size, q_length)[:, None, :, None]
    kv = shard_runs(kv_layout, size, kv_length)[None, :, None, :]
    # Of each run of keys the part that some query of each run may see.
    start, stop = np.zeros(()), kv["count"]
    if rule.before is not None:
        least = q["first"] - rule.before - kv["first"]
        start = np.ceil(least / kv["stride"])
    if rule.after is not None:
        last = q["first"] + (q["count"] - 1) * q["stride"]
        stop = np.floor((last + rule.after - kv["first"]) / kv["stride"]) + 1
    start, stop = (np.clip(x, 0, kv["count"]).astype(int) for x in (start, stop))
    start, stop, _ = np.broadcast_arrays(kv["start"] + start, kv["start"] + stop, q)
    some = start < stop
    start = np.where(some, start, kv_length).min((2, 3))
    stop = np.where(some, stop, 0).max((2, 3))
    some = some.any((2, 3))
    i, j = np.nonzero(some)
    offsets = set(((i - j) % size).tolist()) - {0}
    if len(offsets) > MAX_VISITS:
        return None
    visits = []
    for offset in sorted(offsets, key=lambda s: (min(s, size - s), s)):
        hops = ((j, (j + offset) % size) for j in range(size))
        pairs = tuple((j, i) for j, i in hops if some[i, j])
        rows = slice(
            int(min(start[i, j] for j, i in pairs)),
            int(max(stop[i, j] for j, i in pairs)),
        )
        visits.append(Visit(offset, pairs, rows))
    return tuple(visits)


def visits_forward(
    ring: Ring,
    visits: tuple[Visit, ...],
    q: Float[Array, "B T n H"],
    kv: Float[Array, "B S m D"],
    carry: Carry | None = None,
) -> Carry:
    """`ring_forward` over the visits that see anything."""
    # k, v pass every barrier, so that no hop is made before its step.
    attend = functools.partial(ring.held_forward, q, kv)
    for visit in visits:
        arrived = ring.send(kv[:, visit.rows], visit.pairs)
        kv, arrived, carry = together(kv, arrived, attend(carry))
        attend = functools.partial(ring.chunk_forward, _mask(ring, visit), q, arrived)
    return attend(carry)


def visits_backward(
    ring: Ring,
    visits: tuple[Visit, ...],
    q: Float[Array, "B T n H"],
    kv: Float[Array, "B S m D"],
    dout: Float[Array, "B T n V"],
    lse: Float[Array, "B T n"],
    delta: Float[Array, "B T n"],
) -> tuple[Float[Array, "B T n H"], Float[Array, "B S m D"]]:
    """`ring_backward` over them; each part of dk, dv goes straight home, one hop late.

    Half of the queries meet their own shard beside the first hop, half beside the last.
    """
    ours = (q, dout, lse, delta)
    first, *rest = own_rows(q.shape[1])
    if not visits:
        return ring.held_backward(kv, slice(None), *ours)

    def send(kv: jax.Array, visit: Visit) -> jax.Array:
        # As v, k: a compiler that took this send for the forward's would make it once
        # for both, and keep all that arrived until now.
        k, v = apart(kv[:, visit.rows], q.shape[-1])
        return ring.send(side_by_side(v, k), visit.pairs)

    arriving: jax.Array | None = send(kv, visits[0])
    kv, arriving, dq_own, home = together(
        kv, arriving, *ring.held_backward(kv, first, *ours)
    )
    dq = jnp.zeros_like(dq_own, shape=q.shape)
    part: jax.Array | None = None
    for n, visit in enumerate(visits):
        assert arriving is not None
        arrived, arriving = arriving, None
        if n + 1 < len(visits):
            arriving = send(kv, visits[n + 1])
        if part is not None:
            home = _brought_home(ring, visits[n - 1], part, home)
        v, k = apart(arrived, arrived.shape[-1] - q.shape[-1])
        dq_part, part = ring.chunk_backward(
            _mask(ring, visit), q, side_by_side(k, v), dout, lse, delta
        )
        kv, arriving, home, part, dq = together(kv, arriving, home, part, dq + dq_part)
    assert part is not None
    home = _brought_home(ring, visits[-1], part, home)
    for rows in rest:
        dq_rest, more = ring.held_backward(kv, rows, *ours)
        dq_own, home = jnp.concatenate([dq_own, dq_rest], 1), home + more
    return together(dq + dq_own, home)


def _brought_home(
    ring: Ring, visit: Visit, part: jax.Array, home: jax.Array
) -> jax.Array:
    """dk, dv of the tokens that a visit sent, added where they came from."""
    back = [(i, j) for j, i in visit.pairs]
    return home.at[:, visit.rows].add(ring.send(part, back))


def _mask(ring: Ring, visit: Visit) -> Mask:
    kv = ring.kv_tokens.shard((ring.index - visit.offset) % ring.devices)
    return ring.mask(kv.cut(visit.rows))

"""Visits of shards that see something of each other, if known before running.

In the contiguous layout, a device with a causal mask sees no later shard, and with a
window no shard beyond it. In zigzag, a window leaves only the neighbours. A hop without
visible pairs is left out, and one that only a window crosses sends only the window's
tokens. The hops, and the tokens that each sends, are computed with numpy on the host
from the layout's runs of positions. The two functions below run these visits.

Most windows need no ring (`windowed.py`). Those left are of cross-attention, have one
bound, or are long.
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
from usp_jax.ring.keys import Stays, apart, side_by_side
from usp_jax.ring.ring import Ring
from usp_jax.ring.steps import added, own_rows, together

# Every visit is a separate chunk in the compiled program; more take minutes to compile.
MAX_VISITS = 16


@dataclasses.dataclass(frozen=True)
class Visit:
    """One hop that sends some tokens directly to the device `offset` further.

    Attributes:
      pairs: the (source, target) devices.
      rows: the tokens of a shard that are sent.
    """

    offset: int
    pairs: tuple[tuple[int, int], ...]
    rows: slice


def static_visits(ring: Ring) -> tuple[Visit, ...] | None:
    """The hops that are not empty; None if a whole turn is needed."""
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
    """One visit for each nonzero offset at which anything is seen.

    None if there are more than MAX_VISITS.
    """
    q = shard_runs(q_layout, size, q_length)[:, None, :, None]
    kv = shard_runs(kv_layout, size, kv_length)[None, :, None, :]
    # The part of each run of keys that some query of each run may see.
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
    """Computes `ring_forward` over the visits that are not empty."""
    # kv passes every barrier, so that no hop is issued before its step.
    attend = functools.partial(ring.held_forward, q, kv)
    for visit in visits:
        arrived = ring.send(kv[:, visit.rows], visit.pairs)
        kv, arrived, carry = together(kv, arrived, attend(carry))
        attend = functools.partial(ring.chunk_forward, _mask(ring, visit), q, arrived)
    return attend(carry, is_last=True)


def visits_backward(
    ring: Ring,
    visits: tuple[Visit, ...],
    q: Float[Array, "B T n H"],
    kv: Float[Array, "B S m D"],
    dout: Float[Array, "B T n V"],
    lse: Float[Array, "B T n"],
    delta: Float[Array, "B T n"],
) -> tuple[Stays, Float[Array, "B S m D"]]:
    """Computes `ring_backward` over the visits that are not empty.

    Each part of kv's gradient goes directly home, one hop late. Half of the queries
    meet their own shard during the first hop, the other half during the last.
    """
    ours = (q, dout, lse, delta)
    first, *rest = own_rows(q.shape[1])
    if not visits:
        return ring.held_backward(kv, slice(None), *ours, is_only=True)

    half = kv.shape[-1] // 2

    def send(kv: jax.Array, visit: Visit) -> jax.Array:
        # With its halves swapped. Otherwise a compiler could merge this send with that
        # of the forward pass, and keep everything that arrived until now.
        a, b = apart(kv[:, visit.rows], half)
        return ring.send(side_by_side(b, a), visit.pairs)

    arriving: jax.Array | None = send(kv, visits[0])
    kv, arriving, (dq_own, params), home = together(
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
        b, a = apart(arrived, arrived.shape[-1] - half)
        stays, part = ring.chunk_backward(
            _mask(ring, visit), q, side_by_side(a, b), dout, lse, delta
        )
        kv, arriving, home, part, (dq, params) = together(
            kv, arriving, home, part, added((dq, params), stays)
        )
    assert part is not None
    home = _brought_home(ring, visits[-1], part, home)
    for rows in rest:
        (dq_rest, more), dkv = ring.held_backward(kv, rows, *ours)
        dq_own = jnp.concatenate([dq_own, dq_rest], 1)
        params, home = added(params, more), home + dkv
    return together((dq + dq_own, params), home)


def _brought_home(
    ring: Ring, visit: Visit, part: jax.Array, home: jax.Array
) -> jax.Array:
    """Sends the gradient of a visit's tokens back home, and adds it there."""
    back = [(i, j) for j, i in visit.pairs]
    return home.at[:, visit.rows].add(ring.send(part, back))


def _mask(ring: Ring, visit: Visit) -> Mask:
    place = (ring.index - visit.offset) % ring.devices
    if visit.rows == slice(0, ring.kv_tokens.length):
        return ring.shard_mask(place)
    return ring.mask(ring.kv_tokens.shard(place).cut(visit.rows))

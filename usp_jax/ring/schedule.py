"""Ring schedules: how keys, values and queries meet. All compute the same result.

A schedule is a small object, or the string that names it. Schedules that are lists of
turns run in `steps.py`; each of the others has a forward and a backward function.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from usp_jax.kernels import BlockTables, Carry, Chunk
from usp_jax.masking import Mask
from usp_jax.ring.all_gather import AllGather, gather_backward, gather_forward
from usp_jax.ring.bidirectional import Bidirectional
from usp_jax.ring.double import Double
from usp_jax.ring.grouped import grouped_forward
from usp_jax.ring.keys import Stays
from usp_jax.ring.pass_q import PassQ, pass_q_backward, pass_q_forward
from usp_jax.ring.ring import Index, Ring
from usp_jax.ring.steps import own_rows, ring_backward, ring_forward
from usp_jax.ring.tables import RingTables
from usp_jax.ring.unidirectional import Unidirectional
from usp_jax.ring.visits import static_visits, visits_backward, visits_forward

Schedule = Unidirectional | Bidirectional | Double | AllGather | PassQ

_NAMED: dict[str, Schedule] = {
    "unidirectional": Unidirectional(),
    "bidirectional": Bidirectional(),
    "all_gather": AllGather(),
    "pass_q": PassQ(),
}

# The most bytes of tables that are made before the ring. Beyond, a kernel takes far
# longer than making its table, and those of all shards would need memory.
MOST_BYTES = 2**26

SCHEDULES = ("unidirectional", "bidirectional", "double", "all_gather", "pass_q")


def schedule_tables(schedule: Schedule, ring: Ring, q: jax.Array) -> RingTables:
    """Makes block tables for the forward and the backward pass of a schedule.

    Masks of parts or groups of shards, and of rings inside a ring, have none. Nor have
    those of very long shards.
    """
    make, devices = ring.chunk.tables, ring.devices
    has_whole_shards = devices == 1 or isinstance(schedule, Unidirectional | Double)
    if make is None or not has_whole_shards:
        return RingTables()
    sizes = q.shape[-1], ring.keys.value_size

    def tables(mask: Mask) -> BlockTables:
        return make(mask, *sizes, q.dtype)

    def against(place: Index) -> BlockTables:
        return tables(ring.shard_mask(place))

    shards = jax.vmap(against)(jnp.arange(devices))
    if sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shards)) > MOST_BYTES:
        return RingTables()
    # In rings inside a ring, the first shard is not always this device's own.
    is_one_ring = isinstance(schedule, Unidirectional) and devices > 1
    own = {
        rows.indices(q.shape[1])[:2]: jax.tree.map(
            lambda x: x[None], tables(ring.held_mask(rows))
        )
        for rows in (own_rows(q.shape[1]) if is_one_ring else ())
    }
    return RingTables(shards, own)


def schedule_forward(
    schedule: Schedule, ring: Ring, q: jax.Array, kv: jax.Array, carry: Carry | None
) -> Carry:
    """Attends with this device's queries to all keys, as `ring_forward` does."""
    if ring.devices == 1:
        return ring.held_forward(q, kv, carry, is_last=True)
    match schedule:
        case AllGather():
            return gather_forward(ring, q, kv, carry)
        case PassQ():
            return pass_q_forward(ring, q, kv, carry)
        case Unidirectional() if (visits := static_visits(ring)) is not None:
            return visits_forward(ring, visits, q, kv, carry)
        case Unidirectional(shards=shards) if shards > 1:
            return grouped_forward(ring, shards, q, kv, carry)
        case _:
            return ring_forward(ring, schedule.turns(ring.devices), q, kv, carry)


def schedule_backward(
    schedule: Schedule,
    ring: Ring,
    q: jax.Array,
    kv: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
) -> tuple[Stays, jax.Array]:
    """Gradients of `schedule_forward`: those that stay, and that of kv.

    A kernel that adds dq up in integers does so over all chunks of the ring, in units
    that all devices agree on by one small all-reduce.
    """
    sums = ring.chunk.sums
    if sums is None:
        return _backward(schedule, ring, q, kv, dout, lse, delta)
    maxima = sums.maxima(*ring.keys.of(kv), ring.held_tokens().segment_ids)
    if ring.devices > 1:
        maxima = lax.pmax(maxima, ring.axis_name)
    chunk = Chunk(ring.chunk.forward, partial(sums.backward, maxima=maxima))
    ring = dataclasses.replace(ring, chunk=chunk)
    (dq, params), dkv = _backward(schedule, ring, q, kv, dout, lse, delta)
    dq = sums.finish(dq, q, dout, lse, delta, maxima, ring.logits)
    return (dq, params), dkv


def _backward(
    schedule: Schedule,
    ring: Ring,
    q: jax.Array,
    kv: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
) -> tuple[Stays, jax.Array]:
    saved = q, kv, dout, lse, delta
    if ring.devices == 1:
        rows = slice(None)
        return ring.held_backward(kv, rows, q, dout, lse, delta, is_only=True)
    match schedule:
        case AllGather():
            return gather_backward(ring, *saved)
        case PassQ():
            return pass_q_backward(ring, *saved)
        case Unidirectional() if (visits := static_visits(ring)) is not None:
            return visits_backward(ring, visits, *saved)
        case _:
            return ring_backward(ring, schedule.turns(ring.devices), *saved)


def schedule_of(
    ring_schedule: str | Schedule, ring_size: int | None = None
) -> Schedule:
    """Makes a checked schedule from an object or from the string that names it.

    Args:
      ring_schedule: the object or the string.
      ring_size: number of devices in the ring; None if it is not known yet.

    Raises:
      ValueError: the name is unknown, or inner rings do not divide the ring.
    """
    schedule = ring_schedule
    if isinstance(schedule, str):
        name, _, number = schedule.partition(":")
        sized = {"double": Double, "unidirectional": Unidirectional}
        if name in sized and number.isdecimal() and int(number):
            schedule = sized[name](int(number))
        elif schedule in _NAMED:
            schedule = _NAMED[schedule]
    if not isinstance(schedule, Schedule):
        raise ValueError(
            f"{ring_schedule=} must be one of {SCHEDULES}, double with the size of its "
            'inner rings ("double:4"), unidirectional with the number of shards of a '
            'kernel call ("unidirectional:2"), or an object from usp_jax.ring'
        )
    if isinstance(schedule, Double) and (ring_size or 0) % schedule.inner:
        raise ValueError(
            f"{ring_schedule=}: inner rings of {schedule.inner} devices must divide "
            f"the ring axis, {ring_size}"
        )
    return schedule

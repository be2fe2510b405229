"""The gated delta rule on split sequences: exchange, maps, run, exchange.

One call on one device; R = ring, U = ulysses degree, slots = 2 in zigzag, else 1:

    q, k [B, T/(R·U), N, H], v [B, T/(R·U), M, V], gates [B, T/(R·U), M, 2]
      | exchange            all-to-alls over `ulysses`
    tokens of B · slots chunks, T/(R·slots) long, for M/U heads of v
      | chunk.map_of        the affine map of each chunk, from no state
      | states_before       maps over `ring`, whose size does not depend on T
    state before each chunk [B · slots, heads, H, V]
      | chunk.run           each chunk once, from its own state
    out [B, T/R, M/U, V]
      | exchange back       all-to-all over `ulysses`
    out [B, T/(R·U), M, V]

A state passes the chunks in the order of the text, whatever device holds them, so
zigzag costs no more than contiguous shards, and the attention layers of a hybrid model
stay balanced. The start of a document drops the state: there the map is a = 0. With R =
1 there is one chunk and no map.

The backward computes the gradient of each chunk's incoming state for its own outputs,
exchanges these with the maps, transposed, and runs each chunk backwards once. Kept are
what the forward's exchange received, the maps' `a` (H · H numbers a head and chunk) and
a state (H · V) a head and `Tiles.segment` = 1024 tokens.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from usp_jax.delta.contract import DeltaChunk, DeltaTokens, Map, Tiles
from usp_jax.delta.documents import document_starts
from usp_jax.delta.implementations import chunk
from usp_jax.delta.maps import Order, order_of, states_before
from usp_jax.first_order import first_order
from usp_jax.ring import apart, side_by_side
from usp_jax.shards import HEADS, SEQ, TOKENS, Shards
from usp_jax.ulysses import Heads, kv_to_heads, kv_to_seq, pad_heads, to_heads, to_seq

SAVED_NAMES = (
    "delta_qk",
    "delta_v",
    "delta_gates",
    "delta_starts",
    "delta_out",
    "delta_states",
    "delta_maps",
)
"""Names of the residuals of a call, for `jax.checkpoint` policies.

A rematerialised layer that saves all of them runs no collective of the call again.
"""

CHUNKS = ("batch", "ring")


@dataclasses.dataclass(frozen=True)
class DeltaCall:
    """The static part of one call, checked.

    Attributes:
      heads: the heads of v as query heads, those of q and k as key/value heads.
      implementation: the name of the chunks' implementation.
    """

    shards: Shards
    heads: Heads
    layout: str
    tiles: Tiles
    implementation: str

    @property
    def chunk(self) -> DeltaChunk:
        """The chunk contract's functions."""
        return chunk(self.implementation)

    @property
    def order(self) -> Order:
        """The order of all chunks of the ring."""
        ring_size = self.shards.ring_size
        return order_of("contiguous" if ring_size == 1 else self.layout, ring_size)


# out, and the state after the row's last token, where it is known, else 0.
Result = tuple[jax.Array, jax.Array]
# q and k side by side, v, gates and document starts, after the exchange.
Received = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
# The states that were kept, and the maps' `a` if there is a ring.
Saved = tuple[Received, jax.Array, jax.Array | None]
RECEIVED = (HEADS, HEADS, HEADS, CHUNKS)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def delta(
    call: DeltaCall,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    segment_ids: jax.Array | None,
    state: jax.Array,
) -> Result:
    """The gated delta rule over all devices.

    Args:
      q, k, v: [B, T, N, H], [B, T, N, H], [B, T, M, V].
      gates: [B, T, M, 2], the log decays and the betas.
      segment_ids: int32 [B, T] or None.
      state: [B, R, M', H, V], the initial state, for each ring device; M' is M, padded
        to a multiple of `ulysses`.

    Returns:
      out [B, T, M, V], and the final state as a sum over R, [B, R, M', H, V].
    """
    return _delta_fwd(call, q, k, v, gates, segment_ids, state)[0]


def _delta_fwd(
    call: DeltaCall,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    segment_ids: jax.Array | None,
    state: jax.Array,
) -> tuple[Result, Saved]:
    run = call.shards.run
    dims = (SEQ, SEQ, SEQ, SEQ, TOKENS)
    exchange = run(partial(_exchanged, call), dims, RECEIVED)
    qk, v, gates, starts = exchange(q, k, v, gates, segment_ids)
    received = (
        checkpoint_name(qk, "delta_qk"),
        checkpoint_name(v, "delta_v"),
        checkpoint_name(gates, "delta_gates"),
        None if starts is None else checkpoint_name(starts, "delta_starts"),
    )
    forward = run(partial(_forward, call), (RECEIVED, HEADS), HEADS)
    own, final, kept, a = forward(received, state)
    own = checkpoint_name(own, "delta_out")
    kept = checkpoint_name(kept, "delta_states")
    a = None if a is None else checkpoint_name(a, "delta_maps")
    out = run(partial(_to_seq, call), (HEADS,), SEQ)(own)
    return (out, final), (received, kept, a)


def _delta_bwd(
    call: DeltaCall, saved: Saved, cotangents: Result
) -> tuple[jax.Array | None, ...]:
    saved, (dout, dfinal) = first_order((saved, cotangents))
    backward = call.shards.run(
        partial(_backward, call),
        (RECEIVED, HEADS, HEADS, SEQ, HEADS),
        (SEQ, SEQ, SEQ, SEQ, HEADS),
    )
    # A caller of jax.vjp may pass cotangents with any sharding.
    placed = call.shards.place((dout, dfinal), (SEQ, HEADS))
    dq, dk, dv, dgates, dstate = backward(*saved, *placed)
    return dq, dk, dv, dgates, None, dstate


delta.defvjp(_delta_fwd, _delta_bwd)


def _exchanged(
    call: DeltaCall,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gates: jax.Array,
    segment_ids: jax.Array | None,
) -> Received:
    """[B, T/(R·U), N, H] -> qk [B, T/R, m, 2H], v [B, T/R, M/U, V], gates, starts."""
    axis = call.shards.ulysses
    qk = kv_to_heads(side_by_side(q, k), call.heads, axis)
    v, gates = (to_heads(pad_heads(x, call.heads), axis) for x in (v, gates))
    return qk, v, gates, _starts(call, segment_ids)


def _starts(call: DeltaCall, segment_ids: jax.Array | None) -> jax.Array | None:
    """Where documents start, bool [B, T/R], or None."""
    if segment_ids is None:
        return None
    shards = call.shards
    if shards.ulysses is not None:
        segment_ids = lax.all_gather(segment_ids, shards.ulysses, axis=1, tiled=True)
    ids = segment_ids.reshape(len(segment_ids), call.order.slots, -1)
    index = shards.index(shards.ring)
    return document_starts(ids, call.order, shards.ring, index).reshape(
        segment_ids.shape
    )


def _forward(
    call: DeltaCall, received: Received, state: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Runs a device's chunks: out, its term of the final state, what is kept."""
    tokens, order, ring = _tokens(call, received), call.order, call.shards.ring
    tiles = call.tiles.of_length(tokens.q.shape[1])
    start, index = _grouped(tokens, state[:, 0], 1), call.shards.index(ring)
    if ring is None:
        before, a = start, None
    else:
        maps = call.chunk.map_of(tokens, tiles)
        maps = jax.tree.map(lambda x: _slots(x, order.slots), maps)
        before = _rows(states_before(maps, start, order, ring, index))
        a = _flat(maps.a, 2)
    out, after, kept = call.chunk.run(tokens, before, tiles)
    # Every device could compute it from the maps; it would then be rounded differently.
    device, slot = order.chunks[-1]
    final = _slots(after, order.slots)[:, slot]
    final = jnp.where(index == device, final, 0)
    out = _flat(out, 2).reshape(*received[1].shape)
    kept = _flat(kept, 2)
    kept = kept.reshape(len(out), -1, *kept.shape[2:])
    return out, _flat(final, 1)[:, None], kept, a


def _backward(
    call: DeltaCall,
    received: Received,
    kept: jax.Array,
    a: jax.Array | None,
    dresult: jax.Array,
    dfinal: jax.Array,
) -> tuple[jax.Array, ...]:
    """The gradients of this device's shards: each stage transposed, in reverse."""
    shards, heads, order = call.shards, call.heads, call.order
    tokens, index = _tokens(call, received), shards.index(shards.ring)
    tiles = call.tiles.of_length(tokens.q.shape[1])
    dout = to_heads(pad_heads(dresult, heads), shards.ulysses)
    dout = dout.reshape(tokens.v.shape)
    # The final state is a sum over devices, so all have the same cotangent.
    dafter = _grouped(tokens, dfinal[:, 0], 1)
    if a is not None and shards.ring is not None:
        b = _slots(call.chunk.adjoint(tokens, dout, tiles), order.slots)
        maps = Map(_grouped(tokens, a, 2).swapaxes(-1, -2), b)
        reverse = order.reversed
        dafter = _rows(states_before(maps, dafter, reverse, shards.ring, index))
    kept = kept.reshape(len(tokens.q), -1, *kept.shape[2:])
    grads, dbefore = call.chunk.run_backward(
        tokens, _grouped(tokens, kept, 2), dout, dafter, tiles
    )
    device, slot = order.chunks[0]
    dstate = jnp.where(index == device, _slots(dbefore, order.slots)[:, slot], 0)
    return *_to_inputs(call, received, grads), _flat(dstate, 1)[:, None]


def _to_inputs(
    call: DeltaCall, received: Received, grads: DeltaTokens
) -> tuple[jax.Array, ...]:
    """Sends the gradients of q, k, v and the gates back to the tokens' devices."""
    qk, v, gates, _ = received
    axis = call.shards.ulysses
    dqk = side_by_side(grads.q, grads.k).reshape(*qk.shape[:2], -1, qk.shape[3])
    if (table := _table(call)) is not None:
        dqk = jnp.zeros_like(dqk, shape=qk.shape).at[:, :, table].add(dqk)
    dq, dk = apart(kv_to_seq(dqk, call.heads, axis, qk.dtype), qk.shape[3] // 2)
    dgates = jnp.stack([grads.log_decay, grads.beta], -1).reshape(gates.shape)
    dv = grads.v.reshape(v.shape).astype(v.dtype)
    return dq, dk, _to_seq(call, dv), _to_seq(call, dgates)


def _to_seq(call: DeltaCall, x: jax.Array) -> jax.Array:
    """[B, T/R, M/U, V] -> [B, T/(R·U), M, V]"""
    return to_seq(x, call.shards.ulysses)[:, :, : call.heads.num_heads]


def _table(call: DeltaCall) -> jax.Array | None:
    """The received head of q and k of each group of this device's heads of v.

    None if these are all received heads, in order.
    """
    groups, received = call.heads.groups, call.heads.sent.shape[1]
    if groups.shape[1] == received and (groups == np.arange(received)).all():
        return None
    return jnp.asarray(groups)[call.shards.index(call.shards.ulysses)]


def _tokens(call: DeltaCall, received: Received) -> DeltaTokens:
    """Cuts what a device received into rows of one chunk each."""
    qk, v, gates, starts = received
    if (table := _table(call)) is not None:
        qk = jnp.take(qk, table, axis=2)
    rows = len(qk) * call.order.slots
    n = qk.shape[2]
    q, k = apart(qk.reshape(rows, -1, *qk.shape[2:]), qk.shape[3] // 2)
    v, gates = (x.reshape(*q.shape[:2], n, -1, x.shape[3]) for x in (v, gates))
    starts = None if starts is None else starts.reshape(q.shape[:2])
    return DeltaTokens(q, k, v, gates[..., 0], gates[..., 1], starts)


def _grouped(tokens: DeltaTokens, x: jax.Array, axis: int) -> jax.Array:
    """Splits the axis of a device's heads of v into [n, g]."""
    return x.reshape(*x.shape[:axis], *tokens.v.shape[2:4], *x.shape[axis + 1 :])


def _flat(x: jax.Array, axis: int) -> jax.Array:
    """Joins the axes [n, g] at `axis`, the inverse of `_grouped`."""
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _slots(x: jax.Array, slots: int) -> jax.Array:
    """[B · slots, ...] -> [B, slots, ...]"""
    return x.reshape(-1, slots, *x.shape[1:])


def _rows(x: jax.Array) -> jax.Array:
    """[B, slots, ...] -> [B · slots, ...]"""
    return x.reshape(-1, *x.shape[2:])

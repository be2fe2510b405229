"""Attention of a window: a halo of keys and values instead of all-to-alls and a ring.

If each query sees few tokens, a device needs only the keys and values just before and
after its own tokens. One call on one device, for ring · ulysses devices:

    q [B, T/(R·U), N, H], k, v [B, T/(R·U), K, H]
      | receive_halo        ppermutes over `ring` and `ulysses` as one chain
    kv [B, s, K, 2H], side by side
      | window_attention    one chunk, own keys and halo
    out [B, T/(R·U), N, H], lse [B, T/(R·U), N]

Heads are not exchanged, so no number of them has to divide or is padded. The backward
pass sends dk, dv of the halo back and nothing else, as the halo is saved.
"""

import dataclasses
import functools
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from usp_jax import kernels
from usp_jax.call import FACTS, Call, Facts, logits_of
from usp_jax.first_order import first_order
from usp_jax.halo import Halo, halo_of, has_runs
from usp_jax.masking import Mask, MaskRule
from usp_jax.ring import apart, side_by_side
from usp_jax.shards import BY_HEAD, SEQ, TOKENS
from usp_jax.ulysses import Heads
from usp_jax.usp import Result, delta_of, sinks_carry, sinks_gradient
from usp_jax.varying import vary_like

# Own keys and halo are held at once: a halo may be this many times a device's tokens.
MOST_SHARDS = 8

# k, v side by side, and segment ids or None, of a halo's tokens.
Arrived = tuple[jax.Array, jax.Array | None]
# q, k, v, halo, out, lse, sinks, facts.
Saved = tuple[
    jax.Array,
    jax.Array,
    jax.Array,
    Arrived,
    jax.Array,
    jax.Array,
    jax.Array | None,
    Facts,
]


def takes_halo(call: Call, q_length: int, kv_length: int, facts: Facts) -> bool:
    """Returns True if a call sends a halo: it can, and sends fewer elements that way.

    It can if queries and keys are the same tokens, in runs of consecutive positions
    that the layout implies, the window is bounded on both sides, and the kernel takes
    the mask as data: a halo's differs from device to device. As a halo is not hidden
    behind attention and is held at once, it may be `MOST_SHARDS` shards long.
    The axes must be a mesh's: under `jax.vmap`, permutes have only one axis.

    Args:
      q_length, kv_length: global lengths with a mesh, else those of this device.
    """
    shards, heads, rule = call.shards, call.heads, call.rule
    ring_size, devices = shards.ring_size, shards.ring_size * shards.ulysses_size
    if devices == 1 or rule.before is None or rule.after is None:
        return False
    if facts.positions is not None or q_length != kv_length:
        return False
    if kernels.needs_static_masks(call.implementation):
        return False
    if call.layouts[0] != call.layouts[1]:
        return False
    if shards.mesh is None:
        manual = jax.sharding.get_abstract_mesh().manual_axes
        if not set(shards.split) <= set(manual):
            return False
    length = q_length if shards.mesh is None else q_length // devices
    return halo_if_less(call.layouts[0], ring_size, heads, length, rule) is not None


@functools.lru_cache(maxsize=4096)
def halo_if_less(
    layout: str, ring_size: int, heads: Heads, length: int, rule: MaskRule
) -> Halo | None:
    """Returns a halo's tables if it sends less than all-to-alls and a ring, else None.

    None also if the layout has no runs, or the halo is too long (`MOST_SHARDS`).

    Args:
      layout: order of the tokens.
      ring_size: devices along the ring.
      heads: the heads, and the devices along the Ulysses axis.
      length: tokens of a device.
      rule: a mask with bounds on both sides.
    """
    assert rule.before is not None and rule.after is not None
    if not has_runs(layout, ring_size):
        return None
    if rule.before + rule.after > MOST_SHARDS * length:
        return None
    ulysses = heads.ulysses_size
    halo = halo_of(layout, ring_size, ulysses, length, rule)
    # Heads of a token that each way sends, times ulysses: q, out and k, v in
    # all-to-alls, k, v around the ring. Both k, v and q, out have H + V numbers.
    exchanged = heads.padded * (ulysses - 1)
    exchanged += heads.sent.size * (ring_size * ulysses - 1)
    sent = halo.sent * heads.num_kv_heads * ulysses
    return halo if sent < exchanged * length else None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def usp_windowed(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> Result:
    """`usp`, of a call that `takes_halo`."""
    return _fwd(call, q, k, v, sinks, facts)[0]


def _fwd(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> tuple[Result, Saved]:
    q = checkpoint_name(q, "usp_q")
    k, v = checkpoint_name(k, "usp_kv"), checkpoint_name(v, "usp_kv")
    halo = receive_halo(call, k, v, facts)
    out, lse = window_attention(call, q, k, v, halo, sinks, facts)
    residual = lse if call.return_residual else None
    return (out, residual), (q, k, v, halo, out, lse, sinks, facts)


def _bwd(call: Call, saved: Saved, cotangents: Result) -> tuple[object, ...]:
    backward = call.shards.run(
        partial(_backward, call),
        (SEQ, SEQ, SEQ, (SEQ, TOKENS), SEQ, SEQ, BY_HEAD, FACTS, SEQ, SEQ),
        (SEQ, SEQ, SEQ, BY_HEAD),
    )
    saved, cotangents = first_order((saved, cotangents))
    return *backward(*saved, *call.shards.place(cotangents, SEQ)), None


usp_windowed.defvjp(_fwd, _bwd)


def receive_halo(call: Call, k: jax.Array, v: jax.Array, facts: Facts) -> Arrived:
    """[B, T/(R·U), K, H] -> the keys and values in reach, on every device."""
    dims = (SEQ, SEQ, FACTS)
    halo = call.shards.run(partial(_receive, call), dims, (SEQ, TOKENS))(k, v, facts)
    return checkpoint_name(halo[0], "usp_kv"), checkpoint_name(halo[1], "usp_kv")


def window_attention(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    halo: Arrived,
    sinks: jax.Array | None,
    facts: Facts,
) -> tuple[jax.Array, jax.Array]:
    """out [B, T/(R·U), N, H] and lse [B, T/(R·U), N], on every device."""
    dims = (SEQ, SEQ, SEQ, (SEQ, TOKENS), BY_HEAD, FACTS)
    run = call.shards.run(partial(_attend, call), dims, (SEQ, SEQ))
    out, lse = run(q, k, v, halo, sinks, facts)
    return checkpoint_name(out, "usp_out"), checkpoint_name(lse, "usp_lse")


def _receive(call: Call, k: jax.Array, v: jax.Array, facts: Facts) -> Arrived:
    """The halo of this device."""
    halo, axis = _halo(call, k.shape[1]), call.shards.split
    kv = halo.receive(side_by_side(k, v), axis)
    if facts.segment_ids is None:
        return kv, None
    return kv, halo.receive(facts.segment_ids[-1], axis)


def _attend(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    halo: Arrived,
    sinks: jax.Array | None,
    facts: Facts,
) -> tuple[jax.Array, jax.Array]:
    """Attends with this device's queries: (out, lse)."""
    chain = _chain(call)
    chunk = kernels.chunk(call.implementation, kernels.target_of(call.shards.mesh))
    k, v = _with_halo(k, v, halo)
    before = sinks_carry(chain, q, v.shape[-1], sinks)
    mask, logits = _mask(call, q.shape[1], halo, facts), logits_of(chain, facts)
    if chunk.direct is None:
        out, lse = vary_like(chunk.forward(q, k, v, mask, before, logits), q)
    else:
        out, lse = chunk.direct.forward(q, k, v, mask, before, logits, dtype=q.dtype)
    return out.astype(q.dtype), lse


def _backward(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    halo: Arrived,
    out: jax.Array,
    lse: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
    dout: jax.Array,
    dlse: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The gradients of this device's shards."""
    chain = _chain(call)
    chunk = kernels.chunk(call.implementation, kernels.target_of(call.shards.mesh))
    delta = delta_of(out, lse, dout, dlse)
    mask, logits = _mask(call, q.shape[1], halo, facts), logits_of(chain, facts)
    arrays = q, *_with_halo(k, v, halo), dout, lse, delta
    if chunk.direct is None:
        dq, dk, dv = chunk.backward(*arrays, mask, logits)
    else:
        # Only dq is complete: dk and dv of the halo are added up on other devices.
        dtypes = q.dtype, None
        dq, dk, more = chunk.direct.backward(*arrays, mask, logits, dtypes=dtypes)
        assert more is not None
        dv = more
    tables = _halo(call, k.shape[1])
    dkv = tables.send_back(side_by_side(dk, dv), call.shards.split)
    dk, dv = apart(dkv.astype(k.dtype), k.shape[-1])
    return dq.astype(q.dtype), dk, dv, sinks_gradient(chain, sinks, lse, delta)


def _halo(call: Call, length: int) -> Halo:
    """The tables for `length` tokens on a device."""
    shards = call.shards
    return halo_of(
        call.layouts[0], shards.ring_size, shards.ulysses_size, length, call.rule
    )


def _chain(call: Call) -> Call:
    """The call on one chain of devices that exchange no heads."""
    shards = dataclasses.replace(call.shards, ring=call.shards.split, ulysses=None)
    heads = Heads(call.heads.num_heads, call.heads.num_kv_heads, ulysses_size=1)
    return dataclasses.replace(call, shards=shards, heads=heads)


def _with_halo(
    k: jax.Array, v: jax.Array, halo: Arrived
) -> tuple[jax.Array, jax.Array]:
    """This device's own keys and values, and after them those of the halo."""
    # The halo is last, so that blocks of own keys stay aligned with blocks of queries.
    more_k, more_v = apart(halo[0], k.shape[-1])
    return jnp.concatenate([k, more_k], 1), jnp.concatenate([v, more_v], 1)


def _mask(call: Call, length: int, halo: Arrived, facts: Facts) -> Mask:
    """The mask of this device's queries against its own keys and its halo."""
    shards, ids = call.shards, facts.segment_ids
    sides = None if ids is None else (ids[0], ids[-1])
    q, kv = _halo(call, length).tokens(shards.index(shards.split), sides, halo[1])
    return Mask(call.rule, q, kv)

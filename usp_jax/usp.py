"""Unified sequence parallelism: the two all-to-alls and the ring, put together.

One attention call on one device (USP, arXiv 2405.07719, Algorithm 1), R = ring, U =
ulysses degree:

    q [B, T/(R·U), N, H], k, v [B, S/(R·U), K, H]
      | to_heads      all-to-all over `ulysses`
    q [B, T/R, N/U, H], kv [B, S/R, m, 2H], side by side
      | Schedule      R chunks, R - 1 rotations of kv over `ring`
    out [B, T/R, N/U, H], lse [B, T/R, N/U]
      | to_seq        all-to-all over `ulysses`
    out [B, T/(R·U), N, H]

Pure Ulysses (R = 1), pure Ring (U = 1) and one device are the ends of this one path.
Each of the three stages, and the backward pass as a whole, is a function of one
device's shards; `Shards` runs it on all of them.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from usp_jax import kernels
from usp_jax.kernels.dropout import Dropout
from usp_jax.kernels.logits import Logits
from usp_jax.masking import PADDING, MaskRule
from usp_jax.ring import Ring, apart, side_by_side
from usp_jax.schedules import Schedule
from usp_jax.shards import BY_HEAD, BY_ROW, HEADS, SEQ, TOKENS, WHOLE, Shards
from usp_jax.tokens import gather_tokens
from usp_jax.ulysses import (
    Heads,
    kv_to_heads,
    kv_to_seq,
    pad_heads,
    to_heads,
    to_seq,
    with_groups,
)

SAVED_NAMES = ("usp_q", "usp_kv", "usp_out", "usp_lse", "usp_result")
"""What a `jax.checkpoint` policy can keep of an attention call.

With "usp_out" and "usp_lse" a rematerialised block never runs the ring again; with all
of them it runs no collective of attention again.
"""


@dataclasses.dataclass(frozen=True)
class Call:
    """The static side of one attention call."""

    shards: Shards
    heads: Heads
    logits: Logits
    rule: MaskRule
    layouts: tuple[str, str]
    dropout_rate: float
    schedule: Schedule
    implementation: str
    return_residual: bool


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Facts:
    """What an attention call is told beside its arrays; each may be None.

    Attributes:
      positions, segment_ids: (x,) or (query's, key's), int32 [B, T], [B, S].
      prefix: int32 [B], the length of the prefix of each row.
      rows, heads: int32 [B] and [N], their numbers in the whole call.
      slopes: floating [N], ALiBi's.
      seed: uint32 [], dropout's.
    """

    positions: Any = None
    segment_ids: Any = None
    prefix: Any = None
    rows: Any = None
    heads: Any = None
    slopes: Any = None
    seed: Any = None


# What each of the facts is split over.
FACTS = Facts(
    positions=TOKENS,
    segment_ids=TOKENS,
    prefix=BY_ROW,
    rows=BY_ROW,
    heads=BY_HEAD,
    slopes=BY_HEAD,
    seed=WHOLE,
)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def usp(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> tuple[jax.Array, None] | tuple[jax.Array, jax.Array]:
    """Attention; (out, lse or None), in the order of the inputs.

    Args:
      q, k, v: [B, T, N, H], [B, S, K, H], [B, S, K, V].
      sinks: [N], a logit for each head that takes weight and gives nothing, or None.
    """
    return _usp_fwd(call, q, k, v, sinks, facts)[0]


def _usp_fwd(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> tuple[Any, ...]:
    run = call.shards.run
    q, kv = run(partial(_to_heads, call), (SEQ, SEQ, SEQ), (HEADS, HEADS))(q, k, v)
    q, kv = checkpoint_name(q, "usp_q"), checkpoint_name(kv, "usp_kv")
    specs = (HEADS, HEADS, BY_HEAD, FACTS)
    out, lse = run(partial(attend, call), specs, (HEADS, HEADS))(q, kv, sinks, facts)
    out, lse = checkpoint_name(out, "usp_out"), checkpoint_name(lse, "usp_lse")
    result = run(partial(_to_seq, call), (HEADS,), SEQ)(out)
    if call.heads.ulysses_size > 1:
        result = checkpoint_name(result, "usp_result")
    residual = None
    if call.return_residual:
        residual = run(partial(_to_seq, call), (HEADS,), SEQ)(lse[..., None])[..., 0]
    return (result, residual), (q, kv, out, lse, sinks, facts)


def _usp_bwd(
    call: Call,
    saved: Any,
    cotangents: tuple[jax.Array, None] | tuple[jax.Array, jax.Array],
) -> Any:
    backward = call.shards.run(
        partial(_backward, call),
        (HEADS, HEADS, HEADS, HEADS, BY_HEAD, FACTS, SEQ, SEQ),
        (SEQ, SEQ, SEQ, BY_HEAD),
    )
    # A caller of jax.vjp may give cotangents of any sharding.
    cotangents = call.shards.place(cotangents, SEQ)
    return *backward(*saved, *cotangents), None


usp.defvjp(_usp_fwd, _usp_bwd)


def _to_heads(
    call: Call, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    axis = call.shards.ulysses
    q = to_heads(pad_heads(q, call.heads), axis)
    return q, kv_to_heads(side_by_side(k, v), call.heads, axis)


def attend(
    call: Call, q: jax.Array, kv: jax.Array, sinks: jax.Array | None, facts: Facts
) -> tuple[jax.Array, jax.Array]:
    """out and lse of this device's heads, from keys and values of the same heads."""
    ring = _ring(call, q, kv, facts)
    before = _before(call, q, kv.shape[-1] - q.shape[-1], sinks)
    out, lse = call.schedule.forward(ring, q, kv, before)
    if sinks is not None:
        ids = ring.q_tokens.shard(ring.index).segment_ids
        if ids is not None:
            lse = jnp.where((ids == PADDING)[..., None], -jnp.inf, lse)
    return out.astype(q.dtype), lse


def _to_seq(call: Call, x: jax.Array) -> jax.Array:
    return to_seq(x, call.shards.ulysses)[:, :, : call.heads.num_heads]


def _backward(
    call: Call,
    q: jax.Array,
    kv: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
    dresult: jax.Array,
    dresidual: jax.Array | None,
) -> tuple[jax.Array, jax.Array, jax.Array, None] | tuple[jax.Array, ...]:
    axis = call.shards.ulysses
    dout = to_heads(pad_heads(dresult, call.heads), axis)
    dlse = None
    if dresidual is not None:
        dlse = to_heads(pad_heads(dresidual[..., None], call.heads), axis)[..., 0]
    dq, dkv, dsinks = pull_back(call, q, kv, out, lse, sinks, facts, dout, dlse)
    dq = _to_seq(call, dq.astype(q.dtype))
    dk, dv = apart(kv_to_seq(dkv, call.heads, axis, kv.dtype), q.shape[-1])
    return dq, dk, dv, dsinks


def pull_back(
    call: Call,
    q: jax.Array,
    kv: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
    dout: jax.Array,
    dlse: jax.Array | None,
) -> Any:
    """dq, dk and dv side by side, and the sinks' gradient, of `attend`."""
    delta = jnp.sum(out.astype(lse.dtype) * dout.astype(lse.dtype), -1)
    if dlse is not None:
        # d lse / d logit is the softmax, so lse's cotangent enters beside delta.
        delta -= dlse
    ring = _ring(call, q, kv, facts)
    dq, dkv = call.schedule.backward(ring, q, kv, dout, lse, delta)
    dsinks = None if sinks is None else _dsinks(call, sinks, lse, delta)
    return dq, dkv, dsinks


def _ring(call: Call, q: jax.Array, kv: jax.Array, facts: Facts) -> Ring:
    """The ring as this device sees it; gathers what masks ask of all its shards."""
    shards = call.shards
    sides = facts.positions, facts.segment_ids

    def gather(side: Any, length: int) -> Any:
        positions, segment_ids = (None if x is None else x[side] for x in sides)
        return gather_tokens(
            positions,
            segment_ids,
            layout=call.layouts[side],
            ring_axis=shards.ring,
            ulysses_axis=shards.ulysses,
            length=length,
        )

    kv_tokens = q_tokens = gather(-1, kv.shape[1])
    if two_sided(call.layouts, *sides) or q.shape[1] != kv.shape[1]:
        q_tokens = gather(0, q.shape[1])
    q_tokens = dataclasses.replace(q_tokens, prefix=facts.prefix)
    chunk = kernels.chunk(call.implementation, kernels.target_of(shards.mesh))
    return Ring(
        axis_name=shards.ring,
        index=shards.index(shards.ring),
        chunk=with_groups(chunk, call.heads, shards.index(shards.ulysses)),
        rule=call.rule,
        logits=_logits(call, facts),
        q_tokens=q_tokens,
        kv_tokens=kv_tokens,
    )


def two_sided(layouts: tuple[str, str], *sides: Any) -> bool:
    """Whether anything is told of queries and of keys apart."""
    pairs = [x for x in sides if x is not None and len(x) > 1]
    return bool(pairs) or layouts[0] != layouts[1]


def _logits(call: Call, facts: Facts) -> Logits:
    """The rule of the logits of this device's rows and heads."""
    slopes = dropout = None
    if facts.slopes is not None:
        slopes = _own_heads(call, facts.slopes)
    if facts.seed is not None:
        heads = _own_heads(call, facts.heads)
        dropout = Dropout(call.dropout_rate, facts.seed, facts.rows, heads)
    return dataclasses.replace(call.logits, slopes=slopes, dropout=dropout)


def _own_heads(call: Call, x: jax.Array) -> jax.Array:
    """What belongs to this device's heads: [N] -> [n]"""
    heads = call.heads
    x = jnp.pad(x, (0, heads.padded - heads.num_heads))
    x = x.reshape(heads.ulysses_size, -1)[:, heads.local]
    return x[call.shards.index(call.shards.ulysses)]


def _before(
    call: Call, q: jax.Array, value_size: int, sinks: jax.Array | None
) -> tuple[jax.Array, jax.Array] | None:
    """The carry before the ring: a sink is a key that was seen, whose value is 0."""
    if sinks is None:
        return None
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    out = jnp.zeros_like(q, dtype, shape=(*q.shape[:3], value_size))
    sinks = _own_heads(call, sinks.astype(dtype))
    return out, jnp.zeros_like(out[..., 0]) + sinks[None, None]


def _dsinks(
    call: Call, sinks: jax.Array, lse: jax.Array, delta: jax.Array
) -> jax.Array:
    """The sinks' gradient: [N]"""
    local = _own_heads(call, sinks.astype(lse.dtype))
    weight = jnp.exp(local[None, None] - lse)
    weight = jnp.where(lse == -jnp.inf, 0, weight)
    dlocal = -jnp.sum(weight * delta, axis=(0, 1))
    heads = call.heads
    shape = heads.ulysses_size, heads.padded // heads.ulysses_size
    total = jnp.zeros_like(dlocal, shape=shape)
    index = call.shards.index(call.shards.ulysses)
    total = total.at[index, heads.local].set(dlocal).reshape(-1)
    return call.shards.total(total)[: heads.num_heads].astype(sinks.dtype)

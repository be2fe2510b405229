"""Unified sequence parallelism: the two all-to-alls and the ring, put together.

One attention call on one device (USP, arXiv 2405.07719, Algorithm 1), R = ring, U =
ulysses degree:

    q [B, T/(R·U), N, H], k, v [B, S/(R·U), K, H]
      | to_heads      all-to-all over `ulysses`
    q [B, T/R, N/U, H], kv [2, B, S/R, m, H]
      | ring_forward  R chunks, R - 1 rotations of kv over `ring`
    out [B, T/R, N/U, H], lse [B, T/R, N/U]
      | to_seq        all-to-all over `ulysses`
    out [B, T/(R·U), N, H]

Pure Ulysses (R = 1), pure Ring (U = 1) and one device are the ends of this one path.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from usp_jax import kernels
from usp_jax.kernels.logits import Logits
from usp_jax.masking import PADDING, Mask, MaskRule
from usp_jax.ring import Ring, ring_backward, ring_forward
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
    """The static side of one attention call on one device."""

    heads: Heads
    logits: Logits
    rule: MaskRule
    implementation: str
    ring_axis: str | None = None
    ulysses_axis: str | None = None
    return_residual: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def usp(call: Call, q, k, v, sinks, q_tokens, kv_tokens):
    """Attention on one device's shards; (out, lse or None), in the shards' order.

    Args:
      sinks: [N], a logit for each head that takes weight and gives nothing, or None.
      q_tokens, kv_tokens: `RingTokens`.
    """
    return _usp_fwd(call, q, k, v, sinks, q_tokens, kv_tokens)[0]


def _usp_fwd(call, q, k, v, sinks, q_tokens, kv_tokens):
    ring = _ring(call, q_tokens, kv_tokens)
    dtype = q.dtype
    q = checkpoint_name(to_heads(pad_heads(q, call.heads), call.ulysses_axis), "usp_q")
    kv = kv_to_heads(jnp.stack([k, v]), call.heads, call.ulysses_axis)
    kv = checkpoint_name(kv, "usp_kv")
    out, lse = ring_forward(ring, q, kv, _before(call, q, sinks))
    if sinks is not None:
        lse = jnp.where(_is_padding(ring, lse), -jnp.inf, lse)
    out = checkpoint_name(out.astype(dtype), "usp_out")
    lse = checkpoint_name(lse, "usp_lse")
    result = to_seq(out, call.ulysses_axis)[:, :, : call.heads.num_heads]
    if call.heads.ulysses_size > 1:
        result = checkpoint_name(result, "usp_result")
    residual = None
    if call.return_residual:
        residual = to_seq(lse[..., None], call.ulysses_axis)[..., 0]
        residual = residual[:, :, : call.heads.num_heads]
    return (result, residual), (q, kv, out, lse, sinks, q_tokens, kv_tokens)


def _usp_bwd(call, saved, cotangents):
    q, kv, out, lse, sinks, q_tokens, kv_tokens = saved
    dresult, dresidual = cotangents
    ring = _ring(call, q_tokens, kv_tokens)
    dout = to_heads(pad_heads(dresult, call.heads), call.ulysses_axis)
    delta = jnp.sum(out.astype(lse.dtype) * dout.astype(lse.dtype), -1)
    if call.return_residual:
        # d lse / d logit is the softmax, so lse's cotangent enters beside delta.
        dlse = pad_heads(dresidual[..., None], call.heads)
        delta -= to_heads(dlse, call.ulysses_axis)[..., 0]
    dq, dkv = ring_backward(ring, q, kv, dout, lse, delta)
    dq = to_seq(dq.astype(q.dtype), call.ulysses_axis)[:, :, : call.heads.num_heads]
    dk, dv = kv_to_seq(dkv, call.heads, call.ulysses_axis, kv.dtype)
    dsinks = None if sinks is None else _dsinks(call, sinks, lse, delta)
    return dq, dk, dv, dsinks, None, None


usp.defvjp(_usp_fwd, _usp_bwd)


def _ring(call, q_tokens, kv_tokens):
    index = 0 if call.ring_axis is None else lax.axis_index(call.ring_axis)
    tokens = q_tokens.shard(index)
    chunk = kernels.chunk(call.implementation)
    return Ring(
        axis_name=call.ring_axis,
        size=1 if call.ring_axis is None else lax.axis_size(call.ring_axis),
        index=index,
        chunk=with_groups(chunk, call.heads, _ulysses_index(call)),
        mask_of=lambda shard: Mask(call.rule, tokens, kv_tokens.shard(shard)),
        logits=call.logits,
    )


def _ulysses_index(call):
    return 0 if call.ulysses_axis is None else lax.axis_index(call.ulysses_axis)


def _local_sinks(call, sinks, dtype):
    """This device's heads' sinks: [N] -> [n]"""
    padding = call.heads.padded - call.heads.num_heads
    local = call.heads.padded // call.heads.ulysses_size
    sinks = jnp.pad(sinks.astype(dtype), (0, padding))
    return lax.dynamic_slice_in_dim(sinks, _ulysses_index(call) * local, local)


def _before(call, q, sinks):
    """The carry before the ring: a sink is a key that was seen, whose value is 0."""
    if sinks is None:
        return None
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    sinks = _local_sinks(call, sinks, dtype)
    out = jnp.zeros_like(q, dtype)
    return out, jnp.zeros_like(out[..., 0]) + sinks[None, None]


def _is_padding(ring, lse):
    """Whether each row [B, T, n] is padding."""
    ids = ring.mask(0).q.segment_ids
    return jnp.zeros_like(lse, bool) if ids is None else (ids == PADDING)[..., None]


def _dsinks(call, sinks, lse, delta):
    """The sinks' gradient, [N] with zeros for the other devices' heads."""
    local = _local_sinks(call, sinks, lse.dtype)
    weight = jnp.exp(local[None, None] - lse)
    weight = jnp.where(lse == -jnp.inf, 0, weight)
    dlocal = -jnp.sum(weight * delta, axis=(0, 1))
    total = jnp.zeros_like(dlocal, shape=(call.heads.padded,))
    start = _ulysses_index(call) * dlocal.shape[0]
    total = lax.dynamic_update_slice_in_dim(total, dlocal, start, 0)
    return total[: call.heads.num_heads].astype(sinks.dtype)

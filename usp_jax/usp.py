"""Unified sequence parallelism: the two all-to-alls and the ring, put together.

One attention call on one device (USP, arXiv 2405.07719, Algorithm 1), R = ring, U =
ulysses degree:

    q [B, T/(R·U), N, H], k, v [B, S/(R·U), K, H]
      | exchange_heads      all-to-all over `ulysses`
    q [B, T/R, N/U, H], kv [B, S/R, m, 2H], side by side
      | ring_attention      R chunks, R - 1 hops of kv over `ring`
    out [B, T/R, N/U, H], lse [B, T/R, N/U]
      | exchange_sequence   all-to-all over `ulysses`
    out [B, T/(R·U), N, H]

Pure Ulysses (R = 1), pure Ring (U = 1) and one device are special cases of this path.
A window takes another one if that sends less (`windowed.py`):

    q [B, T/(R·U), N, H], k, v [B, T/(R·U), K, H]
      | receive_halo        permutes of the keys around a device's own tokens
      | window_attention    one chunk
    out [B, T/(R·U), N, H]

Each of the three stages, and the backward pass as a whole, is a function of one
device's shards; `Shards` runs it on all devices.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from usp_jax.call import FACTS, Call, Facts, gathered, own_heads, ring_of
from usp_jax.first_order import first_order
from usp_jax.kernels import Carry
from usp_jax.ring import (
    Keys,
    Stays,
    apart,
    schedule_backward,
    schedule_forward,
    side_by_side,
)
from usp_jax.shards import BY_HEAD, HEADS, SEQ
from usp_jax.ulysses import kv_to_heads, kv_to_seq, pad_heads, to_heads, to_seq
from usp_jax.varying import vary_like

SAVED_NAMES = ("usp_q", "usp_kv", "usp_out", "usp_lse", "usp_result", "usp_masks")
"""Names of the residuals of an attention call, for `jax.checkpoint` policies.

"usp_masks" depends on tokens only: a scan over layers saves it once.
A rematerialised layer that saves "usp_out" and "usp_lse" does not run the ring again.
One that saves all of them runs no collective of attention again.
"""

# (out, lse), or (out, None) without `return_residual`; and their cotangents.
Result = tuple[jax.Array, jax.Array | None]
# q, kv after the exchange of heads, out, lse, sinks, facts.
Saved = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None, Facts]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def usp(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> Result:
    """Attention over all devices: (out, lse or None), in the order of the inputs.

    Args:
      q, k, v: [B, T, N, H], [B, S, K, H], [B, S, K, V].
      sinks: [N], for each head an extra logit without a value, or None.
    """
    return _usp_fwd(call, q, k, v, sinks, facts)[0]


def _usp_fwd(
    call: Call,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
) -> tuple[Result, Saved]:
    q, kv = exchange_heads(call, q, k, v)
    facts = gathered(call, q, kv, facts)
    out, lse = ring_attention(call, q, kv, sinks, facts)
    result = exchange_sequence(call, out)
    if call.heads.ulysses_size > 1:
        result = checkpoint_name(result, "usp_result")
    residual = None
    if call.return_residual:
        residual = exchange_sequence(call, lse[..., None])[..., 0]
    return (result, residual), (q, kv, out, lse, sinks, facts)


def _usp_bwd(call: Call, saved: Saved, cotangents: Result) -> tuple[object, ...]:
    backward = call.shards.run(
        partial(_backward, call),
        (HEADS, HEADS, HEADS, HEADS, BY_HEAD, FACTS, SEQ, SEQ),
        (SEQ, SEQ, SEQ, BY_HEAD),
    )
    saved, cotangents = first_order((saved, cotangents))
    # A caller of jax.vjp may pass cotangents with any sharding.
    return *backward(*saved, *call.shards.place(cotangents, SEQ)), None


usp.defvjp(_usp_fwd, _usp_bwd)


def exchange_heads(
    call: Call, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """[B, T/(R·U), N, H] -> q [B, T/R, N/U, H], kv [B, S/R, m, 2H], on every device."""

    def on_device(
        q: jax.Array, k: jax.Array, v: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        axis = call.shards.ulysses
        q = to_heads(pad_heads(q, call.heads), axis)
        return q, kv_to_heads(side_by_side(k, v), call.heads, axis)

    q, kv = call.shards.run(on_device, (SEQ, SEQ, SEQ), (HEADS, HEADS))(q, k, v)
    return checkpoint_name(q, "usp_q"), checkpoint_name(kv, "usp_kv")


def ring_attention(
    call: Call, q: jax.Array, kv: jax.Array, sinks: jax.Array | None, facts: Facts
) -> tuple[jax.Array, jax.Array]:
    """out [B, T/R, N/U, H] and lse [B, T/R, N/U], on every device."""
    dims = (HEADS, HEADS, BY_HEAD, FACTS)
    run = call.shards.run(partial(attend, call), dims, (HEADS, HEADS))
    out, lse = run(q, kv, sinks, facts)
    return checkpoint_name(out, "usp_out"), checkpoint_name(lse, "usp_lse")


def exchange_sequence(call: Call, x: jax.Array) -> jax.Array:
    """[B, T/R, N/U, H] -> [B, T/(R·U), N, H], on every device."""
    return call.shards.run(partial(_to_seq, call), (HEADS,), SEQ)(x)


def attend(
    call: Call,
    q: jax.Array,
    kv: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
    keys: Keys | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends with this device's heads: (out, lse).

    Args:
      keys: as in `ring_of`.
    """
    ring = ring_of(call, q, kv, facts, keys)
    before = sinks_carry(call, q, ring.keys.value_size, sinks)
    carry = schedule_forward(call.schedule, ring, q, kv, before)
    out, lse = vary_like(carry, q)
    return out.astype(q.dtype), lse


def attend_backward(
    call: Call,
    q: jax.Array,
    kv: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    sinks: jax.Array | None,
    facts: Facts,
    dout: jax.Array,
    dlse: jax.Array | None,
    keys: Keys | None = None,
) -> tuple[Stays, jax.Array, jax.Array | None]:
    """(dq, gradients of `keys`), kv's gradient, and the sinks', of `attend`."""
    delta = delta_of(out, lse, dout, dlse)
    ring = ring_of(call, q, kv, facts, keys)
    stays, dkv = schedule_backward(call.schedule, ring, q, kv, dout, lse, delta)
    return stays, dkv, sinks_gradient(call, sinks, lse, delta)


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
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """The gradients of this device's shards: each stage transposed, in reverse."""
    axis = call.shards.ulysses
    dout, dlse = cotangents_to_heads(call, dresult, dresidual)
    (dq, _), dkv, dsinks = attend_backward(
        call, q, kv, out, lse, sinks, facts, dout, dlse
    )
    dq = _to_seq(call, dq.astype(q.dtype))
    dk, dv = apart(kv_to_seq(dkv, call.heads, axis, kv.dtype), q.shape[-1])
    return dq, dk, dv, dsinks


def cotangents_to_heads(
    call: Call, dresult: jax.Array, dresidual: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """dout and dlse of this device's heads, by all-to-alls."""
    axis = call.shards.ulysses
    dout = to_heads(pad_heads(dresult, call.heads), axis)
    if dresidual is None:
        return dout, None
    return dout, to_heads(pad_heads(dresidual[..., None], call.heads), axis)[..., 0]


def _to_seq(call: Call, x: jax.Array) -> jax.Array:
    return to_seq(x, call.shards.ulysses)[:, :, : call.heads.num_heads]


def delta_of(
    out: jax.Array, lse: jax.Array, dout: jax.Array, dlse: jax.Array | None
) -> jax.Array:
    """The delta of the chunk contract, [B, T, n], for the cotangents of out and lse."""
    # XLA reads out and dout once for this. Computed by the kernel for dq, it would save
    # 67 of the 880 MB that a compiled backward pass of an H100 moves (16K tokens, 16
    # heads of 128), but the kernel for dk and dv would have to wait.
    delta = jnp.sum(out.astype(lse.dtype) * dout.astype(lse.dtype), -1)
    # d lse / d logit is the softmax, so lse's cotangent is subtracted from delta.
    return delta if dlse is None else delta - dlse


def sinks_carry(
    call: Call, q: jax.Array, value_size: int, sinks: jax.Array | None
) -> Carry | None:
    """The carry before any key: a sink acts like a key that was seen, with value 0."""
    if sinks is None:
        return None
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    out = jnp.zeros_like(q, dtype, shape=(*q.shape[:3], value_size))
    sinks = own_heads(call, sinks.astype(dtype))
    return out, jnp.zeros_like(out[..., 0]) + sinks[None, None]


def sinks_gradient(
    call: Call, sinks: jax.Array | None, lse: jax.Array, delta: jax.Array
) -> jax.Array | None:
    """The gradient of the sinks, [N], or None without sinks."""
    if sinks is None:
        return None
    local = own_heads(call, sinks.astype(lse.dtype))
    weight = jnp.exp(local[None, None] - lse)
    weight = jnp.where(lse == -jnp.inf, 0, weight)
    dlocal = -jnp.sum(weight * delta, axis=(0, 1))
    heads = call.heads
    shape = heads.ulysses_size, heads.padded // heads.ulysses_size
    total = jnp.zeros_like(dlocal, shape=shape)
    index = call.shards.index(call.shards.ulysses)
    total = total.at[index, heads.local].set(dlocal).reshape(-1)
    return call.shards.total(total)[: heads.num_heads].astype(sinks.dtype)

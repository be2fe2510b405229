"""The chunk contract with cuDNN's fused attention, through jax: NVIDIA Ampere or later.

cuDNN does not take a mask as data. Instead, the layout allows only a few cases for a
chunk (`cases.py`), one of which is selected at run time, and each block of a case is
one plain cuDNN call on slices.

This is less exact than the other kernels. cuDNN returns its results in the inputs'
16 bits, so the contribution of each block to out, dq, dk, dv is rounded once before it
is merged or added in float32. Each rounding is relative to its contribution, and the
contributions get smaller as the ring gets longer, so the error is about √2 times that
of one rounding for any ring size. lse is float32.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from usp_jax import _compat
from usp_jax.kernels.cases import Block, Case, Cases, static_cases
from usp_jax.kernels.contract import Carry, Grads
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask
from usp_jax.merge import merge
from usp_jax.varying import vary_like

Result = TypeVar("Result")

# Head sizes must be multiples of this.
_PIECE = 8

# An array of this many elements and more has wrong gradients, without an error.
_TOO_MANY = 2**31


def chunk_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    carry: Carry | None,
    logits: Logits,
) -> Carry:
    """Computes the attention of q over k, v and merges it into `carry`.

    Raises:
      ValueError: cuDNN does not support the mask, the logits or the size.
    """
    attend = partial(_attend, logits.scale, v.shape[3])
    arrays = _of_one_size(q, k, v)
    for cases in _checked(mask, logits):
        carry = _switch(cases, attend, *arrays, carry)
    assert carry is not None, "a mask has at least one stretch of each side"
    return carry


def chunk_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    dout: Float[Array, "B T N V"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    mask: Mask,
    logits: Logits,
) -> Grads:
    """Computes dq, dk, dv of one chunk from the global lse and delta.

    Raises:
      ValueError: cuDNN does not support the mask, the logits or the size.
    """
    pull_back = partial(_pull_back, logits.scale)
    out, dout = out_for(delta, dout.astype(q.dtype))
    arrays = _of_one_size(q, k, v, dout, out)
    parts = [
        _switch(cases, pull_back, *arrays, lse) for cases in _checked(mask, logits)
    ]
    dq, dk, dv = jax.tree.map(lambda *xs: sum(xs), *parts)
    head_size, value_size = q.shape[3], v.shape[3]
    return dq[..., :head_size], dk[..., :head_size], dv[..., :value_size]


def out_for(delta: jax.Array, dout: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (out, dout) such that sum(out · dout, -1) = delta.

    cuDNN takes out and computes this sum itself, while the contract gives delta, which
    differs from the sum of the forward's out if lse has a cotangent. The shortest such
    out is dout · delta / |dout|²; rounding it to 16 bits changes the sum less than
    rounding the forward's out does. Where dout is negligible compared with delta (only
    lse has a cotangent), a tiny dout replaces it; the error in dv is no larger than
    that.

    Args:
      delta: [B, T, N].
      dout: [B, T, N, V].

    Returns:
      Two arrays of the shape and dtype of `dout`.
    """
    dtype, wide, delta = dout.dtype, dout.astype(delta.dtype), delta[..., None]
    size = jnp.max(jnp.abs(wide), -1, keepdims=True)
    # The largest ratio of out to dout that the range of the dtype allows.
    most = 2.0 ** (15 if dtype == jnp.float16 else 40)
    smallest = float(jnp.finfo(dtype).smallest_subnormal)
    least = jnp.maximum(jnp.abs(delta) / most, smallest)
    dout = jnp.where((size < least) & (delta != 0), least, wide).astype(dtype)
    wide = dout.astype(delta.dtype)
    size = jnp.max(jnp.abs(wide), -1, keepdims=True)
    unit = wide / jnp.where(size == 0, 1, size)
    length = jnp.sum(unit * unit, -1, keepdims=True) * size
    out = unit * (delta / jnp.where(length == 0, 1, length))
    return out.astype(dtype), dout


def _checked(mask: Mask, logits: Logits) -> tuple[Cases, ...]:
    """Returns the cases of a mask; raises if cuDNN does not support the call."""
    if logits.soft_cap is not None:
        reason = "logits_soft_cap="
    elif logits.slopes is not None or logits.dropout is not None:
        reason = "alibi_slopes= or dropout_rate="
    elif mask.q.segment_ids is not None:
        reason = (
            "segment_ids=, which also mark the padding of a length that "
            "ring·ulysses does not divide"
        )
    elif mask.rule.before is not None:
        reason = "the left bound of local_window_size="
    elif (cases := static_cases(mask)) is not None:
        return cases
    else:
        reason = (
            "a causal mask whose positions are not those of one layout for queries and "
            "keys (from positions=, prefix_length= or a pair of layouts)"
        )
    raise ValueError(
        f"implementation='cudnn' cannot honour {reason}: it supports only full and "
        "causal blocks; use implementation=None"
    )


def _cut(
    block: Block, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns q, k and v of one call to cuDNN; raises if one of them is too large."""
    q, k, v = q[:, block.q], k[:, block.kv], v[:, block.kv]
    for name, x in (("query", q), ("key", k), ("value", v)):
        if math.prod(x.shape) >= _TOO_MANY:
            raise ValueError(
                f"implementation='cudnn' gives wrong gradients without an error from "
                f"2**31 elements of an array on, and the {name} of one call on one "
                f"device is {list(x.shape)}, {math.prod(x.shape)} elements: use a "
                "smaller batch, more devices, or implementation=None"
            )
    return q, k, v


def _switch(
    cases: Cases, run: Callable[..., Result], *arrays: jax.Array | Carry | None
) -> Result:
    """Calls `run` on the case that applies."""
    arrays = vary_like(arrays, (arrays, cases.which))
    if len(cases.each) == 1:
        return run(cases.each[0], *arrays)
    branches = [partial(run, case) for case in cases.each]
    which = vary_like(cases.which, (arrays, cases.which))
    return lax.switch(which, branches, *arrays)


def _attend(
    scale: float,
    value_size: int,
    case: Case,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    carry: Carry | None,
) -> Carry:
    """Merges the blocks of one case into `carry`."""
    for block in case:
        part = _compat.cudnn_attention(*_cut(block, q, k, v), scale, block.is_causal)
        out, lse = part[0][..., :value_size], part[1].swapaxes(1, 2)
        carry = _merged(carry, block.q, out.astype(lse.dtype), lse, q)
    return _nothing(q, value_size) if carry is None else carry


def _merged(
    carry: Carry | None, rows: slice, out: jax.Array, lse: jax.Array, q: jax.Array
) -> Carry:
    """Merges out and lse of some rows into `carry`."""
    if out.shape[1] == q.shape[1]:
        return (out, lse) if carry is None else merge(*carry, out, lse)
    out_before, lse_before = carry or _nothing(q, out.shape[3])
    out, lse = merge(out_before[:, rows], lse_before[:, rows], out, lse)
    return (
        lax.dynamic_update_slice_in_dim(out_before, out, rows.start, 1),
        lax.dynamic_update_slice_in_dim(lse_before, lse, rows.start, 1),
    )


def _nothing(q: jax.Array, value_size: int) -> Carry:
    """Returns the carry of rows that have seen nothing."""
    out = jnp.zeros((*q.shape[:3], value_size), jnp.float32)
    return vary_like((out, jnp.full(q.shape[:3], -jnp.inf, jnp.float32)), q)


def _pull_back(
    scale: float,
    case: Case,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    out: jax.Array,
    lse: jax.Array,
) -> Grads:
    """Computes dq, dk, dv of one case in float32."""
    dq, dk, dv = vary_like([jnp.zeros(x.shape, lse.dtype) for x in (q, k, v)], q)
    for block in case:
        parts = _compat.cudnn_attention_backward(
            *_cut(block, q, k, v),
            lse[:, block.q].swapaxes(1, 2),
            out[:, block.q],
            dout[:, block.q],
            scale,
            block.is_causal,
        )
        dq = _added(dq, parts[0], block.q)
        dk = _added(dk, parts[1], block.kv)
        dv = _added(dv, parts[2], block.kv)
    return dq, dk, dv


def _added(total: jax.Array, part: jax.Array, rows: slice) -> jax.Array:
    """Adds `part` to some rows of `total` [B, T, N, H]."""
    start, stop, _ = rows.indices(total.shape[1])
    widths = ((0, 0), (start, total.shape[1] - stop), (0, 0), (0, 0))
    return total + jnp.pad(part.astype(total.dtype), widths)


def _of_one_size(*arrays: jax.Array) -> list[jax.Array]:
    """Pads heads with zeros to one size that cuDNN accepts."""
    size = max(x.shape[3] for x in arrays)
    size += -size % _PIECE
    return [
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[3]))) for x in arrays
    ]

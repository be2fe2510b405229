"""cuDNN's fused attention, through jax: NVIDIA Ampere or later.

A causal call sees keys 0 to i from row i, with a window the last ones of them. A square
that sees keys i and later is a causal one of rows and keys in reverse order.
"""

import jax
import jax.numpy as jnp

from usp_jax import _compat
from usp_jax.kernels.bands import Window
from usp_jax.kernels.block_calls import BlockCalls
from usp_jax.kernels.contract import Grads


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: Window
) -> tuple[jax.Array, jax.Array]:
    left, right = window
    if right is None and left is not None:
        q, k, v = _reversed(q, k, v)
        out, lse = _forward(q, k, v, scale, (None, left))
        return jnp.flip(out, 1), jnp.flip(lse, 2)
    return _compat.cudnn_attention(q, k, v, scale, right is not None, left)


def _backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    out: jax.Array,
    dout: jax.Array,
    scale: float,
    window: Window,
) -> Grads:
    left, right = window
    if right is None and left is not None:
        lse = jnp.flip(lse, 2)
        q, k, v, out, dout = _reversed(q, k, v, out, dout)
        grads = _backward(q, k, v, lse, out, dout, scale, (None, left))
        dq, dk, dv = _reversed(*grads)
        return dq, dk, dv
    return _compat.cudnn_attention_backward(
        q, k, v, lse, out, dout, scale, right is not None, left
    )


def _reversed(*arrays: jax.Array) -> list[jax.Array]:
    """Reverses the order of tokens of [B, T, N, H]."""
    return [jnp.flip(x, 1) for x in arrays]


# An array of 2**31 elements and more has wrong gradients, without an error.
CALLS = BlockCalls("cudnn", _forward, _backward, only_squares=True, too_many=2**31)

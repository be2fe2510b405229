"""FlashAttention-2 and -3 of the package dew_flash_attn (XLA FFI).

FlashAttention-2 (arXiv 2307.08691) runs on compute capability 8.x and 12.x,
FlashAttention-3 (arXiv 2407.08608) on 9.0. The package's public function returns no
lse, so the functions below it are called, which is why its version is pinned. Their
backward adds up dq in the order in which blocks finish: results differ in their last
bits from run to run.
"""

import jax

from usp_jax.kernels.block_calls import BlockCalls, Window
from usp_jax.kernels.contract import Grads


def _mask(window: Window) -> tuple[bool, tuple[int, int]]:
    """Returns the package's (causal, window), which has -1 for no bound."""
    left, right = (-1 if bound is None else bound for bound in window)
    return right == 0, (left, right)


def _fa2_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: Window
) -> tuple[jax.Array, jax.Array]:
    import dew_flash_attn

    return dew_flash_attn._forward2(q, k, v, scale, *_mask(window))


def _fa2_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    out: jax.Array,
    dout: jax.Array,
    scale: float,
    window: Window,
) -> Grads:
    import dew_flash_attn

    return dew_flash_attn._backward2(dout, q, k, v, out, lse, scale, *_mask(window))


def _fa3_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: Window
) -> tuple[jax.Array, jax.Array]:
    import dew_flash_attn

    # None and None: rows are not packed.
    return dew_flash_attn._forward3(q, k, v, None, None, scale, *_mask(window))


def _fa3_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    out: jax.Array,
    dout: jax.Array,
    scale: float,
    window: Window,
) -> Grads:
    import dew_flash_attn

    return dew_flash_attn._backward3(
        dout, q, k, v, out, lse, None, None, scale, *_mask(window)
    )


FA2 = BlockCalls("fa2", _fa2_forward, _fa2_backward)
FA3 = BlockCalls("fa3", _fa3_forward, _fa3_backward)

"""FlashAttention-2 and -3 of the package dew_flash_attn (XLA FFI).

FlashAttention-2 (arXiv 2307.08691) runs on compute capability 8.x and 12.x,
FlashAttention-3 (arXiv 2407.08608) on 9.0. The package's public function returns no
lse, so the functions below it are called, which is why its version is pinned. Their
backward adds up dq in the order in which blocks finish: results differ in their last
bits from run to run.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp

from usp_jax.kernels.bands import Window
from usp_jax.kernels.block_calls import BlockCalls
from usp_jax.kernels.contract import Grads
from usp_jax.kernels.folding import folded
from usp_jax.kernels.packed_calls import PackedCalls, Sequences, SequencesGrads

Result = TypeVar("Result")


def _mask(window: Window) -> tuple[bool, tuple[int, int]]:
    """Returns the package's (causal, window), which has -1 for no bound."""
    left, right = (-1 if bound is None else bound for bound in window)
    return right == 0, (left, right)


def _fa2_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: Window
) -> tuple[jax.Array, jax.Array]:
    import dew_flash_attn

    call = partial(_call, dew_flash_attn._forward2, (scale, *_mask(window)))
    return folded(call)(q, k, v)


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

    call = partial(_call, dew_flash_attn._backward2, (scale, *_mask(window)))
    return folded(call)(dout, q, k, v, out, lse)


def _fa3_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: Window
) -> tuple[jax.Array, jax.Array]:
    import dew_flash_attn

    # None and None: rows are not packed.
    options = None, None, scale, *_mask(window)
    return folded(partial(_call, dew_flash_attn._forward3, options))(q, k, v)


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

    options = None, None, scale, *_mask(window)
    call = partial(_call, dew_flash_attn._backward3, options)
    return folded(call)(dout, q, k, v, out, lse)


def _call(
    function: Callable[..., Result], options: tuple[object, ...], *arrays: jax.Array
) -> Result:
    return function(*arrays, *options)


def _fa2_packed_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sequences: Sequences,
    scale: float,
    window: Window,
) -> tuple[jax.Array, jax.Array]:
    import dew_flash_attn

    starts, longest = sequences.starts, sequences.longest
    out, lse = dew_flash_attn._packed_forward2(
        q, k, v, starts, longest, scale, *_mask(window)
    )
    # lse is [P, N, longest]: each sequence has rows of its own.
    token = jnp.arange(q.shape[0], dtype=jnp.int32)
    sequence = jnp.searchsorted(starts[0], token, side="right") - 1
    return out, lse[sequence, :, token - starts[0][sequence]].T


def _fa2_packed_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    out: jax.Array,
    dout: jax.Array,
    sequences: Sequences,
    scale: float,
    window: Window,
) -> SequencesGrads:
    import dew_flash_attn

    starts, longest = sequences.starts, sequences.longest
    row = jnp.arange(longest[0], dtype=jnp.int32)
    token = jnp.minimum(starts[0][:-1, None] + row[None], q.shape[0] - 1)
    lse = lse[:, token].swapaxes(0, 1)
    return dew_flash_attn._packed_backward2(
        dout, q, k, v, out, lse, starts, longest, scale, *_mask(window)
    )


def _fa3_packed_forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sequences: Sequences,
    scale: float,
    window: Window,
) -> tuple[jax.Array, jax.Array]:
    import dew_flash_attn

    starts, longest = sequences.starts, sequences.longest
    return dew_flash_attn._forward3(q, k, v, starts, longest, scale, *_mask(window))


def _fa3_packed_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lse: jax.Array,
    out: jax.Array,
    dout: jax.Array,
    sequences: Sequences,
    scale: float,
    window: Window,
) -> SequencesGrads:
    import dew_flash_attn

    starts, longest = sequences.starts, sequences.longest
    return dew_flash_attn._backward3(
        dout, q, k, v, out, lse, starts, longest, scale, *_mask(window)
    )


FA2 = BlockCalls(
    "fa2",
    _fa2_forward,
    _fa2_backward,
    PackedCalls(_fa2_packed_forward, _fa2_packed_backward),
)
FA3 = BlockCalls(
    "fa3",
    _fa3_forward,
    _fa3_backward,
    PackedCalls(_fa3_packed_forward, _fa3_packed_backward),
)

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

from usp_jax.kernels.block_calls import BlockCalls, Window
from usp_jax.kernels.contract import Grads

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
    return _folded(call)(q, k, v)


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
    return _folded(call)(dout, q, k, v, out, lse)


def _fa3_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, window: Window
) -> tuple[jax.Array, jax.Array]:
    import dew_flash_attn

    # None and None: rows are not packed.
    options = None, None, scale, *_mask(window)
    return _folded(partial(_call, dew_flash_attn._forward3, options))(q, k, v)


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
    return _folded(call)(dout, q, k, v, out, lse)


def _call(
    function: Callable[..., Result], options: tuple[object, ...], *arrays: jax.Array
) -> Result:
    return function(*arrays, *options)


def _folded(call: Callable[..., Result]) -> Callable[..., Result]:
    """Lets `jax.vmap` make the mapped axis part of the batch, as the package has none.

    Args:
      call: a function of arrays with a leading batch axis, and to such arrays.
    """
    folded = jax.custom_batching.custom_vmap(call)

    @folded.def_vmap
    def rule(
        size: int, is_mapped: list[bool], *arrays: jax.Array
    ) -> tuple[Result, object]:
        mapped = [
            x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            for x, mapped in zip(arrays, is_mapped, strict=True)
        ]
        results = folded(*(x.reshape(-1, *x.shape[2:]) for x in mapped))
        split = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, results)

    return folded


FA2 = BlockCalls("fa2", _fa2_forward, _fa2_backward)
FA3 = BlockCalls("fa3", _fa3_forward, _fa3_backward)

"""Calls of packages under `jax.vmap`, which they do not support."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

Result = TypeVar("Result")


def folded(call: Callable[..., Result]) -> Callable[..., Result]:
    """Lets `jax.vmap` make the mapped axis part of the batch, as the package has none.

    Args:
      call: a function of arrays with a leading batch axis, and to such arrays.
    """
    folded_call = jax.custom_batching.custom_vmap(call)

    @folded_call.def_vmap
    def rule(
        size: int, is_mapped: list[bool], *arrays: jax.Array
    ) -> tuple[Result, object]:
        mapped = [
            x if mapped else jnp.broadcast_to(x, (size, *x.shape))
            for x, mapped in zip(arrays, is_mapped, strict=True)
        ]
        results = folded_call(*(x.reshape(-1, *x.shape[2:]) for x in mapped))
        split = jax.tree.map(lambda x: x.reshape(size, -1, *x.shape[1:]), results)
        return split, jax.tree.map(lambda _: True, results)

    return folded_call

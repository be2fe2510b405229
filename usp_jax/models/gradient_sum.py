"""Gradients of weights that are used many times, summed in float32 at least.

The gradient of a bfloat16 weight is bfloat16 to jax, and so is the sum over all uses in
a loop. Here each use's gradient goes to a float32 array beside the weight (float64 for
a float64 weight).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from usp_jax.models.execution import wide
from usp_jax.varying import vary_like


def with_sum(
    copy_of: Callable[[Array], Array], x: Float[Array, "..."]
) -> tuple[Array, Array]:
    """The working copy of a parameter, and the sum of the gradients of its uses.

    The copy itself has no gradient: what is used is `add_to(total, copy)`, or the same
    part of both.

    Args:
      copy_of: a linear function.

    Returns:
      (copy_of(x), zeros of its shape).
    """
    copy = lax.stop_gradient(copy_of(x))
    return copy, _total(copy_of, x, copy)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(copy_of: Callable[[Array], Array], x: Array, copy: Array) -> Array:
    return _total_fwd(copy_of, x, copy)[0]


def _total_fwd(
    copy_of: Callable[[Array], Array], x: Array, copy: Array
) -> tuple[Array, tuple[Array, Array]]:
    return vary_like(jnp.zeros(copy.shape, wide(copy.dtype)), copy), (x, copy)


def _total_bwd(
    copy_of: Callable[[Array], Array], saved: tuple[Array, Array], total: Array
) -> tuple[Array, None]:
    x, copy = saved
    (dx,) = jax.linear_transpose(copy_of, x)(total.astype(copy.dtype))
    return dx, None


_total.defvjp(_total_fwd, _total_bwd)


@jax.custom_vjp
def add_to(total: Float[Array, "..."], weight: Float[Array, "..."]) -> Array:
    """The weight, whose gradient is added to a total from `with_sum`."""
    return _add_to_fwd(total, weight)[0]


def _add_to_fwd(total: Array, weight: Array) -> tuple[Array, None]:
    del total
    return weight, None


def _add_to_bwd(saved: None, dweight: Array) -> tuple[Array, None]:
    del saved
    return dweight.astype(wide(dweight.dtype)), None


add_to.defvjp(_add_to_fwd, _add_to_bwd)

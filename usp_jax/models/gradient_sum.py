"""Gradients of weights that are used many times, summed in at least float32.

In jax the gradient of a bfloat16 weight is bfloat16, and so is its sum over all uses in
a loop. Here each use's gradient is added to a float32 array that accompanies the weight
(float64 for a float64 weight).
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
    """Returns the working copy of a parameter, and zeros that collect its gradient.

    The copy itself has no gradient. Use `add_to(total, copy)` instead, or the same
    slice of both.

    Args:
      copy_of: a linear function.
      x: the parameter.

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
    """Returns the weight; its gradient is added to `total`, from `with_sum`."""
    return _add_to_fwd(total, weight)[0]


def _add_to_fwd(total: Array, weight: Array) -> tuple[Array, None]:
    del total
    return weight, None


def _add_to_bwd(saved: None, dweight: Array) -> tuple[Array, None]:
    del saved
    return dweight.astype(wide(dweight.dtype)), None


add_to.defvjp(_add_to_fwd, _add_to_bwd)

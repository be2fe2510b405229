"""Marks a backward pass that is written by hand and cannot be differentiated."""

from typing import NoReturn, TypeVar

import jax

T = TypeVar("T")


@jax.custom_jvp
def first_order(x: T) -> T:
    """Returns `x`, and raises if it is differentiated.

    With its cotangents passed through this, a backward pass raises where a second
    derivative would be silently wrong.

    Raises:
      ValueError: the result is differentiated.
    """
    return x


@first_order.defjvp
def _first_order_jvp(primals: object, tangents: object) -> NoReturn:
    raise ValueError(
        "usp_attention and gated_delta can be differentiated only once (first order "
        "only): their backward passes are written by hand; for second derivatives of "
        "attention use jax.nn.dot_product_attention"
    )

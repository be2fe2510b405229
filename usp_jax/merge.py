"""Merging partial attention results, the identity that the ring relies on.

A partial result over some of the keys is `(out, lse)`: the softmax-weighted mean of
their values, and the log-sum-exp of their logits. Two partial results over disjoint
keys merge exactly, in any order (Liu et al., arXiv 2310.01889, section 2; Milakov &
Gimelshein, arXiv 1805.02867). A row that has seen no key is `(0, -inf)`, the identity.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def merge(
    out_a: Float[Array, "B T N H"],
    lse_a: Float[Array, "B T N"],
    out_b: Float[Array, "B T N H"],
    lse_b: Float[Array, "B T N"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attention over the union of two disjoint sets of keys, in the inputs' dtype."""
    m = finite(jnp.maximum(lse_a, lse_b))
    weight_a, weight_b = jnp.exp(lse_a - m), jnp.exp(lse_b - m)
    out, lse = normalize(
        out_a * weight_a[..., None] + out_b * weight_b[..., None],
        m,
        weight_a + weight_b,
    )
    return out, lse


def normalize(
    acc: jax.Array, m: jax.Array, l: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Turns an accumulator, its running maximum and its running sum into (out, lse).

    `acc` has one more axis than `m` and `l`. Where `l` is 0, the result is (0, -inf).
    """
    safe = jnp.where(l == 0, 1, l)
    return acc / safe[..., None], jnp.where(l == 0, -jnp.inf, m + jnp.log(safe))


def finite(m: jax.Array) -> jax.Array:
    """The row maximum, with -inf (nothing visible) replaced by 0."""
    return lax.select(m == -jnp.inf, jnp.zeros_like(m), m)

"""How the Triton kernels' arrays are laid out, and what each program sees of them."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from usp_jax.kernels.triton.lists import Lists

# What has the shape of an operand or of a result.
ShapedArray = jax.Array | jax.ShapeDtypeStruct


def whole_pieces(x: jax.Array) -> jax.Array:
    """Heads padded with zeros to a multiple of 16, the least that Triton multiplies."""
    if not (padding := -x.shape[3] % 16):
        return x
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding)))


def heads_spec(
    x: ShapedArray, *, group: int | None = None, share: int = 1
) -> pl.BlockSpec:
    """The whole length of one head of [B, T, N, H], or of a group of heads.

    `share` programs' heads have one head of `x`.
    """
    shape = (None, x.shape[1], group, x.shape[3])
    return pl.BlockSpec(shape, lambda _, n, b: (b, 0, n // share, 0))


def rows_spec(x: ShapedArray, *, group: int | None = None) -> pl.BlockSpec:
    """One head's rows of [B, N, T], or those of a group of heads."""
    return pl.BlockSpec((None, group, x.shape[2]), lambda _, n, b: (b, n, 0))


def batch_specs(lists: Lists | None) -> Lists | None:
    """All of one batch row's; an array with one batch row serves all."""

    def spec(x: jax.Array) -> pl.BlockSpec:
        shape, rest = (None, *x.shape[1:]), (0,) * (x.ndim - 1)
        return pl.BlockSpec(shape, lambda _, n, b: (b if x.shape[0] > 1 else 0, *rest))

    return jax.tree.map(spec, lists)


def to_rows(x: jax.Array, block: int, fill: float) -> jax.Array:
    """[B, T, N] -> [B, N, T'], T' the next multiple of the block"""
    x = x.swapaxes(1, 2)
    if not (padding := -x.shape[2] % block):
        return x
    return jnp.pad(x, ((0, 0), (0, 0), (0, padding)), constant_values=fill)


def from_rows(x: jax.Array, length: int) -> jax.Array:
    """[B, N, T'] -> [B, T, N]"""
    return x[:, :, :length].swapaxes(1, 2)

"""Layouts of the Triton kernels' arrays, and block specs for what each program sees."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from usp_jax.kernels.triton.lists import Lists

# An operand or a result.
ShapedArray = jax.Array | jax.ShapeDtypeStruct


def whole_pieces(x: jax.Array) -> jax.Array:
    """Pads heads with zeros to a multiple of 16, Triton's smallest matrix size."""
    if not (padding := -x.shape[3] % 16):
        return x
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding)))


def heads_spec(
    x: ShapedArray, *, group: int | None = None, share: int = 1
) -> pl.BlockSpec:
    """Specifies the whole length of one head, or of a group of heads, of [B, T, N, H].

    `share` heads of the grid use the same head of `x`.
    """
    shape = (None, x.shape[1], group, x.shape[3])
    return pl.BlockSpec(shape, lambda _, n, b: (b, 0, n // share, 0))


def rows_spec(x: ShapedArray, *, group: int | None = None) -> pl.BlockSpec:
    """Specifies the rows of one head, or of a group of heads, of [B, N, T]."""
    return pl.BlockSpec((None, group, x.shape[2]), lambda _, n, b: (b, n, 0))


def batch_specs(lists: Lists | None) -> Lists | None:
    """Specifies the lists of one batch row; arrays with one batch row serve all."""

    def spec(x: jax.Array) -> pl.BlockSpec:
        shape, rest = (None, *x.shape[1:]), (0,) * (x.ndim - 1)
        return pl.BlockSpec(shape, lambda _, n, b: (b if x.shape[0] > 1 else 0, *rest))

    return jax.tree.map(spec, lists)


def to_rows(x: jax.Array, block: int, fill: float) -> jax.Array:
    """[B, T, N] -> [B, N, T'], padded with `fill` to a multiple T' of `block`"""
    x = x.swapaxes(1, 2)
    if not (padding := -x.shape[2] % block):
        return x
    return jnp.pad(x, ((0, 0), (0, 0), (0, padding)), constant_values=fill)


def from_rows(x: jax.Array, length: int) -> jax.Array:
    """[B, N, T'] -> [B, T, N]"""
    return x[:, :, :length].swapaxes(1, 2)

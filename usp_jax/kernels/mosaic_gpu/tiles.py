"""Sizes and register layouts of the Hopper kernels' tiles, and operations on them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

# A Pallas reference to memory, inside a kernel.
Ref = Any

# A number that may be static.
Index = jax.Array | int

# Rows of one WGMMA, which are those of one warpgroup, and the computing warpgroups.
ROWS, COMPUTING = 64, 2
TILE = ROWS * COMPUTING

# Head sizes are padded to multiples of this, the width of the narrowest swizzle.
WIDTH = 16

MATRIX = plgpu.Layout.WGMMA
ROW, COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Columns:
    """Consecutive numbers of each head of [B, T, N, D], read without a copy."""

    array: Any
    start: int = dataclasses.field(metadata={"static": True})
    size: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """[B, T, N, size]"""
        return *self.array.shape[:-1], self.size

    @property
    def ndim(self) -> int:
        """Number of dims of the array."""
        return len(self.array.shape)

    @property
    def dtype(self) -> DTypeLike:
        """The dtype of the array."""
        dtype: DTypeLike = self.array.dtype
        return dtype

    def view(self) -> Ref:
        """Returns these columns of a reference."""
        return columns_of(self.array, self.start, self.size)


# An array that a kernel reads.
Operand = jax.Array | Columns


def columns_of(ref: Ref, start: int, size: int) -> Ref:
    """Returns consecutive columns of a reference to [B, T, N, D]."""
    return ref.at[:, :, :, start : start + size]


def slot_of(n: Index, stages: int) -> jax.Array:
    """Returns the buffer of a step."""
    return lax.rem(n, jnp.int32(stages)) if stages > 1 else hidden_zero(n)


def hidden_zero(n: Index) -> jax.Array:
    """Returns 0, computed from a step so that the compiler cannot tell.

    An index that it is added to does not look like a constant. Otherwise the compiler
    would keep the addresses of all parts of an operand in registers, and spill others.
    """
    return lax.shift_right_logical(jnp.int32(n), jnp.int32(30))


def by_row(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Repeats one value per row along the columns."""
    return lax.broadcast_in_dim(x, shape, (0,))


def full(shape: tuple[int, ...], value: float, layout: Any) -> jax.Array:
    """Fills float32 registers with one value."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def transposed(ref: Ref) -> Ref:
    """[m, n] -> [n, m], in shared memory"""
    return ref.transpose((1, 0))

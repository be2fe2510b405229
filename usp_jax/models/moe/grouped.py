"""Products of rows with the matrix of their group, for rows sorted by group.

On TPU, `jax.lax.ragged_dot` compiles to a kernel with the FLOPs of one product of all
rows. On CPU and, up to jax 0.12, on NVIDIA GPUs, it compiles to products of every row
with every matrix. There a loop multiplies blocks of rows with one matrix each, as many
as the groups need: at most rows / block + groups.

m is the number of rows, e of groups. Rows after those of all groups belong to none:
their results are undefined, and they add nothing to a gradient.
"""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from usp_jax.models.execution import wide
from usp_jax.varying import vary_like

Carry = TypeVar("Carry")

# Rows in a block. On GPU each block is a launch, which must have enough work.
CPU_BLOCK, GPU_BLOCK = 32, 512


def grouped_product(
    rows: Float[Array, "m D"],
    matrices: Float[Array, "e _ _"],
    sizes: Int[Array, " e"],
    *,
    transposed: bool = False,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> Float[Array, "m F"]:
    """Multiplies each row with the matrix of its group.

    Args:
      rows: sorted by group.
      matrices: [e, D, F], or [e, F, D] if `transposed`.
      sizes: int32, number of rows of each group; their sum is at most m.
      transposed: whether to multiply with the transposed matrices.
      dtype: of the result; None is that of `rows`. Sums have at least float32.
      implementation: "ragged_dot" or "blocks"; None is the best for the platform.
    """
    return _on_platform(
        partial(_ragged_product, transposed, dtype or rows.dtype),
        partial(_block_product, transposed, dtype or rows.dtype),
        implementation,
    )(rows, matrices, sizes)


def grouped_gradient(
    rows: Float[Array, "m D"],
    dout: Float[Array, "m F"],
    sizes: Int[Array, " e"],
    *,
    implementation: str | None = None,
) -> Float[Array, "e D F"]:
    """Returns the gradient of the matrices of `grouped_product`, at least float32."""
    return _on_platform(_ragged_gradient, _block_gradient, implementation)(
        rows, dout, sizes
    )


def _on_platform(
    ragged: Callable[..., jax.Array],
    blocks: Callable[..., jax.Array],
    implementation: str | None,
) -> Callable[..., jax.Array]:
    """The implementation that was asked for, or the platform's, of three arrays."""
    if implementation is None:
        return partial(
            lax.platform_dependent,
            tpu=ragged,
            cpu=partial(blocks, CPU_BLOCK),
            default=partial(blocks, GPU_BLOCK),
        )
    if implementation not in ("ragged_dot", "blocks"):
        raise ValueError(f"{implementation=} must be 'ragged_dot', 'blocks' or None")
    return ragged if implementation == "ragged_dot" else partial(blocks, CPU_BLOCK)


def _ragged_product(
    transposed: bool,
    dtype: DTypeLike,
    rows: jax.Array,
    matrices: jax.Array,
    sizes: jax.Array,
) -> jax.Array:
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0],
    )
    return lax.ragged_dot_general(
        rows, matrices, sizes, dims, preferred_element_type=dtype
    )


def _ragged_gradient(rows: jax.Array, dout: jax.Array, sizes: jax.Array) -> jax.Array:
    dims = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[],
    )
    return lax.ragged_dot_general(
        rows, dout, sizes, dims, preferred_element_type=wide(rows.dtype)
    )


def _block_product(
    transposed: bool,
    dtype: DTypeLike,
    block: int,
    rows: jax.Array,
    matrices: jax.Array,
    sizes: jax.Array,
) -> jax.Array:
    block = min(block, len(rows))
    dims = "BD,FD->BF" if transposed else "BD,DF->BF"
    zeros = jnp.zeros((len(rows), matrices.shape[1 if transposed else 2]), dtype)

    def body(group: jax.Array, at: jax.Array, own: jax.Array, out: Array) -> Array:
        part = lax.dynamic_slice_in_dim(rows, at, block)
        matrix = lax.dynamic_index_in_dim(matrices, group, keepdims=False)
        result = jnp.einsum(dims, part, matrix, preferred_element_type=dtype)
        before = lax.dynamic_slice_in_dim(out, at, block)
        result = jnp.where(own[:, None], result, before)
        return lax.dynamic_update_slice_in_dim(out, result, at, 0)

    zeros = vary_like(zeros, (rows, matrices, sizes))
    return for_blocks(sizes, len(rows), block, body, zeros)


def _block_gradient(
    block: int, rows: jax.Array, dout: jax.Array, sizes: jax.Array
) -> jax.Array:
    block, dtype = min(block, len(rows)), wide(rows.dtype)
    zeros = jnp.zeros((len(sizes), rows.shape[1], dout.shape[1]), dtype)

    def body(group: jax.Array, at: jax.Array, own: jax.Array, total: Array) -> Array:
        part = lax.dynamic_slice_in_dim(rows, at, block)
        part = jnp.where(own[:, None], part, 0)
        dpart = lax.dynamic_slice_in_dim(dout, at, block)
        dpart = jnp.where(own[:, None], dpart, 0)
        gradient = jnp.einsum("BD,BF->DF", part, dpart, preferred_element_type=dtype)
        gradient += lax.dynamic_index_in_dim(total, group, keepdims=False)
        return lax.dynamic_update_index_in_dim(total, gradient, group, 0)

    return for_blocks(
        sizes, len(rows), block, body, vary_like(zeros, (rows, dout, sizes))
    )


def for_blocks(
    sizes: jax.Array,
    rows: int,
    block: int,
    body: Callable[[jax.Array, jax.Array, jax.Array, Carry], Carry],
    carry: Carry,
) -> Carry:
    """Calls body(group, first row, which of the block's rows are meant, carry)."""
    ends = jnp.cumsum(sizes)
    blocks = -(-sizes // block)
    last = jnp.cumsum(blocks)

    def step(number: jax.Array, carry: Carry) -> Carry:
        group = jnp.sum(last <= number, dtype=jnp.int32)
        skipped = (number - last[group] + blocks[group]) * block
        first = ends[group] - sizes[group] + skipped
        # A block that would reach past the last row starts earlier.
        at = jnp.minimum(first, rows - block)
        index = at + lax.iota(jnp.int32, block)
        return body(group, at, (index >= first) & (index < ends[group]), carry)

    return lax.fori_loop(0, last[-1], step, carry)

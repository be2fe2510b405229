"""Block operations of the TPU kernels: products, base-2 logits, rows to columns."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from usp_jax.kernels.logits import LOG2E, Logits
from usp_jax.kernels.mosaic_tpu.blocks import LANES
from usp_jax.kernels.mosaic_tpu.walk import Ref, Step
from usp_jax.masking import FULL, PARTIAL, Tokens


def multipliable(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Converts arrays to a dtype that the matrix unit accepts: float16 to float32.

    Raises:
      ValueError: the first array is float64.
    """
    dtype = arrays[0].dtype
    if dtype == jnp.float64:
        raise ValueError(
            f"mosaic_tpu accumulates in float32 and does not support {dtype}: use "
            'implementation="xla"'
        )
    if dtype == jnp.float16:
        return tuple(x.astype(jnp.float32) for x in arrays)
    return arrays


def when_listed(step: Step, attend: Callable[[bool], None], *, may_mask: bool) -> None:
    """Runs `attend(masked)` according to the kind of the step's block."""
    if may_mask:
        pl.when(step.kind == PARTIAL)(partial(attend, True))
    pl.when(step.kind == FULL)(partial(attend, False))


def base2(logits: Logits, products: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Computes base-2 logits, and with a soft cap also the natural ones (else None)."""
    if logits.soft_cap is None:
        return products * (logits.scale * LOG2E), None
    natural = logits.of(products)
    return natural * LOG2E, natural


def dot(a: jax.Array, b: jax.Array, axis_a: int, axis_b: int) -> jax.Array:
    """Multiplies in the dtype of the inputs and accumulates in float32."""
    exact = a.dtype == jnp.float32
    return lax.dot_general(
        a,
        b,
        (((axis_a,), (axis_b,)), ((), ())),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def pieces(length: int, size: int) -> list[slice]:
    """Returns slices of at most `size` that cover a length."""
    return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def in_turn(
    parts: Iterable[slice], compute: Callable[[slice], jax.Array], *, ahead: bool
) -> Iterator[tuple[slice, jax.Array]]:
    """Yields each part with `compute` of it.

    Args:
      ahead: whether to compute the next part before yielding this one. The compiler
        keeps close enough to the order of the program for this to decide whether the
        products of one part overlap the softmax of the one before. With
        four parts of 512 keys it saves 8 % of a block's cycles on v6e and tpu7x.
    """
    waiting: list[tuple[slice, jax.Array]] = []
    for part in parts:
        waiting.append((part, compute(part)))
        if len(waiting) > ahead:
            yield waiting.pop(0)
    yield from waiting


def as_column(row: jax.Array) -> jax.Array:
    """[1, n] -> [n, LANES], each number repeated along lanes"""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def as_row(column: jax.Array) -> jax.Array:
    """[n, LANES] or [n, 1] -> [1, n], for numbers that are equal along lanes"""
    # The diagonal of each group of LANES rows: two operations a register, while the
    # cross-lane unit would take several cycles to transpose it.
    shape = LANES, LANES
    row, lane = (lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
    diagonals = [
        jnp.where(row == lane, column[group], 0).sum(0, keepdims=True)
        for group in pieces(column.shape[0], LANES)
    ]
    return jnp.concatenate(diagonals, axis=1)


def widened(column: jax.Array, width: int) -> jax.Array:
    """[n, LANES] -> [n, width], for numbers that are equal along lanes"""
    return jnp.concatenate([column] * -(-width // LANES), axis=1)[:, :width]


def sum_to_lanes(x: jax.Array) -> jax.Array:
    """[n, width] -> [n, LANES] with the same sum along each row"""
    return jnp.asarray(sum(x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)))


def save_columns(columns: Ref, tokens: Tokens) -> None:
    """Saves positions and ids, [1, n] each, as columns.

    Once a run: in each masked block it would cost as much, as products hide none of it.
    """
    for i, x in enumerate((tokens.positions, tokens.segment_ids)):
        if x is not None:
            columns[i] = as_column(x[...])


def load_columns(
    columns: Ref, tokens: Tokens, width: int, rows: slice = slice(None)
) -> Tokens:
    """Loads some rows of the saved columns of `tokens`, repeated to `width`."""
    positions = tokens.positions
    if positions is not None:
        positions = widened(columns[0, rows], width)
    ids = tokens.segment_ids
    return Tokens(positions, None if ids is None else widened(columns[1, rows], width))

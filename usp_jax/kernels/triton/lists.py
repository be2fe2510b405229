"""Lists, in global memory, of the blocks that each Triton program walks."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool

from usp_jax.kernels.padding import pad_mask
from usp_jax.masking import (
    EMPTY,
    FULL,
    Leaf,
    Mask,
    MaskRule,
    Tokens,
    block_kinds,
    visible,
)

State = TypeVar("State")

# The longest list of a row. Sorting takes rows times columns, so for very long
# sequences an entry covers several blocks.
MAX_LIST = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lists:
    """The spans of columns that each block of rows sees, FULL ones first.

    Attributes:
      mask: the mask, padded to whole blocks.
      num_full: int32 [B, rows], the number of spans that are fully visible; B may be 1.
      num_some: int32 [B, rows], the number of spans that are not EMPTY.
      order: int32 [B, rows, spans], the spans in the order of the walk.
      blocks: the number of blocks of columns in a span.
    """

    mask: Mask
    num_full: Leaf
    num_some: Leaf
    order: Leaf
    blocks: int = dataclasses.field(metadata={"static": True})


def listed(mask: Mask, block_rows: int, block_columns: int) -> Lists | None:
    """Lists the visible blocks of a mask; None if every query sees every key."""
    mask = pad_mask(mask, block_rows, block_columns)
    if mask.sees_all:
        return None
    num_columns, blocks = mask.kv.positions.shape[1] // block_columns, 1
    while num_columns // blocks > MAX_LIST and num_columns % (2 * blocks) == 0:
        blocks *= 2
    kinds = block_kinds(mask, block_rows, block_columns * blocks)
    num_full = jnp.sum(kinds == FULL, -1, dtype=jnp.int32)
    num_some = jnp.sum(kinds != EMPTY, -1, dtype=jnp.int32)
    order = jnp.argsort(-kinds, axis=-1, stable=True).astype(jnp.int32)
    return Lists(mask, num_full, num_some, order, blocks)


def transposed(mask: Mask) -> Mask:
    """Swaps queries and keys of a mask."""
    rule = MaskRule(left=mask.rule.after, right=mask.rule.before)
    return Mask(rule, mask.kv, mask.q)


def walk(
    lists: Lists | None,
    row: jax.Array,
    num_columns: int,
    attend: Callable[[jax.Array, bool, State], State],
    state: State,
) -> State:
    """Folds `attend(column, is_partial, state)` over the blocks that a row sees."""
    if lists is None:
        return lax.fori_loop(0, num_columns, lambda j, x: attend(j, False, x), state)

    def step(is_partial: bool, n: jax.Array, state: State) -> State:
        span = lists.order[row, lax.div(n, lists.blocks)]
        column = span * lists.blocks + lax.rem(n, lists.blocks)
        return attend(column, is_partial, state)

    num_full = lists.num_full[row] * lists.blocks
    num_some = lists.num_some[row] * lists.blocks
    state = lax.fori_loop(0, num_full, partial(step, False), state)
    return lax.fori_loop(num_full, num_some, partial(step, True), state)


def seen(
    lists: Lists | None, i: jax.Array, block_rows: int, j: jax.Array, block_columns: int
) -> Bool[Array, "rows columns"]:
    """Computes the mask of one block."""
    assert lists is not None, "where all is seen no block is partial"
    mask = lists.mask

    def cut(tokens: Tokens, index: jax.Array, block: int) -> Tokens:
        return jax.tree.map(lambda ref: ref[pl.ds(index * block, block)], tokens)

    q, kv = cut(mask.q, i, block_rows), cut(mask.kv, j, block_columns)
    return visible(Mask(mask.rule, q, kv))

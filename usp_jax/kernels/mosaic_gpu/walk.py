"""The table, in HBM, of the blocks that each tile of the Hopper kernels walks."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from usp_jax.kernels.mosaic_gpu.tiles import TILE, Index, Ref
from usp_jax.kernels.padding import pad_mask
from usp_jax.masking import EMPTY, FULL, Mask, block_kinds

State = TypeVar("State")

# The entries before the blocks in a row of the table: the tile and two counts.
HEADER = 3


@dataclasses.dataclass(frozen=True)
class Walk:
    """The steps of one tile: first fully visible blocks, then partly visible ones.

    Attributes:
      tile: the index of the tile.
      full: the number of fully visible blocks.
      listed: the number of blocks to visit.
      row: the tile's row of `walk_table`; None if all blocks are fully visible.
      columns: the number of blocks of the other side.
      repeats: the number of consecutive steps on each block.
    """

    tile: jax.Array
    full: Index
    listed: Index
    row: Ref | None
    columns: int
    repeats: int

    @classmethod
    def of(cls, table: Ref | None, columns: int, repeats: int) -> "Walk":
        """Returns the walk of this cta's tile."""
        rank, batch = lax.axis_index("tile"), lax.axis_index("batch")
        if table is None:
            return cls(rank, columns, columns, None, columns, repeats)
        row = table.at[batch if table.shape[0] > 1 else 0, rank]
        return cls(row[0], row[1], row[2], row, columns, repeats)

    @property
    def steps(self) -> Index:
        """Number of steps."""
        return self.listed * self.repeats

    def column(self, step: Index) -> Index:
        """Returns the block of a step."""
        entry = lax.div(step, jnp.int32(self.repeats)) if self.repeats > 1 else step
        return entry if self.row is None else self.row[HEADER + entry]

    def fold(
        self, step: Callable[[jax.Array, State, bool], State], state: State, start: int
    ) -> State:
        """Folds step(n, state, masked) over all steps starting at `start`."""
        full = jnp.maximum(self.full * self.repeats, start)
        state = lax.fori_loop(start, full, lambda n, x: step(n, x, False), state)
        if self.row is None:
            return state
        return lax.fori_loop(full, self.steps, lambda n, x: step(n, x, True), state)


def walk_tables(
    mask: Mask, walks: Iterable[tuple[int, bool]]
) -> dict[tuple[int, bool], Int[Array, "B tiles row"]]:
    """Makes the tables of kernels, each with the step and the side of `walk_table`.

    Args:
      mask: the mask before padding.
    """
    if mask.sees_all:
        return {}
    mask = pad_mask(mask, TILE, TILE)
    return {walk: walk_table(mask, *walk) for walk in walks}


def walk_table(mask: Mask, step: int, transposed: bool) -> Int[Array, "B tiles row"]:
    """Lists the blocks that each tile walks.

    Args:
      mask: the mask, padded to whole tiles.
      step: tokens per streamed block.
      transposed: whether the tiles are keys and the queries stream.

    Returns:
      int32 [B, tiles, 3 + columns]. A row is the tile, the number of fully visible
        blocks, the number of blocks that are at least partly visible, then the blocks
        in that order. Rows are sorted by work, so that no heavy tile starts last.
    """
    if transposed:
        kinds = block_kinds(mask, step, TILE).swapaxes(1, 2)
    else:
        kinds = block_kinds(mask, TILE, step)
    columns = kinds.shape[2]
    index = lax.broadcasted_iota(jnp.int32, kinds.shape, 2)
    rank = jnp.where(kinds == FULL, 0, jnp.where(kinds == EMPTY, 2, 1))
    order = jnp.sort(rank * columns + index, axis=-1) % columns
    counts = [jnp.sum(x, -1, dtype=jnp.int32) for x in (rank == 0, rank < 2)]
    tiles = jnp.argsort(-counts[1], axis=-1).astype(jnp.int32)[..., None]
    rows = jnp.concatenate([jnp.stack(counts, axis=-1), order], axis=-1)
    rows = jnp.take_along_axis(rows, tiles, axis=1)
    return jnp.concatenate([tiles, rows], axis=-1)

"""Cutting a chunk into whole blocks, and the blocks that a step of the grid sees."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int8

from usp_jax.kernels.mosaic_tpu.blocks import LANES, Tile
from usp_jax.kernels.mosaic_tpu.walk import Index
from usp_jax.kernels.padding import pad_length, pad_mask
from usp_jax.masking import FULL, Mask, Tokens, block_kinds


@dataclasses.dataclass(frozen=True)
class Cut:
    """The blocks of one chunk, padded to whole blocks."""

    batch: int
    q_length: int
    kv_length: int
    block_q: int
    block_kv: int
    tile: Tile
    mask: Mask

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, mask: Mask, tile: Tile) -> "Cut":
        """Cuts a chunk into blocks of about the sizes of `tile`."""
        lengths = q.shape[1], k.shape[1]
        block_q, block_kv = map(_block, lengths, (tile.q, tile.kv))
        mask = pad_mask(mask, block_q, block_kv)
        return cls(q.shape[0], *lengths, block_q, block_kv, tile, mask)

    @property
    def q_padded(self) -> int:
        return self.mask.q.positions.shape[1]

    @property
    def kinds(self) -> Int8[Array, "rows nq nk"]:
        """Kinds of the blocks: [mask rows, blocks of queries, blocks of keys]"""
        if not self.mask.sees_all:
            return block_kinds(self.mask, self.block_q, self.block_kv)
        kv_padded = self.mask.kv.positions.shape[1]
        shape = (1, self.q_padded // self.block_q, kv_padded // self.block_kv)
        return jnp.full(shape, FULL, jnp.int8)

    @property
    def tokens(self) -> tuple[Tokens, Tokens]:
        """Tokens that the kernels need for the mask, as rows: int32 [B or 1, 1, T]"""
        rule = self.mask.rule
        ordered = rule.before is not None or rule.after is not None

        def rows(tokens: Tokens) -> Tokens:
            positions = tokens.positions if ordered else None
            tokens = Tokens(positions, tokens.segment_ids)
            return jax.tree.map(lambda x: x[:, None], tokens)

        return rows(self.mask.q), rows(self.mask.kv)

    def cost(self, q: jax.Array, k: jax.Array, *, num_products: int) -> pl.CostEstimate:
        """Estimates the cost for XLA's scheduler; a bounded mask counts half the pairs.

        Args:
          num_products: matrix products per block.
        """
        rule = self.mask.rule
        seen = 0.5 if rule.before is not None or rule.after is not None else 1
        pairs = int(seen * q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1])
        return pl.CostEstimate(
            flops=2 * num_products * pairs * q.shape[3],
            transcendentals=pairs,
            bytes_accessed=pairs // self.block_q * 2 * q.shape[3] * q.dtype.itemsize,
        )

    def q(self, x: jax.Array) -> jax.Array:
        """[B, T, N, H] -> [B, N, T, H], padded"""
        return pad_length(x, self.block_q, 0.0).swapaxes(1, 2)

    def kv(self, x: jax.Array) -> jax.Array:
        """[B, S, K, H] -> [B, K, S, H], padded"""
        return pad_length(x, self.block_kv, 0.0).swapaxes(1, 2)

    def row(self, x: jax.Array, fill: float) -> jax.Array:
        """[B, T, N] -> [B, N, 1, T], padded"""
        return pad_length(x, self.block_q, fill).swapaxes(1, 2)[:, :, None]

    def from_q(self, x: jax.Array) -> jax.Array:
        """Inverse of `q`."""
        return x.swapaxes(1, 2)[:, : self.q_length]

    def from_kv(self, x: jax.Array) -> jax.Array:
        """Inverse of `kv`."""
        return x.swapaxes(1, 2)[:, : self.kv_length]

    def from_row(self, x: jax.Array) -> jax.Array:
        """Inverse of `row`."""
        return x[:, :, 0].swapaxes(1, 2)[:, : self.q_length]


@dataclasses.dataclass(frozen=True)
class Place:
    """The batch row, heads and blocks (i of queries, j of keys) of a grid step."""

    row: jax.Array
    head: jax.Array
    kv_head: jax.Array
    i: jax.Array
    j: jax.Array


@dataclasses.dataclass(frozen=True)
class Specs:
    """The block specs of a kernel; `place` maps the indices of the grid to a Place."""

    cut: Cut
    place: Callable[..., Place]

    def q(self, width: int) -> pl.BlockSpec:
        """Blocks of [B, N, T, width]."""
        shape = (None, None, self.cut.block_q, width)
        return self._spec(shape, lambda at: (at.row, at.head, at.i, 0))

    def kv(self, width: int) -> pl.BlockSpec:
        """Blocks of [B, K, S, width]."""
        shape = (None, None, self.cut.block_kv, width)
        return self._spec(shape, lambda at: (at.row, at.kv_head, at.j, 0))

    def rows(self, count: int = 1) -> pl.BlockSpec:
        """Blocks of [B, N, count, T]."""
        shape = (None, None, count, self.cut.block_q)
        return self._spec(shape, lambda at: (at.row, at.head, 0, at.i))

    def tokens(self) -> tuple[Tokens, Tokens]:
        """Blocks of the cut's tokens."""

        def of(
            tokens: Tokens, block: int, index: Callable[[Place], jax.Array]
        ) -> Tokens:
            def one(x: jax.Array) -> pl.BlockSpec:
                shape, varies = (None, 1, block), x.shape[0] > 1
                return self._spec(
                    shape, lambda at: (at.row if varies else 0, 0, index(at))
                )

            return jax.tree.map(one, tokens)

        q, kv = self.cut.tokens
        return (
            of(q, self.cut.block_q, lambda at: at.i),
            of(kv, self.cut.block_kv, lambda at: at.j),
        )

    def _spec(
        self,
        shape: tuple[int | None, ...],
        index: Callable[[Place], tuple[Index, ...]],
    ) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *grid: index(self.place(*grid)))


def _block(length: int, size: int) -> int:
    """Returns a block size of at most about `size` that cuts a length evenly.

    With an even number of blocks, none straddles the two chunks of a zigzag shard.
    """
    blocks = -(-length // size)
    blocks += blocks % 2 if blocks > 1 else 0
    return -(-length // (blocks * LANES)) * LANES

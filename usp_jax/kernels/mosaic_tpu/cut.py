"""How the TPU kernels cut a chunk into whole blocks, and which they see at a step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from usp_jax.kernels.mosaic_tpu.blocks import LANES
from usp_jax.masking import FULL, Mask, Tokens, block_kinds, pad_tokens


@dataclasses.dataclass(frozen=True)
class Cut:
    """How one chunk is padded to whole blocks."""

    batch: int
    q_length: int
    kv_length: int
    block_q: int
    block_kv: int
    kv_compute: int
    mask: Mask

    @classmethod
    def of(cls, q: Any, k: Any, mask: Mask, tile: Any) -> "Cut":
        lengths = q.shape[1], k.shape[1]
        block_q, block_kv = map(_block, lengths, (tile.q, tile.kv))
        pad_q, pad_kv = -lengths[0] % block_q, -lengths[1] % block_kv
        with_ids = bool(pad_q or pad_kv)
        mask = Mask(
            mask.rule,
            pad_tokens(mask.q, pad_q, with_ids=with_ids),
            pad_tokens(mask.kv, pad_kv, with_ids=with_ids),
        )
        sizes = (block_q, block_kv, min(tile.kv_compute, block_kv))
        return cls(q.shape[0], *lengths, *sizes, mask)

    @property
    def q_padded(self) -> int:
        return self.mask.q.positions.shape[1]

    @property
    def kinds(self) -> Any:
        """Each block's kind: [rows of the mask, blocks of queries, blocks of keys]"""
        if not self.mask.sees_all:
            return block_kinds(self.mask, self.block_q, self.block_kv)
        kv_padded = self.mask.kv.positions.shape[1]
        shape = (1, self.q_padded // self.block_q, kv_padded // self.block_kv)
        return jnp.full(shape, FULL, jnp.int8)

    @property
    def tokens(self) -> tuple[Tokens, Tokens]:
        """What kernels read of the mask, as rows: int32 [B or 1, 1, T]"""
        rule = self.mask.rule
        ordered = rule.before is not None or rule.after is not None

        def rows(tokens: Tokens) -> Tokens:
            positions = tokens.positions if ordered else None
            tokens = Tokens(positions, tokens.segment_ids)
            return jax.tree.map(lambda x: x[:, None], tokens)

        return rows(self.mask.q), rows(self.mask.kv)

    def cost(self, q: Any, k: Any, *, num_products: int) -> Any:
        """What XLA's scheduler is told; of a bounded order, half is seen."""
        rule = self.mask.rule
        seen = 0.5 if rule.before is not None or rule.after is not None else 1
        pairs = int(seen * q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1])
        return pl.CostEstimate(
            flops=2 * num_products * pairs * q.shape[3],
            transcendentals=pairs,
            bytes_accessed=pairs // self.block_q * 2 * q.shape[3] * q.dtype.itemsize,
        )

    def q(self, x: Any) -> Any:
        """[B, T, N, H] -> [B, N, T, H], padded"""
        return _pad(x, self.block_q, 0).swapaxes(1, 2)

    def kv(self, x: Any) -> Any:
        """[B, S, K, H] -> [B, K, S, H], padded"""
        return _pad(x, self.block_kv, 0).swapaxes(1, 2)

    def row(self, x: Any, fill: float | int) -> Any:
        """[B, T, N] -> [B, N, 1, T], padded"""
        return _pad(x, self.block_q, fill).swapaxes(1, 2)[:, :, None]

    def from_q(self, x: Any) -> Any:
        """The inverse of `q`."""
        return x.swapaxes(1, 2)[:, : self.q_length]

    def from_kv(self, x: Any) -> Any:
        """The inverse of `kv`."""
        return x.swapaxes(1, 2)[:, : self.kv_length]

    def from_row(self, x: Any) -> Any:
        """The inverse of `row`."""
        return x[:, :, 0].swapaxes(1, 2)[:, : self.q_length]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a step of the grid is: batch row, heads, block of queries and of keys."""

    row: Any
    head: Any
    kv_head: Any
    i: Any
    j: Any


@dataclasses.dataclass(frozen=True)
class Specs:
    """Which blocks a kernel sees; `place` maps the grid's indices to a Place."""

    cut: Cut
    place: Callable[..., Place]

    def q(self, width: int) -> Any:
        """Blocks of [B, N, T, width]."""
        shape = (None, None, self.cut.block_q, width)
        return self._spec(shape, lambda at: (at.row, at.head, at.i, 0))

    def kv(self, width: int) -> Any:
        """Blocks of [B, K, S, width]."""
        shape = (None, None, self.cut.block_kv, width)
        return self._spec(shape, lambda at: (at.row, at.kv_head, at.j, 0))

    def row(self) -> Any:
        """Blocks of [B, N, 1, T]."""
        shape = (None, None, 1, self.cut.block_q)
        return self._spec(shape, lambda at: (at.row, at.head, 0, at.i))

    def tokens(self) -> tuple[Tokens, Tokens]:
        """Blocks of the cut's tokens."""

        def of(tokens: Tokens, block: int, index: Callable[..., Any]) -> Tokens:
            def one(x: Any) -> Any:
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
        shape: tuple[None, None, int, int] | tuple[None, int, int],
        index: Callable[..., Any],
    ) -> Any:
        return pl.BlockSpec(shape, lambda *grid: index(self.place(*grid)))


def _block(length: int, size: int) -> int:
    """The block size, near `size` at most, that cuts a length evenly.

    An even number of blocks lets none straddle the two chunks of a zigzag shard.
    """
    blocks = -(-length // size)
    blocks += blocks % 2 if blocks > 1 else 0
    return -(-length // (blocks * LANES)) * LANES


def _pad(x: Any, block: int, fill: float | int) -> Any:
    """Pads the tokens of [B, T, ...] to a multiple of the block."""
    if not (padding := -x.shape[1] % block):
        return x
    widths = [(0, padding if i == 1 else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=fill)

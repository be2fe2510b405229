"""Block sizes of the Triton kernels, by compute capability and head size."""

import dataclasses

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from usp_jax.kernels.choice import Target
from usp_jax.kernels.table import Row, lookup


@dataclasses.dataclass(frozen=True)
class Tile:
    """The block sizes of one kernel, in tokens, and its Triton compiler options."""

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name}={size} must be a power of two >= 16")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps={self.num_warps} must be 1, 2, 4, 8 or 16")
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages} must be >= 1")

    def within(self, q: jax.Array, k: jax.Array) -> "Tile":
        """Returns the tile with blocks no longer than the arrays need."""
        block_q = min(self.block_q, max(16, pl.next_power_of_2(q.shape[1])))
        block_kv = min(self.block_kv, max(16, pl.next_power_of_2(k.shape[1])))
        return dataclasses.replace(self, block_q=block_q, block_kv=block_kv)

    @property
    def params(self) -> plgpu.CompilerParams:
        """The compiler parameters, which also make Pallas choose its Triton backend."""
        return plgpu.CompilerParams(self.num_warps, self.num_stages)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """The tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dkv: Tile

    @classmethod
    def of(cls, target: Target, head_size: int, dtype: DTypeLike) -> "BlockSizes":
        """Returns the default for a device, a head size and the dtype of q, k, v.

        Raises:
          ValueError: there is no default for this head size.
        """
        return lookup(TABLE, target, head_size, dtype)


# Where no source is named, found by compiling, not by timing: with 16 bits none spills
# registers on an A100 or an H200. A B200 spills some at head sizes 96 and 256, an A100
# at 256 in float32 and, under a window with two bounds, at 192. The capabilities named
# have 163 KiB of shared memory a block and more, others 99.
TABLE = (
    Row(
        BlockSizes(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        head_size=64,
        itemsize=2,
    ),
    Row(
        BlockSizes(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
        head_size=96,
        itemsize=2,
    ),
    Row(
        BlockSizes(Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        capabilities=((9, 0),),
        head_size=128,
        itemsize=2,
        source="2026-11-26, jax 0.11.2, NVIDIA H100, causal 16384, head size 128",
    ),
    Row(
        BlockSizes(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        head_size=128,
        itemsize=2,
    ),
    Row(
        BlockSizes(Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)),
        head_size=192,
        itemsize=2,
    ),
    Row(
        BlockSizes(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
        capabilities=((8, 0), (9, 0), (10, 0), (10, 3)),
        head_size=256,
        itemsize=2,
    ),
    Row(
        BlockSizes(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)),
        head_size=256,
        itemsize=2,
    ),
    Row(
        BlockSizes(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        head_size=128,
        itemsize=4,
    ),
    Row(
        BlockSizes(Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 16, 4, 2)),
        head_size=256,
        itemsize=4,
    ),
)

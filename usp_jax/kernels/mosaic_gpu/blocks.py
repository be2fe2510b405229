"""Block sizes of the Mosaic GPU kernels, by device kind and head size."""

import dataclasses

from jax.typing import DTypeLike

from usp_jax.kernels.choice import Target
from usp_jax.kernels.table import Row, lookup


@dataclasses.dataclass(frozen=True)
class Tile:
    """What streams through one kernel.

    Attributes:
      tokens: of a block: keys of the forward and of dq, queries of dk and dv.
      stages: how many blocks there are buffers for.
    """

    tokens: int
    stages: int = 2

    def __post_init__(self) -> None:
        if self.tokens not in (16, 32, 64, 128):
            raise ValueError(f"tokens={self.tokens} must be 16, 32, 64 or 128")
        if self.stages < 1:
            raise ValueError(f"stages={self.stages} must be at least 1")


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """The tiles of the kernels.

    Attributes:
      split_dkv: makes dk and dv in two passes, where registers hold only one of them.
    """

    forward: Tile
    dq: Tile
    dkv: Tile
    split_dkv: bool = False

    @classmethod
    def of(cls, target: Target, head_size: int, dtype: DTypeLike) -> "BlockSizes":
        """The default for a device, a head size and the dtype of q, k, v.

        Raises:
          ValueError: no default is for heads of that size.
        """
        return lookup(TABLE, target, head_size, dtype)


# Chosen to fit registers and shared memory of compute capability 9.0, whose
# multiprocessors have 227 KiB and 64K registers; those with a source are the fastest of
# what benchmarks/tune.py tries.
TABLE = (
    Row(BlockSizes(Tile(128), Tile(128), Tile(128)), head_size=64),
    Row(
        BlockSizes(Tile(128), Tile(128), Tile(64)),
        head_size=128,
        source="2026-11-26, jax 0.11.2, NVIDIA H100, causal 16384, head size 128",
    ),
    Row(BlockSizes(Tile(64), Tile(64), Tile(64), split_dkv=True), head_size=192),
    Row(BlockSizes(Tile(64), Tile(32), Tile(32), split_dkv=True), head_size=256),
)

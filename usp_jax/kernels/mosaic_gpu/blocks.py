"""Block sizes of the Mosaic GPU kernels, by device kind and head size."""

import dataclasses

from jax.typing import DTypeLike

from usp_jax.kernels.choice import Target
from usp_jax.kernels.table import Row, lookup


@dataclasses.dataclass(frozen=True)
class Tile:
    """The blocks that stream through one kernel.

    Attributes:
      tokens: tokens per block: keys for the forward and dq, queries for dk and dv.
      stages: the number of blocks that have a buffer.
      second: the same for the second stream, v or dout; None means `stages`. One is
        enough for dq, and for dk alone: only an early product of a step reads it.
    """

    tokens: int
    stages: int = 2
    second: int | None = None

    def __post_init__(self) -> None:
        if self.tokens not in (16, 32, 64, 128):
            raise ValueError(f"tokens={self.tokens} must be 16, 32, 64 or 128")
        if min(self.buffers) < 1:
            raise ValueError(f"{self.stages=} and {self.second=} must be at least 1")

    @property
    def buffers(self) -> tuple[int, int]:
        """The numbers of buffers of the two streams."""
        return self.stages, self.stages if self.second is None else self.second


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """The tiles of the three kernels.

    Attributes:
      split_dkv: whether to compute dk and dv in two passes, for heads where registers
        hold only one of them.
      dv: the tile of the pass for dv, if there are two; None means `dkv`, the other's.
    """

    forward: Tile
    dq: Tile
    dkv: Tile
    split_dkv: bool = False
    dv: Tile | None = None

    @property
    def walks(self) -> set[tuple[int, bool]]:
        """The step of each kernel, and whether its tiles are keys."""
        tiles = self.forward, self.dq, self.dkv, self.dv or self.dkv
        return {(tile.tokens, n > 1) for n, tile in enumerate(tiles)}

    @classmethod
    def of(
        cls,
        target: Target,
        head_size: int,
        dtype: DTypeLike,
        value_size: int | None = None,
    ) -> "BlockSizes":
        """Returns the default for a device, a head size and the dtype of q, k, v.

        Args:
          head_size: the larger of the head sizes of keys and values.
          value_size: the head size of values, if it is smaller.

        Raises:
          ValueError: there is no default for this head size.
        """
        return lookup(TABLE, target, head_size, dtype, value_size)


# Chosen to fit the 64K registers and 227 KiB of shared memory that a multiprocessor of
# compute capability 9.0 has: long tiles without spilled registers, with two stages if
# they fit (benchmarks/hopper_resources.py). Rows with a source are the fastest that
# benchmarks/tune.py found. Heads of 192 with values of 128 are those of latent
# attention.
#
# For heads of 256, blocks of 64 take 3/4 of the cycles of 32 in dq and dk, by count: 64
# keys of dq take 3072 of the tensor cores and of shared memory, at 128 bytes a cycle;
# twice 32 keys take 4096 of shared memory. The forward with 128 keys spills 152 bytes a
# thread.
TABLE = (
    Row(BlockSizes(Tile(128), Tile(128), Tile(128)), head_size=64),
    Row(
        BlockSizes(Tile(128), Tile(128), Tile(64)),
        head_size=128,
        source="2026-11-26, jax 0.11.2, NVIDIA H100, causal 16384, head size 128",
    ),
    Row(
        BlockSizes(Tile(128), Tile(64), Tile(64), split_dkv=True, dv=Tile(128)),
        head_size=192,
        value_size=128,
    ),
    Row(BlockSizes(Tile(64), Tile(64), Tile(64), split_dkv=True), head_size=192),
    Row(
        BlockSizes(
            Tile(64),
            Tile(64, second=1),
            Tile(64, second=1),
            split_dkv=True,
            dv=Tile(64),
        ),
        head_size=256,
    ),
)

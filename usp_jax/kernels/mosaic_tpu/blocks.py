"""Block sizes of the TPU kernels, by device kind."""

import dataclasses

from jax.typing import DTypeLike

from usp_jax.kernels.choice import Target
from usp_jax.kernels.table import Row, lookup

LANES = 128


@dataclasses.dataclass(frozen=True)
class Tile:
    """The block sizes of one kernel; all are multiples of 128.

    Attributes:
      q: queries per block.
      kv: keys per block.
      kv_compute: keys multiplied at a time, which bounds the scores held at once.
      ahead: whether the forward computes the scores of the next piece before the
        softmax of this one, so that matrix and vector units work at the same time.
    """

    q: int
    kv: int
    kv_compute: int
    ahead: bool = False

    def __post_init__(self) -> None:
        for name in ("q", "kv", "kv_compute"):
            size = getattr(self, name)
            if size < LANES or size % LANES:
                raise ValueError(
                    f"Tile.{name}={size} must be a positive multiple of {LANES}"
                )
        if self.kv % self.kv_compute:
            raise ValueError(
                f"Tile.kv={self.kv} must be a multiple of {self.kv_compute=}"
            )


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """The tiles of both kernels.

    Attributes:
      vmem_mib: the limit of vector memory in MiB.
      cores: the number of cores of a device.
    """

    forward: Tile
    backward: Tile
    vmem_mib: int = 16
    cores: int = 1

    @classmethod
    def of(cls, target: Target, head_size: int, dtype: DTypeLike) -> "BlockSizes":
        """Returns the default for a device, a head size and the dtype of q, k, v."""
        return lookup(TABLE, target, head_size, dtype)


# v5e and v6e have 128 MiB of vector memory, v5p and later 64 MiB per core, earlier ones
# 16 MiB. Chosen by the cycles of libtpu's schedules, for causal masks of 8K and 32K:
# many sizes for heads of 128, a few others for those of 64, 192/128 and 256. Of these,
# blocks of 2048 keys save 6 % at 32K in v6e's backward for 256, and none else 2 %
# (`benchmarks/results/*-tpu-tune.jsonl`). On v5e and v5p the matrix units bound both
# passes, and on later ones only the backward: there, four pieces in turn let the
# forward's matrix and vector units work at the same time.
TABLE = (
    Row(
        BlockSizes(Tile(1024, 1024, 512), Tile(1024, 1024, 512), vmem_mib=64),
        device="TPU v5 lite",
        source="scheduled",
    ),
    Row(
        BlockSizes(
            Tile(1024, 2048, 512, ahead=True), Tile(1024, 1024, 512), vmem_mib=64
        ),
        device="TPU v6",
        head_size=192,
        source="scheduled",
    ),
    Row(
        BlockSizes(
            Tile(1024, 2048, 512, ahead=True), Tile(1024, 2048, 512), vmem_mib=64
        ),
        device="TPU v6",
        head_size=256,
        itemsize=2,
        source="scheduled",
    ),
    Row(
        BlockSizes(
            Tile(1024, 2048, 512, ahead=True), Tile(1024, 1024, 512), vmem_mib=64
        ),
        device="TPU v6",
        source="scheduled",
    ),
    Row(
        BlockSizes(Tile(1024, 1024, 512), Tile(1024, 1024, 512), vmem_mib=48, cores=2),
        device="TPU v5",
        source="scheduled",
    ),
    Row(
        BlockSizes(
            Tile(1024, 2048, 512, ahead=True), Tile(1024, 1024, 512), vmem_mib=48
        ),
        device="TPU7",
        source="scheduled",
    ),
    Row(
        BlockSizes(
            Tile(1024, 2048, 512, ahead=True), Tile(1024, 1024, 512), vmem_mib=48
        ),
        device="TPU v7",
        source="scheduled",
    ),
    Row(BlockSizes(Tile(512, 512, 512), Tile(512, 512, 256), cores=2), device="TPU v4"),
    Row(BlockSizes(Tile(512, 512, 512), Tile(512, 512, 256))),
)

"""The mask, logits and block sizes that the Hopper kernels of a chunk share."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from usp_jax.kernels.choice import Target
from usp_jax.kernels.contract import BlockTables
from usp_jax.kernels.logits import LOG2E, Logits
from usp_jax.kernels.mosaic_gpu.blocks import BlockSizes
from usp_jax.kernels.mosaic_gpu.tiles import TILE, Operand
from usp_jax.kernels.mosaic_gpu.walk import walk_tables
from usp_jax.kernels.padding import pad_mask
from usp_jax.masking import Mask


def block_tables(
    mask: Mask, head_size: int, value_size: int, dtype: DTypeLike, *, target: Target
) -> BlockTables:
    """Makes the tables of a mask for the three kernels; the `MakeTables` of a chunk."""
    size = max(head_size, value_size)
    return walk_tables(mask, BlockSizes.of(target, size, dtype, value_size).walks)


@dataclasses.dataclass(frozen=True)
class ChunkSpec:
    """The static settings of a chunk, and its mask.

    Attributes:
      mask: the mask, padded to whole tiles.
      group: the number of query heads per key head.
    """

    mask: Mask
    logits: Logits
    blocks: BlockSizes
    group: int
    interpret: bool

    @classmethod
    def of(
        cls,
        q: jax.Array,
        k: Operand,
        v: Operand,
        mask: Mask,
        logits: Logits,
        target: Target,
        blocks: BlockSizes | None,
        interpret: bool,
    ) -> "ChunkSpec":
        """Checks that these kernels support a chunk, and pads its mask.

        Raises:
          NotImplementedError: q is not bfloat16 or float16, or the head size is over
            256.
        """
        if q.dtype not in (jnp.bfloat16, jnp.float16):
            raise NotImplementedError(
                f"{q.dtype=}: mosaic_gpu supports only bfloat16 and float16; use "
                "implementation='xla'"
            )
        size = max(q.shape[-1], v.shape[-1])
        if size > 256:
            raise NotImplementedError(
                f"mosaic_gpu supports head sizes up to 256, not {size}; use "
                "implementation='xla'"
            )
        blocks = blocks or BlockSizes.of(target, size, q.dtype, v.shape[-1])
        mask = pad_mask(mask, TILE, TILE)
        return cls(mask, logits, blocks, q.shape[2] // k.shape[2], interpret)

    def base2(self, products: jax.Array) -> tuple[jax.Array, float]:
        """Returns (x, c) with c > 0 such that c · x are the logits in base 2."""
        if self.logits.soft_cap is None and self.logits.scale > 0:
            return products, self.logits.scale * LOG2E
        return self.logits.of(products), LOG2E

    def weights(
        self, products: jax.Array, lse: jax.Array, seen: jax.Array | None
    ) -> jax.Array:
        """Computes p from the products q·k and the base-2 lse."""
        s, scale = self.base2(products)
        p = jnp.exp2(s * scale - lse)
        return p if seen is None else jnp.where(seen, p, 0.0)

    def pull_back(self, dlogits: jax.Array, products: jax.Array) -> jax.Array:
        """Returns the cotangent of the products q·k, without `late_scale`."""
        if self.logits.soft_cap is None:
            return dlogits
        return self.logits.pull_back(dlogits, self.logits.of(products))

    @property
    def late_scale(self) -> float:
        """The factor still to be applied to sums of `pull_back`."""
        return self.logits.scale if self.logits.soft_cap is None else 1.0

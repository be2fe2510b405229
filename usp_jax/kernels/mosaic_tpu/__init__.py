"""The chunk contract in Pallas for TPU (FlashAttention-2, arXiv 2307.08691).

Both kernels (`forward.py`, `backward.py`) walk a list of the blocks of (queries, keys)
that the mask lets see each other (`walk.py`). The list is scalar-prefetched, so that
index maps read it: a block that is not listed is neither fetched nor a step of the
grid, whose length is the list's. Listed blocks carry their kind; only PARTIAL ones
evaluate the mask. One core makes all visits of a block of results, in order, so every
sum is the same each time.

Arrays have heads in front of tokens, [B, N, T, H] (`cut.py`). What is one number per
token (lse, delta, positions, ids) is a row [B, N or 1, 1, T] of HBM; the forward, which
has queries along sublanes, turns it into a column once per run, and the backward has
keys along sublanes for the same reason (`tiles.py`). Logits have base 2: exp2 is what
the hardware has.
"""

from usp_jax.kernels.mosaic_tpu.backward import chunk_backward as chunk_backward
from usp_jax.kernels.mosaic_tpu.blocks import (
    BlockSizes as BlockSizes,
    Tile as Tile,
)
from usp_jax.kernels.mosaic_tpu.forward import chunk_forward as chunk_forward

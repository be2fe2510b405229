"""The chunk contract in Pallas for TPU (FlashAttention-2, arXiv 2307.08691).

Both kernels (`forward.py`, `backward.py`) walk a list of the visible blocks of
(queries, keys) (`walk.py`). The list is scalar-prefetched, so that index maps can read
it, and the grid has as many steps as the list has entries: a block that is not listed
is neither fetched nor visited. Each entry has the kind of its block; only PARTIAL
blocks evaluate the mask. One core makes all visits to a block of results, in order, so
the sums are reproducible.

Arrays have heads before tokens, [B, N, T, H] (`cut.py`). Values with one number per
token (lse, delta, positions, ids) are rows [B, N or 1, 1, T] in HBM. The forward has
queries along sublanes and turns their rows into columns once per run; the backward has
keys along sublanes, so that lse and delta can stay rows (`tiles.py`). Logits are in
base 2, because the hardware has exp2.
"""

from usp_jax.kernels.mosaic_tpu.backward import chunk_backward as chunk_backward
from usp_jax.kernels.mosaic_tpu.blocks import (
    BlockSizes as BlockSizes,
    Tile as Tile,
)
from usp_jax.kernels.mosaic_tpu.forward import chunk_forward as chunk_forward

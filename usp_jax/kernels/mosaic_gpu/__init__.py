"""The chunk contract as Pallas Mosaic GPU kernels for Hopper: TMA, WGMMA, warp roles.

FlashAttention-3 (arXiv 2407.08608, Algorithms 1 and 2) over lists of blocks. A CUDA
thread block (cta) has three warpgroups: two compute, and the third copies tiles from
global to shared memory for them (`roles.py`). A computing warpgroup owns 64 rows of a
tile of 128 (queries in the forward and for dq, keys for dk and dv). It keeps their sums
in registers while blocks of the other side stream through a ring of buffers:

    forward   q stays     k, v stream     o += p v, with s = q kᵀ of the next block in
                                          flight; the two warpgroups take turns
    dq        q, do stay  k, v stream     dq += ds k
    dk, dv    k, v stay   q, do stream    dv += pᵀ do, dk += dsᵀ q, for all query heads
                                          of the key head

A table in global memory lists the blocks to stream (`walk.py`): first the fully visible
ones, which need no mask, then the partly visible ones, where the mask is evaluated from
positions and segment ids. No other block is fetched. Where jax can update the carry in
place, a tile that sees nothing writes nothing. There are no atomics, so results are
reproducible; the backward of `fused.py` adds integers atomically, whose sums are too.

Each buffer has two barriers: "full" completes when its copies do, and both computing
warpgroups arrive at "free" when no product reads the buffer any more. Head sizes are
padded to multiples of 16, lengths to multiples of 128.
"""

from usp_jax.kernels.mosaic_gpu.backward import (
    chunk_backward as chunk_backward,
    direct_backward as direct_backward,
)
from usp_jax.kernels.mosaic_gpu.blocks import (
    BlockSizes as BlockSizes,
    Tile as Tile,
)
from usp_jax.kernels.mosaic_gpu.forward import (
    chunk_forward as chunk_forward,
    direct_forward as direct_forward,
)
from usp_jax.kernels.mosaic_gpu.spec import block_tables as block_tables

"""The chunk contract as Pallas Mosaic GPU kernels for Hopper: TMA, WGMMA, warp roles.

FlashAttention-3 (arXiv 2407.08608, Algorithms 1 and 2) over lists of blocks. A CUDA
thread block (cta) has three warpgroups: two compute, and one copies tiles from global
to shared memory for them (`roles.py`). A computing warpgroup owns 64 rows of a tile of
128 (of queries forward and for dq, of keys for dk and dv) and keeps their sums in
registers, while blocks of the other side stream through a ring of buffers:

    forward   q stays     k, v stream     o += p v, with s = q kᵀ of the next block in
                                          flight; the two warpgroups take turns
    dq        q, do stay  k, v stream     dq += ds k
    dk, dv    k, v stay   q, do stream    dv += pᵀ do, dk += dsᵀ q, for all query heads
                                          of the key head

Which blocks stream is read from a table in global memory (`walk.py`): first those that
are seen entirely, where nothing is masked, then those seen in part, where the masking
rule is evaluated from positions and segment ids. Nothing else is fetched. A tile that
sees nothing hands its carry through. There are no atomics: results are reproducible.

Every buffer has a barrier for "full", that its copies complete, and one for "free",
that both computing warpgroups arrive at when no product reads it any more. Head sizes
are padded to multiples of 16, lengths to multiples of 128.
"""

from usp_jax.kernels.mosaic_gpu.backward import chunk_backward as chunk_backward
from usp_jax.kernels.mosaic_gpu.blocks import (
    BlockSizes as BlockSizes,
    Tile as Tile,
)
from usp_jax.kernels.mosaic_gpu.forward import chunk_forward as chunk_forward

"""The chunk contract as Pallas Triton kernels: NVIDIA GPUs from Ampere on.

FlashAttention-2 (arXiv 2307.08691), one program for each block of rows: the forward and
dq take a block of queries and walk its list of key blocks; dk, dv take a block of keys
and walk the list of query blocks that see it, for all query heads of its key head. No
result has two writers, so nothing is atomic and every sum has one order.

Lists are read from global memory (`lists.py`). In each the FULL blocks come first, so
that a program runs one loop without mask arithmetic and then one with it.

Arrays stay [B, T, N, H] (`launch.py`). A head is taken in pieces whose sizes are powers
of two, as Triton wants them (80 = 64 + 16), so heads of 80, 96 or 192 have no padded
work (`tiles.py`). Exponentials are base 2 inside; lse is the natural log outside.

JAX has deprecated Pallas Triton; only the choice of kernels depends on this folder.
"""

from usp_jax.kernels.triton.backward import chunk_backward as chunk_backward
from usp_jax.kernels.triton.blocks import (
    BlockSizes as BlockSizes,
    Tile as Tile,
)
from usp_jax.kernels.triton.forward import chunk_forward as chunk_forward

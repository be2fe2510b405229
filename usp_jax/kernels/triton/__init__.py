"""The chunk contract as Pallas Triton kernels for NVIDIA GPUs, Ampere or later.

FlashAttention-2 (arXiv 2307.08691) with one program per block of rows. The forward and
dq take a block of queries and walk the list of key blocks that it sees; dk and dv take
a block of keys and walk the list of query blocks that see it, for all query heads of
its key head. Each result has a single writer, so no atomics are needed and the order of
each sum is fixed.

The lists are in global memory (`lists.py`). In each list the FULL blocks come first: a
program runs one loop without mask arithmetic, then one with it.

Arrays keep their layout [B, T, N, H] (`launch.py`). Triton needs powers of two, so a
head is split into pieces of such sizes (80 = 64 + 16) and heads of 80, 96 or 192 need
no padding (`tiles.py`). Exponentials are base 2 inside the kernels; lse is natural
outside them.

JAX has deprecated Pallas Triton; only the choice of kernels depends on this folder.
"""

from usp_jax.kernels.triton.backward import chunk_backward as chunk_backward
from usp_jax.kernels.triton.blocks import (
    BlockSizes as BlockSizes,
    Tile as Tile,
)
from usp_jax.kernels.triton.forward import chunk_forward as chunk_forward

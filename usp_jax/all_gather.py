"""Context parallelism by all-gather: every device gathers all keys and values first.

What LLaMA 3 was trained with (arXiv 2407.21783, section 3.3.2), and the baseline of the
ring: the same bytes forward, (R - 1) / R of the whole k, v, in one collective that
nothing hides, and memory for the whole. Backward gathers again and reduce-scatters
dk, dv in the accumulation dtype.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from usp_jax.kernels import Carry
from usp_jax.masking import Mask
from usp_jax.ring import Ring


def gather_forward(
    ring: Ring,
    q: Float[Array, "B T n H"],
    kv: Float[Array, "2 B S m H"],
    carry: Carry | None = None,
) -> Carry:
    """`ring_forward` in one chunk."""
    kv = lax.all_gather(kv, ring.axis_name, axis=2, tiled=True)
    return ring.chunk.forward(q, *kv, _mask(ring), carry, ring.logits)


def gather_backward(
    ring: Ring,
    q: Float[Array, "B T n H"],
    kv: Float[Array, "2 B S m H"],
    dout: Float[Array, "B T n H"],
    lse: Float[Array, "B T n"],
    delta: Float[Array, "B T n"],
) -> tuple[Float[Array, "B T n H"], Float[Array, "2 B S m H"]]:
    """`ring_backward` in one chunk."""
    kv = lax.all_gather(kv, ring.axis_name, axis=2, tiled=True)
    dq, *dkv = ring.chunk.backward(q, *kv, dout, lse, delta, _mask(ring), ring.logits)
    dkv = lax.psum_scatter(
        jnp.stack(dkv), ring.axis_name, scatter_dimension=2, tiled=True
    )
    return dq, dkv


def _mask(ring):
    return Mask(ring.rule, ring.q_tokens.shard(ring.index), ring.kv_tokens.all())

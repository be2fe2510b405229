"""Context parallelism by all-gather: every device gathers all keys and values first.

LLaMA 3 was trained with it (arXiv 2407.21783, section 3.3.2), and it is the baseline
for the ring. The forward pass moves the same bytes, (R - 1) / R of all k, v, in one
collective that nothing hides, and needs memory for all k, v. The backward pass gathers
again and reduce-scatters dk, dv in the accumulation dtype.
"""

import dataclasses

from jax import lax
from jaxtyping import Array, Float

from usp_jax.gathering import scattered
from usp_jax.kernels import Carry
from usp_jax.ring.keys import Stays
from usp_jax.ring.ring import Ring


@dataclasses.dataclass(frozen=True)
class AllGather:
    """Gathers all k, v at once: needs memory for them, and nothing overlaps."""


def gather_forward(
    ring: Ring,
    q: Float[Array, "B T n H"],
    kv: Float[Array, "B S m D"],
    carry: Carry | None = None,
) -> Carry:
    """Computes `ring_forward` in one chunk."""
    kv = lax.all_gather(kv, ring.axis_name, axis=1, tiled=True)
    mask = ring.mask(ring.kv_tokens.all())
    return ring.chunk_forward(mask, q, kv, carry, is_last=True)


def gather_backward(
    ring: Ring,
    q: Float[Array, "B T n H"],
    kv: Float[Array, "B S m D"],
    dout: Float[Array, "B T n V"],
    lse: Float[Array, "B T n"],
    delta: Float[Array, "B T n"],
) -> tuple[Stays, Float[Array, "B S m D"]]:
    """Computes `ring_backward` in one chunk."""
    kv = lax.all_gather(kv, ring.axis_name, axis=1, tiled=True)
    mask = ring.mask(ring.kv_tokens.all())
    # The sum over devices is in the accumulation dtype.
    ring = dataclasses.replace(ring, rounds_dkv=False)
    stays, dkv = ring.chunk_backward(mask, q, kv, dout, lse, delta, is_only=True)
    assert ring.axis_name is not None
    return stays, scattered(dkv, ((ring.axis_name, None),), 1)

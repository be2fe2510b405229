"""The chunk contract: two functions that every implementation of attention has.

G is the number of query heads of a key/value head; all results have the accumulation
dtype, promote_types(q.dtype, float32):

    chunk_forward(q, k, v, mask, carry, logits) -> carry
    chunk_backward(q, k, v, dout, lse, delta, mask, logits) -> dq, dk, dv

`carry` is (out [B, T, N, V], lse [B, T, N]) of the keys seen so far, or None before the
first. The backward takes the *global* lse and delta = sum(out · dout, -1), so that the
parts of all chunks add up (FlashAttention-2, arXiv 2307.08691, Algorithm 2). A row that
has seen nothing has lse = -inf and out = 0, and its gradient is 0.
"""

import dataclasses
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from usp_jax.kernels.choice import Target
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask

Carry = tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]

# dq, dk and dv.
Grads = tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]


@runtime_checkable
class ChunkForward(Protocol):
    """Attention of q over one chunk of keys, merged into what was seen before."""

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        mask: Mask,
        carry: Carry | None,
        logits: Logits,
    ) -> Carry: ...


@runtime_checkable
class ChunkBackward(Protocol):
    """The part of dq, dk and dv that comes from one chunk of keys."""

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        dout: Float[Array, "B T N V"],
        lse: Float[Array, "B T N"],
        delta: Float[Array, "B T N"],
        mask: Mask,
        logits: Logits,
    ) -> Grads: ...


@dataclasses.dataclass(frozen=True)
class Chunk:
    """An implementation of the contract."""

    forward: ChunkForward
    backward: ChunkBackward


@runtime_checkable
class PallasForward(Protocol):
    """A `ChunkForward` whose block sizes are chosen for a device.

    `interpret` runs it on any device, in one of jax's interpreters.
    """

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        mask: Mask,
        carry: Carry | None,
        logits: Logits,
        *,
        target: Target,
        interpret: bool = False,
    ) -> Carry: ...


@runtime_checkable
class PallasBackward(Protocol):
    """A `ChunkBackward` whose block sizes are chosen for a device."""

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        dout: Float[Array, "B T N V"],
        lse: Float[Array, "B T N"],
        delta: Float[Array, "B T N"],
        mask: Mask,
        logits: Logits,
        *,
        target: Target,
        interpret: bool = False,
    ) -> Grads: ...

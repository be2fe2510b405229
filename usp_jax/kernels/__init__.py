"""The chunk contract, and the choice of who implements it.

Every implementation is one file of this folder with the same two functions. G is the
number of query heads of a key/value head; all results have the accumulation dtype,
promote_types(q.dtype, float32):

    chunk_forward(q, k, v, mask, carry, logits) -> carry
    chunk_backward(q, k, v, dout, lse, delta, mask, logits) -> dq, dk, dv

`carry` is (out [B, T, N, H], lse [B, T, N]) of the keys seen so far, or None before the
first. The backward takes the *global* lse and delta = sum(out · dout, -1), so that the
parts of all chunks add up (FlashAttention-2, arXiv 2307.08691, Algorithm 2). A row that
has seen nothing has lse = -inf and out = 0, and its gradient is 0.
"""

import dataclasses
import functools
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from usp_jax.kernels import reference, xla
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask

Carry = tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]

IMPLEMENTATIONS = ("reference", "xla", "mosaic_gpu", "mosaic_gpu_interpret")


@runtime_checkable
class ChunkForward(Protocol):
    """Attention of q over one chunk of keys, merged into what was seen before."""

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
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
        v: Float[Array, "B S K H"],
        dout: Float[Array, "B T N H"],
        lse: Float[Array, "B T N"],
        delta: Float[Array, "B T N"],
        mask: Mask,
        logits: Logits,
    ) -> tuple[
        Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]
    ]: ...


@dataclasses.dataclass(frozen=True)
class Chunk:
    """An implementation of the contract."""

    forward: ChunkForward
    backward: ChunkBackward


def chunk(implementation: str) -> Chunk:
    """The functions of a chosen implementation."""
    if implementation in ("mosaic_gpu", "mosaic_gpu_interpret"):
        # Where Pallas has no GPU part the other implementations still work.
        from usp_jax.kernels import mosaic_gpu

        how = {"interpret": implementation == "mosaic_gpu_interpret"}
        return Chunk(
            functools.partial(mosaic_gpu.chunk_forward, **how),
            functools.partial(mosaic_gpu.chunk_backward, **how),
        )
    module = {"reference": reference, "xla": xla}[implementation]
    return Chunk(module.chunk_forward, module.chunk_backward)


def choose(implementation: str | None) -> str:
    """The implementation to use: the one asked for, or the platform's best.

    Raises:
      ValueError: `implementation` is not the name of one.
    """
    if implementation is None:
        return "xla"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} must be None or one of {IMPLEMENTATIONS}")
    return implementation

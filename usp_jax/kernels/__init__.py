"""The chunk contract, and the choice of who implements it.

Every implementation is one file of this folder with the same two functions. G is the
number of query heads of a key/value head; all results have the accumulation dtype,
promote_types(q.dtype, float32):

    chunk_forward(q, k, v, mask, carry, logits) -> carry
    chunk_backward(q, k, v, dout, lse, delta, mask, logits) -> dq, dk, dv

`carry` is (out [B, T, N, V], lse [B, T, N]) of the keys seen so far, or None before the
first. The backward takes the *global* lse and delta = sum(out · dout, -1), so that the
parts of all chunks add up (FlashAttention-2, arXiv 2307.08691, Algorithm 2). A row that
has seen nothing has lse = -inf and out = 0, and its gradient is 0.
"""

import dataclasses
import importlib
from functools import partial
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from usp_jax.kernels import cudnn, reference, xla
from usp_jax.kernels.choice import (
    IMPLEMENTATIONS as IMPLEMENTATIONS,
    Target as Target,
    choose as choose,
    target_of as target_of,
)
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask

_PLAIN = {"cudnn": cudnn, "reference": reference, "xla": xla}

Carry = tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]


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
    ) -> tuple[
        Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K V"]
    ]: ...


@dataclasses.dataclass(frozen=True)
class Chunk:
    """An implementation of the contract."""

    forward: ChunkForward
    backward: ChunkBackward


def chunk(implementation: str, target: Target | None = None) -> Chunk:
    """The functions of a chosen implementation.

    Args:
      target: what block sizes are chosen for; None is the default device.
    """
    if implementation in _PLAIN:
        module = _PLAIN[implementation]
        return Chunk(module.chunk_forward, module.chunk_backward)
    name = implementation.removesuffix("_interpret")
    # Not all installations of jax have all of Pallas.
    module = importlib.import_module(f"usp_jax.kernels.{name}")
    options = {
        "target": target_of(None) if target is None else target,
        "interpret": name != implementation,
    }
    return Chunk(
        partial(module.chunk_forward, **options),
        partial(module.chunk_backward, **options),
    )

"""The chunk contract: the two functions that every implementation provides.

    chunk_forward(q, k, v, mask, carry, logits) -> carry
    chunk_backward(q, k, v, dout, lse, delta, mask, logits) -> dq, dk, dv

A kernel may also offer the two in a form that needs no copies around it (`Direct`).

All results are in the accumulation dtype, promote_types(q.dtype, float32). In the
implementations, G is the number of query heads per key/value head.

`carry` is (out [B, T, N, V], lse [B, T, N]) over the keys seen so far, or None before
the first chunk. A kernel need not mark it as varying over the axes of a
`jax.shard_map`. The backward takes the *global* lse and delta = sum(out · dout, -1), so
that the gradients of all chunks add up (FlashAttention-2, arXiv 2307.08691,
Algorithm 2). A row that has seen nothing has lse = -inf, out = 0 and a gradient of 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from usp_jax.kernels.choice import Target
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask

Carry = tuple[Float[Array, "B T N V"], Float[Array, "B T N"]]

# dq, dk and dv.
Grads = tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]

# dq, dk and dv; or dq, dk and dv side by side, and None.
DirectGrads = tuple[
    Float[Array, "B T N H"], Float[Array, "B S K D"], Float[Array, "B S K V"] | None
]
# Tables [B, ...] by a key of the kernel's own.
BlockTables = dict[Any, Int[Array, "B ..."]]

# dq in integers of `IntegerSums`, dk and dv.
IntegerGrads = tuple[
    Int[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K V"]
]


@runtime_checkable
class ChunkForward(Protocol):
    """Attention of q over one chunk of keys, merged into the carry."""

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
    """The contribution of one chunk of keys to dq, dk and dv."""

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


@runtime_checkable
class DirectForward(Protocol):
    """A `ChunkForward` without copies of k, v and out around it.

    With v=None, k holds keys and values of each head side by side, [B, S, K, H+V], and
    is read as it is. `dtype` is the dtype of out; None is the accumulation dtype.
    """

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K V"] | None,
        mask: Mask,
        carry: Carry | None,
        logits: Logits,
        *,
        dtype: DTypeLike | None = None,
    ) -> Carry: ...


@runtime_checkable
class DirectBackward(Protocol):
    """A `ChunkBackward` without copies of k, v and their gradients around it.

    With v=None, k is as in `DirectForward`, the second result is the gradient of k, and
    the third is None. `dtypes` are those of dq and of dk, dv.
    """

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K D"],
        v: Float[Array, "B S K V"] | None,
        dout: Float[Array, "B T N V"],
        lse: Float[Array, "B T N"],
        delta: Float[Array, "B T N"],
        mask: Mask,
        logits: Logits,
        *,
        dtypes: tuple[DTypeLike | None, DTypeLike | None] = (None, None),
    ) -> DirectGrads: ...


@dataclasses.dataclass(frozen=True)
class Direct:
    """The two functions of a kernel that leaves no copies to XLA."""

    forward: DirectForward
    backward: DirectBackward


@dataclasses.dataclass(frozen=True)
class IntegerSums:
    """The backward of a chunk whose dq can be added to that of others as integers.

    Such sums do not depend on their order. Every chunk of a sum needs the same maxima.

    Attributes:
      maxima: (k, v, segment_ids or None) -> float32 facts about these keys. Those of
        several chunks are combined by their maximum.
      backward: (the arguments of `ChunkBackward`, maxima) -> int32 dq, and dk, dv.
      finish: (int32 dq, q, dout, lse, delta, maxima, logits) -> dq of the contract.
    """

    maxima: Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
    backward: Callable[..., IntegerGrads]
    finish: Callable[..., jax.Array]


@runtime_checkable
class MakeTables(Protocol):
    """Makes `Mask.tables` from a mask: which blocks the kernels of a chunk visit."""

    def __call__(
        self, mask: Mask, head_size: int, value_size: int, dtype: DTypeLike
    ) -> BlockTables: ...


@dataclasses.dataclass(frozen=True)
class Chunk:
    """An implementation of the chunk contract.

    Attributes:
      direct: the same without copies around the kernel, if it can do that.
      sums: the backward with integer dq, if it has one.
      tables: makes the tables of a mask that may be made before the call, if any.
    """

    forward: ChunkForward
    backward: ChunkBackward
    direct: Direct | None = None
    sums: IntegerSums | None = None
    tables: MakeTables | None = None


@runtime_checkable
class PallasForward(Protocol):
    """A `ChunkForward` whose block sizes are chosen for a device.

    With `interpret`, it runs on any device in one of jax's interpreters.
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

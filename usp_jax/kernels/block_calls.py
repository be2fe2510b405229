"""The chunk contract with a package that attends in blocks and takes no mask as data.

The layout allows only a few cases for a chunk (`cases.py`), one of which is selected at
run time, and each block of a case is one plain call of the package on slices. With
segment ids it is a call for packed rows (`packed_calls.py`).

This is less exact than the other kernels. The packages return their results in the
inputs' 16 bits, so the contribution of each block to out, dq, dk, dv is rounded once
before it is merged or added in float32. Each rounding is relative to its contribution,
and the contributions get smaller as the ring gets longer, so the error is about √2
times that of one rounding for any ring size. lse is float32.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from usp_jax.kernels.bands import Block, Window, squares
from usp_jax.kernels.cases import Case, Cases, static_cases
from usp_jax.kernels.contract import Carry, Chunk, Grads
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.packed_calls import (
    PackedCalls,
    packed_backward,
    packed_forward,
)
from usp_jax.kernels.row_sums import out_for
from usp_jax.masking import Mask, MaskRule
from usp_jax.merge import merge
from usp_jax.varying import vary_like

Result = TypeVar("Result")

# The segment ids of queries and of keys.
Ids = tuple[jax.Array, jax.Array]

# Head sizes must be multiples of this.
_PIECE = 8


@runtime_checkable
class BlockForward(Protocol):
    """Attention of 16-bit arrays in a window. Every row sees a key.

    Returns:
      out [B, T, N, V] in 16 bits, and lse [B, N, T] in float32, natural logarithm.
    """

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        scale: float,
        window: Window,
    ) -> tuple[Float[Array, "B T N V"], Float[Array, "B N T"]]: ...


@runtime_checkable
class BlockBackward(Protocol):
    """dq, dk, dv in 16 bits, from an lse that may cover more keys.

    `out` is used only for sum(out · dout, -1).
    """

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K V"],
        lse: Float[Array, "B N T"],
        out: Float[Array, "B T N V"],
        dout: Float[Array, "B T N V"],
        scale: float,
        window: Window,
    ) -> Grads: ...


@dataclasses.dataclass(frozen=True)
class BlockCalls:
    """The two calls of a package.

    Attributes:
      name: the value of `implementation`.
      packed: its calls for packed rows, if it has them.
      only_squares: whether the band of a call must be one that `squares` yields.
      one_head_size: whether heads of keys and values must have one size.
      too_many: the number of elements from which an array is refused; None means no
        limit.
    """

    name: str
    forward: BlockForward
    backward: BlockBackward
    packed: PackedCalls | None = None
    only_squares: bool = False
    one_head_size: bool = True
    too_many: int | None = None

    def chunk(self) -> Chunk:
        """Returns the two functions of the chunk contract."""
        return Chunk(partial(chunk_forward, self), partial(chunk_backward, self))


def chunk_forward(
    calls: BlockCalls,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    carry: Carry | None,
    logits: Logits,
) -> Carry:
    """Computes the attention of q over k, v and merges it into `carry`.

    Raises:
      ValueError: the package does not support the mask, the logits or the size.
    """
    attend = partial(_attend, calls, logits.scale, v.shape[3])
    arrays = _padded(calls, q, k, v)
    for cases in _checked(calls, mask, logits):
        carry = _switch(cases, attend, *arrays, _ids(mask), carry)
    assert carry is not None, "a mask has at least one stretch of each side"
    return carry


def chunk_backward(
    calls: BlockCalls,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    dout: Float[Array, "B T N V"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    mask: Mask,
    logits: Logits,
) -> Grads:
    """Computes dq, dk, dv of one chunk from the global lse and delta.

    Raises:
      ValueError: the package does not support the mask, the logits or the size.
    """
    pull_back = partial(_pull_back, calls, logits.scale)
    out, dout = out_for(delta, dout.astype(q.dtype))
    arrays = _padded(calls, q, k, v, dout, out)
    parts = [
        _switch(cases, pull_back, *arrays, _ids(mask), lse)
        for cases in _checked(calls, mask, logits)
    ]
    dq, dk, dv = jax.tree.map(lambda *xs: sum(xs), *parts)
    head_size, value_size = q.shape[3], v.shape[3]
    return dq[..., :head_size], dk[..., :head_size], dv[..., :value_size]


def _checked(calls: BlockCalls, mask: Mask, logits: Logits) -> tuple[Cases, ...]:
    """Returns the cases of a mask; raises if the package does not support the call."""
    if logits.soft_cap is not None:
        reason = "logits_soft_cap="
    elif logits.slopes is not None or logits.dropout is not None:
        reason = "alibi_slopes= or dropout_rate="
    elif mask.q.segment_ids is not None and calls.packed is None:
        reason = (
            "segment_ids=, which also mark the padding of a length that "
            "ring·ulysses does not divide"
        )
    elif mask.q.segment_ids is not None and not _is_aligned(mask.rule):
        reason = "segment_ids= with a window that is not causal"
    elif (cases := static_cases(mask)) is not None:
        return cases
    else:
        reason = (
            "a mask whose positions are not those of one layout for queries and keys "
            "(from positions=, prefix_length= or a pair of layouts)"
        )
    raise ValueError(
        f"implementation={calls.name!r} cannot honour {reason}: it supports only full "
        "and causal blocks and windows; use implementation=None"
    )


def _is_aligned(rule: MaskRule) -> bool:
    """Whether documents of a block can have the block's bounds (`documents.py`)."""
    return rule.after == 0 or (rule.before is None and rule.after is None)


def _ids(mask: Mask) -> Ids | None:
    if mask.q.segment_ids is None:
        return None
    return mask.q.segment_ids, mask.kv.segment_ids


def _cut(
    calls: BlockCalls, block: Block, q: jax.Array, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns q, k and v of one call; raises if one of them is too large."""
    q, k, v = q[:, block.q], k[:, block.kv], v[:, block.kv]
    for name, x in (("query", q), ("key", k), ("value", v)):
        if calls.too_many is not None and math.prod(x.shape) >= calls.too_many:
            raise ValueError(
                f"implementation={calls.name!r} gives wrong gradients without an error "
                f"from 2**31 elements of an array on, and the {name} of one call on "
                f"one device is {list(x.shape)}, {math.prod(x.shape)} elements: use a "
                "smaller batch, more devices, or implementation=None"
            )
    return q, k, v


def _switch(
    cases: Cases, run: Callable[..., Result], *arrays: jax.Array | Ids | Carry | None
) -> Result:
    """Calls `run` on the case that applies."""
    arrays = vary_like(arrays, (arrays, cases.which))
    if len(cases.each) == 1:
        return run(cases.each[0], *arrays)
    branches = [partial(run, case) for case in cases.each]
    which = vary_like(cases.which, (arrays, cases.which))
    return lax.switch(which, branches, *arrays)


def _blocks(calls: BlockCalls, case: Case, ids: Ids | None) -> list[Block]:
    """Returns the blocks to call the package for."""
    if not calls.only_squares and ids is None:
        return list(case)
    return [square for block in case for square in squares(block)]


def _attend(
    calls: BlockCalls,
    scale: float,
    value_size: int,
    case: Case,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    ids: Ids | None,
    carry: Carry | None,
) -> Carry:
    """Merges the blocks of one case into `carry`."""
    for block in _blocks(calls, case, ids):
        arrays = _cut(calls, block, q, k, v)
        if calls.packed is None or ids is None:
            part = calls.forward(*arrays, scale, block.window)
        else:
            own = _ids_of(block, ids)
            part = packed_forward(calls.packed, block, own, *arrays, scale)
        # A package may not mark its results as varying.
        out, lse = vary_like(part, q)
        out, lse = out[..., :value_size], lse.swapaxes(1, 2)
        carry = _merged(carry, block.q, out.astype(lse.dtype), lse, q)
    return _nothing(q, value_size) if carry is None else carry


def _ids_of(block: Block, ids: Ids) -> Ids:
    return ids[0][:, block.q], ids[1][:, block.kv]


def _merged(
    carry: Carry | None, rows: slice, out: jax.Array, lse: jax.Array, q: jax.Array
) -> Carry:
    """Merges out and lse of some rows into `carry`."""
    if out.shape[1] == q.shape[1]:
        return (out, lse) if carry is None else merge(*carry, out, lse)
    out_before, lse_before = carry or _nothing(q, out.shape[3])
    out, lse = merge(out_before[:, rows], lse_before[:, rows], out, lse)
    return (
        lax.dynamic_update_slice_in_dim(out_before, out, rows.start, 1),
        lax.dynamic_update_slice_in_dim(lse_before, lse, rows.start, 1),
    )


def _nothing(q: jax.Array, value_size: int) -> Carry:
    """Returns the carry of rows that have seen nothing."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    out = jnp.zeros((*q.shape[:3], value_size), dtype)
    return vary_like((out, jnp.full(q.shape[:3], -jnp.inf, dtype)), q)


def _pull_back(
    calls: BlockCalls,
    scale: float,
    case: Case,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    out: jax.Array,
    ids: Ids | None,
    lse: jax.Array,
) -> Grads:
    """Computes dq, dk, dv of one case in float32."""
    dq, dk, dv = vary_like([jnp.zeros(x.shape, lse.dtype) for x in (q, k, v)], q)
    for block in _blocks(calls, case, ids):
        arrays = (
            *_cut(calls, block, q, k, v),
            lse[:, block.q].swapaxes(1, 2),
            out[:, block.q],
            dout[:, block.q],
        )
        if calls.packed is None or ids is None:
            parts = calls.backward(*arrays, scale, block.window)
        else:
            own = _ids_of(block, ids)
            parts = packed_backward(calls.packed, block, own, *arrays, scale)
        parts = vary_like(parts, q)
        dq = _added(dq, parts[0], block.q)
        dk = _added(dk, parts[1], block.kv)
        dv = _added(dv, parts[2], block.kv)
    return dq, dk, dv


def _added(total: jax.Array, part: jax.Array, rows: slice) -> jax.Array:
    """Adds `part` to some rows of `total` [B, T, N, H]."""
    start, stop, _ = rows.indices(total.shape[1])
    widths = ((0, 0), (start, total.shape[1] - stop), (0, 0), (0, 0))
    return total + jnp.pad(part.astype(total.dtype), widths)


def _padded(calls: BlockCalls, *arrays: jax.Array) -> list[jax.Array]:
    """Pads heads with zeros to a size that the package accepts."""
    most = max(x.shape[3] for x in arrays)

    def padded(x: jax.Array) -> jax.Array:
        size = most if calls.one_head_size else x.shape[3]
        size += -size % _PIECE
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, size - x.shape[3])))

    return [padded(x) for x in arrays]

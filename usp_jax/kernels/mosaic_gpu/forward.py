"""The forward of a chunk on Hopper.

While o += p v of one block runs, s = q kᵀ of the next is in flight. The two computing
warpgroups take turns, so that the products of one overlap with the exponentials of the
other (FlashAttention-3, Algorithm 2).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from usp_jax._compat import gpu_load, gpu_store
from usp_jax.kernels.choice import Target
from usp_jax.kernels.contract import Carry
from usp_jax.kernels.logits import LOG2E, Logits, raised
from usp_jax.kernels.mosaic_gpu.blocks import BlockSizes
from usp_jax.kernels.mosaic_gpu.launch import (
    keys_and_values,
    launch,
    padded,
    tokens_last,
)
from usp_jax.kernels.mosaic_gpu.roles import Cta, Kernel
from usp_jax.kernels.mosaic_gpu.spec import ChunkSpec
from usp_jax.kernels.mosaic_gpu.tiles import (
    MATRIX,
    ROW,
    ROWS,
    Operand,
    Ref,
    by_row,
    full,
    hidden_zero,
    slot_of,
    transposed,
)
from usp_jax.masking import Mask
from usp_jax.merge import finite

# o, the running maximum and sum, the decay of o, and p of the last block.
State = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def chunk_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    carry: Carry | None,
    logits: Logits,
    *,
    target: Target,
    blocks: BlockSizes | None = None,
    interpret: bool = False,
) -> Carry:
    """Computes the attention of q over k, v and merges it into `carry`.

    Args:
      target: the device, which with the head size determines the block sizes.
      blocks: block sizes to use instead.
      interpret: whether to run on any platform, in jax's interpreter of Mosaic GPU
        kernels.

    Raises:
      NotImplementedError: q is not bfloat16 or float16, or the head size is over 256.
    """
    return direct_forward(
        q,
        k,
        v,
        mask,
        carry,
        logits,
        target=target,
        blocks=blocks,
        interpret=interpret,
    )


def direct_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"] | None,
    mask: Mask,
    carry: Carry | None,
    logits: Logits,
    *,
    target: Target,
    dtype: DTypeLike | None = None,
    blocks: BlockSizes | None = None,
    interpret: bool = False,
) -> Carry:
    """Computes `chunk_forward` with out in `dtype`, and k, v as in `DirectForward`."""
    keys, values = keys_and_values(k, v, q.shape[-1])
    spec = ChunkSpec.of(q, keys, values, mask, logits, target, blocks, interpret)
    length = q.shape[1]
    size = k.shape[-1] - q.shape[-1] if v is None else v.shape[-1]
    operands: dict[str, Operand] = {"q": padded(q), "k": keys, "v": values}
    if carry is not None:
        operands["out"] = padded(carry[0])
        operands["lse"] = tokens_last(carry[1], -jnp.inf)
    batch, rows, heads, _ = operands["q"].shape
    shapes = (batch, rows, heads, values.shape[-1]), (batch, heads, rows)
    dtypes = dtype or jnp.float32, jnp.float32
    # A carry that is rounded needs other memory, and is the last.
    is_carry = dtypes[0] == jnp.float32
    into = ("out", "lse") if carry is not None and is_carry else ()
    kernel = Kernel("forward", _forward, ("q",), (("k",), ("v",)), spec.blocks.forward)
    out, lse = launch(spec, kernel, operands, shapes, dtypes, into, is_carry)
    return out[:, :length, :, :size], lse.swapaxes(1, 2)[:, :length]


def _forward(cta: Cta) -> None:
    """Computes out and lse of one tile of queries and one head, in one warpgroup."""
    spec, walk, warpgroup = cta.spec, cta.walk, cta.warpgroup
    k_s, v_s, turn = cta.scratch["k"], cta.scratch["v"], cta.scratch["turn"]
    stages = k_s.shape[0]
    shape = (ROWS, k_s.shape[1])
    out_ref, lse_ref = (cta.rows_of(ref) for ref in cta.outs)

    def carried() -> tuple[jax.Array, jax.Array]:
        if "out" not in cta.refs:
            zeros = full((ROWS, v_s.shape[-1]), 0.0, MATRIX)
            return zeros, full((ROWS,), -jnp.inf, ROW)
        out, lse = cta.rows_of(cta.refs["out"]), cta.rows_of(cta.refs["lse"])
        return gpu_load(out, MATRIX), gpu_load(lse, ROW)

    def softmax(
        s: jax.Array, m: jax.Array, l: jax.Array, seen: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        """Returns the running maximum and sum (base 2), the decay of o, and p."""
        s, scale = spec.base2(s)
        if seen is not None:
            s = jnp.where(seen, s, -jnp.inf)
        highest = raised(s.max(axis=1) * scale, 0.5, k_s.dtype)
        m_next = jnp.maximum(m, highest)
        # For a row that has seen nothing yet, exp2(-inf - 0) is 0 and not NaN.
        safe = m_next if seen is None else finite(m_next)
        p = jnp.exp2(s * scale - by_row(safe, shape))
        decay = jnp.exp2(m - safe)
        return m_next, l * decay + p.sum(axis=1), decay, p

    def first() -> State:
        def scores(s_ref: Ref) -> jax.Array:
            q = cta.scratch["q"].at[warpgroup]
            plgpu.wgmma(s_ref, q, transposed(k_s.at[0]))
            return plgpu.wgmma_accumulator_load(s_ref)

        out, lse = carried()
        cta.await_own()
        cta.await_full("k", 0)
        s = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
        cta.free("k", 0)
        # A carried row resumes with its lse as the maximum and a sum of 1.
        m, l = lse * LOG2E, jnp.where(lse == -jnp.inf, 0.0, 1.0)
        m, l, decay, p = softmax(s, m, l, cta.seen(0))
        return out, m, l, decay, p.astype(k_s.dtype)

    def step(n: jax.Array, state: State, masked: bool) -> State:
        """Computes the scores of block n while o += p v of the block before runs."""
        o, m, l, decay, p = state
        now, before = slot_of(n, stages), slot_of(n - 1, stages)
        mine = warpgroup + hidden_zero(n)
        q = cta.scratch["q"].at[mine]
        cta.await_full("k", now)
        cta.await_full("v", before)
        plgpu.barrier_wait(turn.at[mine])

        def body(accumulators: Sequence[Ref]) -> tuple[jax.Array, ...]:
            def scores(s_ref: Ref) -> jax.Array:
                plgpu.wgmma(s_ref, q, transposed(k_s.at[now]))
                cta.multiply(accumulators[0], p, v_s.at[before])
                plgpu.barrier_arrive(turn.at[1 - mine])
                return plgpu.wgmma_accumulator_load(s_ref, wait_n=1)

            s = pl.run_scoped(scores, plgpu.ACC(shape, jnp.float32))
            cta.free("k", now)
            return softmax(s, m, l, cta.seen(n) if masked else None)

        like = [m, l, decay, full(shape, 0.0, MATRIX)]
        (o,), (m, l, decay, p) = cta.in_flight(body, [o * by_row(decay, o.shape)], like)
        cta.free("v", before)
        # Round p only now: until here the product was reading the last one.
        return o, m, l, decay, p.astype(k_s.dtype)

    def attend() -> None:
        # Warpgroup 0 has the first turn.
        pl.when(warpgroup == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
        o, m, l, decay, p = walk.fold(step, first(), start=1)
        last = slot_of(walk.steps - 1, stages)
        cta.await_full("v", last)
        (o,), _ = cta.in_flight(
            lambda refs: cta.multiply(refs[0], p, v_s.at[last]),
            [o * by_row(decay, o.shape)],
        )
        inverse = jnp.where(l > 0.0, 1.0 / l, 0.0)
        out = o * by_row(inverse, o.shape)
        gpu_store(out_ref, out.astype(out_ref.dtype))
        gpu_store(lse_ref, (m + jnp.log2(jnp.where(l > 0.0, l, 1.0))) / LOG2E)

    def hand_through() -> None:
        out, lse = carried()
        gpu_store(out_ref, out.astype(out_ref.dtype))
        gpu_store(lse_ref, lse)

    pl.when(walk.listed > 0)(attend)
    # A carry that is written in place is there already.
    if cta.refs.get("out") is not cta.outs[0]:
        pl.when(walk.listed == 0)(hand_through)

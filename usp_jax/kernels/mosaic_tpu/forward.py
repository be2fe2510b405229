"""The forward of a chunk on a TPU: each run computes out and lse of a block of queries.

The list of visible blocks is sorted by block of queries. The accumulator is the result
itself, initialised from the carry and normalised at the end of each run of the list.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from usp_jax.kernels.choice import Target
from usp_jax.kernels.contract import Carry
from usp_jax.kernels.logits import LOG2E, Logits
from usp_jax.kernels.mosaic_tpu.blocks import LANES, BlockSizes
from usp_jax.kernels.mosaic_tpu.cut import Cut, Place, Specs
from usp_jax.kernels.mosaic_tpu.launch import Interpret, Kernel
from usp_jax.kernels.mosaic_tpu.tiles import (
    as_column,
    base2,
    dot,
    load_columns,
    multipliable,
    pieces,
    save_columns,
    sum_to_lanes,
    when_listed,
    widened,
)
from usp_jax.kernels.mosaic_tpu.walk import Lists, Ref, Walk
from usp_jax.masking import Mask, MaskRule, sees
from usp_jax.merge import finite


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
    interpret: Interpret = False,
) -> Carry:
    """Computes the attention of q over k, v and merges it into `carry`.

    Args:
      target: the device, which with the head size determines the block sizes.
      blocks: block sizes to use instead.
      interpret: whether, and how, to run in jax's interpreter of TPU kernels.

    Raises:
      ValueError: q is float64, or a shard has too many blocks.
    """
    q, k, v = multipliable(q, k, v)
    blocks = blocks or BlockSizes.of(target, max(q.shape[3], v.shape[3]), q.dtype)
    cut = Cut.of(q, k, mask, blocks.forward)
    kernel = forward_kernel(cut, q, k, v, carry, logits, blocks.vmem_mib, interpret)
    out, lse = kernel.run()
    return cut.from_q(out), cut.from_row(lse)


def forward_kernel(
    cut: Cut,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    carry: Carry | None,
    logits: Logits,
    vmem_mib: int,
    interpret: Interpret,
) -> Kernel:
    """Builds the kernel of a chunk with its operands."""
    walk = Walk.of(cut.kinds, cut.batch, visit_all=carry is None)
    num_heads, group = q.shape[2], q.shape[2] // k.shape[2]

    def place(b: jax.Array, n: jax.Array, t: jax.Array, *lists: Ref) -> Place:
        row, i, j = walk.blocks((lists[0], lists[1]), b, t)
        return Place(row, n, n // group, i, j)

    specs = Specs(cut, place)
    operands = (cut.tokens, cut.q(q), cut.kv(k), cut.kv(v))
    heads = (cut.batch, num_heads)
    results = (
        jax.ShapeDtypeStruct((*heads, cut.q_padded, v.shape[-1]), jnp.float32),
        jax.ShapeDtypeStruct((*heads, 1, cut.q_padded), jnp.float32),
    )
    result_specs = (specs.q(v.shape[-1]), specs.row())
    state = None
    if carry is not None:
        state = cut.q(carry[0]), cut.row(carry[1], -jnp.inf)
    elif walk.calls > 1:
        # No single call visits all blocks, so all must be initialised beforehand.
        out, lse = results
        state = jnp.full(out.shape, 0.0), jnp.full(lse.shape, -jnp.inf)
    return Kernel(
        partial(
            _forward_kernel,
            walk=walk,
            rule=cut.mask.rule,
            logits=logits,
            kv_compute=cut.kv_compute,
            may_mask=not cut.mask.sees_all,
        ),
        name="usp_flash_forward",
        walk=walk,
        grid=(num_heads,),
        operands=operands,
        operand_specs=(
            specs.tokens(),
            specs.q(q.shape[-1]),
            specs.kv(k.shape[-1]),
            specs.kv(v.shape[-1]),
        ),
        results=results,
        result_specs=result_specs,
        state=state,
        state_specs=result_specs,
        scratch=(
            pltpu.VMEM((cut.block_q, LANES), jnp.float32),
            pltpu.VMEM((cut.block_q, LANES), jnp.float32),
            pltpu.VMEM((2, cut.block_q, LANES), jnp.int32),
        ),
        vmem_mib=vmem_mib,
        cost=cut.cost(q, k, num_products=2),
        interpret=interpret,
    )


def _forward_kernel(
    lists: Lists,
    operands: tuple[Ref, ...],
    carry: tuple[Ref, Ref] | None,
    results: tuple[Ref, ...],
    scratch: tuple[Ref, ...],
    *,
    walk: Walk,
    rule: MaskRule,
    logits: Logits,
    kv_compute: int,
    may_mask: bool,
) -> None:
    (q_tokens, kv_tokens), q, k, v = operands
    (out, lse), (m, l, columns) = results, scratch
    step = walk.step(lists, pl.program_id(0), pl.program_id(2))

    @pl.when(step.first)
    def begin() -> None:
        save_columns(columns, q_tokens)
        if carry is None:
            m[...] = jnp.full_like(m, -jnp.inf)
            l[...] = jnp.zeros_like(l)
            out[...] = jnp.zeros_like(out)
        else:
            # A finished row resumes with its lse as the maximum and a sum over lanes
            # of 1.
            m[...] = as_column(carry[1][...]) * LOG2E
            l[...] = jnp.where(m[...] == -jnp.inf, 0.0, 1 / LANES)
            out[...] = carry[0][...]

    def attend(masked: bool) -> None:
        for keys in pieces(k.shape[0], kv_compute):
            s, _ = base2(logits, dot(q[...], k[keys], 1, 1))
            if masked:
                tokens_q = load_columns(columns, q_tokens, s.shape[1])
                tokens_kv = jax.tree.map(lambda x, keys=keys: x[:, keys], kv_tokens)
                s = jnp.where(sees(rule, tokens_q, tokens_kv), s, -jnp.inf)
            m_next = jnp.maximum(m[...], s.max(1, keepdims=True))
            safe = finite(m_next) if masked else m_next
            p = jnp.exp2(s - widened(safe, s.shape[1]))
            decay = jnp.exp2(m[...] - safe)
            l[...] = l[...] * decay + sum_to_lanes(p)
            pv = dot(p.astype(v.dtype), v[keys], 1, 0)
            out[...] = out[...] * widened(decay, pv.shape[1]) + pv
            m[...] = m_next

    when_listed(step, attend, may_mask=may_mask)

    @pl.when(step.last)
    def end() -> None:
        total = l[...].sum(1, keepdims=True)
        unseen = total == 0
        safe = jnp.where(unseen, 1.0, total)
        out[...] = out[...] / safe
        natural = jnp.where(unseen, -jnp.inf, m[...] / LOG2E + jnp.log(safe))
        lse[...] = natural.T[:1]

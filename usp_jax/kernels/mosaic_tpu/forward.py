"""The forward of a chunk on a TPU: each run computes out and lse of a block of queries.

The list of visible blocks is sorted by block of queries. The accumulator is the result
itself, initialised from the carry and normalised at the end of each run of the list.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from usp_jax._compat import tpu_reciprocal
from usp_jax.kernels.choice import Target
from usp_jax.kernels.contract import Carry
from usp_jax.kernels.logits import LOG2E, Logits
from usp_jax.kernels.mosaic_tpu.blocks import LANES, BlockSizes, Tile
from usp_jax.kernels.mosaic_tpu.cut import Cut, Place, Specs
from usp_jax.kernels.mosaic_tpu.launch import Interpret, Kernel
from usp_jax.kernels.mosaic_tpu.tiles import (
    as_column,
    as_row,
    base2,
    dot,
    in_turn,
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

# The least row maximum. Were it -inf in a row that has seen no key, exp2 would have to
# be kept from -inf - (-inf), with a compare and a select in each masked block. It is
# low enough for any logit, and high enough not to overflow when subtracted.
LOWEST = -(2.0**127)

# In place of a sum of weights of 0. The largest weight of a row is 1.
TINY = 2.0**-100


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
        step = walk.step((lists[0], lists[1]), b, t)
        row = walk.row((lists[0], lists[1]), b)
        return Place(row, n, lax.div(n, group), step.major, step.minor)

    specs = Specs(cut, place)
    operands = (cut.tokens, cut.q(q), cut.kv(k), cut.kv(v))
    heads = (cut.batch, num_heads)
    results = (
        jax.ShapeDtypeStruct((*heads, cut.q_padded, v.shape[-1]), jnp.float32),
        jax.ShapeDtypeStruct((*heads, 1, cut.q_padded), jnp.float32),
    )
    result_specs = (specs.q(v.shape[-1]), specs.rows())
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
            tile=cut.tile,
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
    tile: Tile,
    may_mask: bool,
) -> None:
    (q_tokens, kv_tokens), q, k, v = operands
    (out, lse), (m, l, columns) = results, scratch
    step = walk.step(lists, pl.program_id(0), pl.program_id(2))

    @pl.when(step.first)
    def begin() -> None:
        save_columns(columns, q_tokens)
        if carry is None:
            m[...] = jnp.full_like(m, LOWEST)
            l[...] = jnp.zeros_like(l)
            out[...] = jnp.zeros_like(out)
        else:
            # A finished row resumes with its lse as the maximum and a sum over lanes
            # of 1.
            before = as_column(carry[1][...]) * LOG2E
            m[...] = jnp.maximum(before, LOWEST)
            l[...] = jnp.where(before == -jnp.inf, 0.0, 1 / LANES)
            out[...] = carry[0][...]

    def attend(masked: bool) -> None:
        def scores(keys: slice) -> jax.Array:
            s, _ = base2(logits, dot(q[...], k[keys], 1, 1))
            if masked:
                tokens_q = load_columns(columns, q_tokens, s.shape[1])
                tokens_kv = jax.tree.map(lambda x: x[:, keys], kv_tokens)
                s = jnp.where(sees(rule, tokens_q, tokens_kv), s, -jnp.inf)
            return s

        parts = pieces(k.shape[0], tile.kv_compute)
        for keys, s in in_turn(parts, scores, ahead=tile.ahead):
            m_next = jnp.maximum(m[...], s.max(1, keepdims=True))
            p = jnp.exp2(s - widened(m_next, s.shape[1]))
            decay = jnp.exp2(m[...] - m_next)
            l[...] = l[...] * decay + sum_to_lanes(p)
            pv = dot(p.astype(v.dtype), v[keys], 1, 0)
            out[...] = out[...] * widened(decay, pv.shape[1]) + pv
            m[...] = m_next

    when_listed(step, attend, may_mask=may_mask)

    @pl.when(step.last)
    def end() -> None:
        # Division and logarithm of whole columns would take half of the run's cycles:
        # `out` is multiplied, and the logarithm is of rows, 128 times fewer registers.
        total = jnp.maximum(l[...].sum(1, keepdims=True), TINY)
        out[...] *= tpu_reciprocal(total)
        total, maximum = as_row(total), as_row(m[...])
        unseen = total == TINY
        lse[...] = jnp.where(unseen, -jnp.inf, maximum / LOG2E + jnp.log(total))

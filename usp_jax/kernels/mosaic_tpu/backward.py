"""The backward of a chunk on a TPU: dq, dk and dv in one walk.

Each block takes five matrix products (FlashAttention-2, Algorithm 2). The list of
visible blocks is sorted by block of keys. dk and dv accumulate in their result blocks
over a run of the list and over the query heads of the key head. A block of dq is read
from HBM, added to and written back at each visit.

dq is kept transposed, [B, N, H, T]. Scores have keys along sublanes, [block_kv,
block_q], so dq = dSᵀ·K would transpose dS, an array of block_kv × block_q; dqᵀ = Kᵀ·dS
transposes K, of block_kv × H. Heads of 128 also fill just half of a 256-wide matrix
unit as columns, but not as rows. Saves a tenth of the cycles on v6e and tpu7x.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int32

from usp_jax.kernels.choice import Target
from usp_jax.kernels.contract import Grads
from usp_jax.kernels.logits import LOG2E, Logits, raised
from usp_jax.kernels.mosaic_tpu.blocks import LANES, BlockSizes
from usp_jax.kernels.mosaic_tpu.cut import Cut, Place, Specs
from usp_jax.kernels.mosaic_tpu.in_place import InPlace
from usp_jax.kernels.mosaic_tpu.launch import Interpret, Kernel
from usp_jax.kernels.mosaic_tpu.tiles import (
    base2,
    dot,
    load_columns,
    multipliable,
    pieces,
    save_columns,
    when_listed,
)
from usp_jax.kernels.mosaic_tpu.walk import Lists, Ref, Walk
from usp_jax.masking import EMPTY, Mask, MaskRule, Tokens, sees
from usp_jax.merge import finite


def chunk_backward(
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
    blocks: BlockSizes | None = None,
    interpret: Interpret = False,
) -> Grads:
    """Computes dq, dk, dv of one chunk from the global lse and delta.

    See `chunk_forward` for the keyword arguments and the errors.
    """
    q, k, v, dout = multipliable(q, k, v, dout.astype(q.dtype))
    blocks = blocks or BlockSizes.of(target, max(q.shape[3], v.shape[3]), q.dtype)
    cut = Cut.of(q, k, mask, blocks.backward)
    arrays = q, k, v, dout, lse, delta
    shares = _shares(q, k, blocks.cores)
    kernel = backward_kernel(
        cut, *arrays, logits, blocks.vmem_mib, interpret, shares=shares
    )
    dq, *grads = kernel.run()
    dk, dv = (
        x.reshape(k.shape[0], k.shape[2], shares, *x.shape[2:]).sum(2) for x in grads
    )
    return cut.from_q(dq.swapaxes(2, 3)), cut.from_kv(dk), cut.from_kv(dv)


def _shares(q: jax.Array, k: jax.Array, cores: int) -> int:
    """Returns into how many parts to divide the query heads of each key head.

    The cores of a device divide the key heads of all batch rows among them. Where that
    does not come out even, as at batch 1 with one key head, each core takes a part of
    the query heads, and sums dk and dv over them.
    """
    heads, group = k.shape[0] * k.shape[2], q.shape[2] // k.shape[2]
    return cores if heads % cores and group % cores == 0 else 1


def _facts(
    q_tokens: Tokens, lse: Float[Array, "B N 1 T"], delta: Float[Array, "B N 1 T"]
) -> Int32[Array, "B N rows T"]:
    """Stacks the numbers of each query: lse, delta, and its position and id if needed.

    As one operand, because each takes a step of the grid 55 cycles on v5e, 6 on v6e.
    """
    numbers = [lax.bitcast_convert_type(x, jnp.int32) for x in (lse, delta)]
    tokens = jax.tree.leaves(q_tokens)
    return jnp.concatenate(
        numbers + [jnp.broadcast_to(x[:, None], lse.shape) for x in tokens], axis=2
    )


def backward_kernel(
    cut: Cut,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    logits: Logits,
    vmem_mib: int,
    interpret: Interpret,
    *,
    shares: int = 1,
) -> Kernel:
    """Builds the kernel of a chunk with its operands.

    Args:
      shares: into how many parts the query heads of each key head are divided; dk and
        dv have one head for each.
    """
    walk = Walk.of(cut.kinds.swapaxes(1, 2), cut.batch, visit_all=False)
    num_heads = k.shape[2] * shares
    group = q.shape[2] // num_heads
    # All scores of a row without a visible key are masked, so any finite lse will do.
    lse = raised(finite(lse) * LOG2E, 2.5, q.dtype)

    def place(
        b: jax.Array, h: jax.Array, t: jax.Array, g: jax.Array, *lists: Ref
    ) -> Place:
        step = walk.step((lists[0], lists[1]), b, t)
        row = walk.row((lists[0], lists[1]), b)
        return Place(row, h * group + g, lax.div(h, shares), step.minor, step.major)

    def place_of_share(b: jax.Array, h: jax.Array, *rest: Ref) -> Place:
        return dataclasses.replace(place(b, h, *rest), kv_head=h)

    specs, of_share = Specs(cut, place), Specs(cut, place_of_share)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    queries, keys, values = cut.q(q), cut.kv(k), cut.kv(v)
    q_tokens, kv_tokens = cut.tokens
    facts = _facts(q_tokens, cut.row(lse, 0.0), cut.row(delta, 0.0))
    batch, n, length, width = queries.shape
    shapes = (
        (batch, n, width, length),
        *((batch, num_heads, *x.shape[2:]) for x in (keys, values)),
    )
    results = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    return Kernel(
        partial(
            _backward_kernel,
            walk=walk,
            rule=cut.mask.rule,
            logits=logits,
            q_tree=jax.tree.structure(q_tokens),
            kv_compute=cut.tile.kv_compute,
            may_mask=not cut.mask.sees_all,
            group=group,
        ),
        name="usp_flash_backward",
        walk=walk,
        grid=(num_heads, group),
        operands=(
            *(kv_tokens, facts),
            *(queries, cut.q(dout), keys, values),
        ),
        operand_specs=(
            *(specs.tokens()[1], specs.rows(facts.shape[2])),
            *(specs.q(q.shape[-1]), specs.q(v.shape[-1])),
            *(specs.kv(k.shape[-1]), specs.kv(v.shape[-1])),
        ),
        results=results,
        result_specs=(in_hbm, of_share.kv(k.shape[-1]), of_share.kv(v.shape[-1])),
        # A block that no step visits is 0.
        state=tuple(jnp.zeros(x.shape, x.dtype) for x in results),
        state_specs=(in_hbm,) * 3,
        scratch=(
            pltpu.VMEM((2, cut.block_kv, LANES), jnp.int32),
            pltpu.VMEM((3, q.shape[-1], cut.block_q), jnp.float32),
            pltpu.SemaphoreType.DMA((3,)),
            pltpu.SemaphoreType.DMA((3,)),
        ),
        vmem_mib=vmem_mib,
        cost=cut.cost(q, k, num_products=5),
        interpret=interpret,
    )


def _backward_kernel(
    lists: Lists,
    operands: tuple[Ref, ...],
    zeros: tuple[Ref, ...],
    results: tuple[Ref, ...],
    scratch: tuple[Ref, ...],
    *,
    walk: Walk,
    rule: MaskRule,
    logits: Logits,
    q_tree: jax.tree_util.PyTreeDef,
    kv_compute: int,
    may_mask: bool,
    group: int,
) -> None:
    del zeros
    kv_tokens, facts, q, do, k, v = operands
    dq_hbm, dk, dv = results
    columns, dq_blocks, reads, writes = scratch
    b, h, t, g = (pl.program_id(axis) for axis in range(4))
    step = walk.step(lists, b, t)
    unscaled = dataclasses.replace(logits, scale=1.0)
    dq = InPlace(
        hbm=dq_hbm,
        blocks=dq_blocks,
        reads=reads,
        writes=writes,
        row=walk.row(lists, b),
        head=h * group,
        group=group,
        count=walk.count(lists, b),
        minor=lambda t: walk.step(lists, b, t).minor,
        t=t,
        g=g,
    )

    # An EMPTY entry is alone in its list, so no copy waits for one that never starts.
    visited = step.kind != EMPTY
    pl.when(visited)(dq.begin)

    @pl.when(step.first & (g == 0))
    def begin() -> None:
        save_columns(columns, kv_tokens)
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def attend(masked: bool) -> None:
        lse, delta = (
            lax.bitcast_convert_type(facts[i : i + 1], jnp.float32) for i in range(2)
        )
        total: jax.Array | None = None
        for keys in pieces(k.shape[0], kv_compute):
            s, natural = base2(logits, dot(k[keys], q[...], 1, 1))
            if masked:
                tokens_kv = load_columns(columns, kv_tokens, s.shape[1], keys)
                rows = [facts[i : i + 1] for i in range(2, facts.shape[0])]
                tokens_q: Tokens = jax.tree.unflatten(q_tree, rows)
                s = jnp.where(sees(rule, tokens_q, tokens_kv), s, -jnp.inf)
            p = jnp.exp2(s - lse)
            dp = dot(v[keys], do[...], 1, 1)
            # The scale is applied to the sums, which are smaller arrays.
            ds = unscaled.pull_back(p * (dp - delta), natural).astype(q.dtype)
            dv[keys] += dot(p.astype(do.dtype), do[...], 1, 0)
            dk[keys] += dot(ds, q[...], 1, 0)
            part = dot(k[keys], ds, 0, 0)
            total = part if total is None else total + part
        assert total is not None, "a block has at least one piece"
        dq.add(total * logits.scale)

    when_listed(step, attend, may_mask=may_mask)

    pl.when(visited)(dq.end)

    @pl.when(step.last & (g == group - 1))
    def end() -> None:
        dk[...] *= logits.scale

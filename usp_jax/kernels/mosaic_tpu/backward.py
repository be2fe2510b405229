"""The backward of a chunk on a TPU: dq, dk and dv in one walk.

Each block takes five matrix products (FlashAttention-2, Algorithm 2). The list of
visible blocks is sorted by block of keys. dk and dv accumulate in their result blocks
over a run of the list and over the query heads of the key head. A block of dq is read
from HBM, added to and written back at each visit.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

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
from usp_jax.masking import EMPTY, Mask, MaskRule, sees
from usp_jax.merge import finite

# Device kinds with two cores: v4 and v5p. XLA splits the parallel axes of a grid.
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")


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
    parts = _parts(q, k, target)
    k, v = (jnp.repeat(x, parts, axis=2) for x in (k, v))
    cut = Cut.of(q, k, mask, blocks.backward)
    arrays = q, k, v, dout, lse, delta
    kernel = backward_kernel(cut, *arrays, logits, blocks.vmem_mib, interpret)
    dq, dk, dv = kernel.run()
    dk, dv = (_sum_parts(cut.from_kv(x), parts) for x in (dk, dv))
    return cut.from_q(dq), dk, dv


def _parts(q: jax.Array, k: jax.Array, target: Target) -> int:
    """Returns the parts that the query heads of a key head are summed in, 1 or 2.

    A core takes whole key heads. With two cores and an odd number of key heads, one
    core would take more, or everything, so each key head is made into two.
    """
    group = q.shape[2] // k.shape[2]
    odd = k.shape[0] * k.shape[2] % 2 == 1
    return 2 if target.kind in TWO_CORES and odd and group % 2 == 0 else 1


def _sum_parts(x: Float[Array, "B S KP H"], parts: int) -> Float[Array, "B S K H"]:
    """Sums the parts of each key head, which are next to each other."""
    batch, length, heads, size = x.shape
    return x.reshape(batch, length, heads // parts, parts, size).sum(3)


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
) -> Kernel:
    """Builds the kernel of a chunk with its operands."""
    walk = Walk.of(cut.kinds.swapaxes(1, 2), cut.batch, visit_all=False)
    num_kv_heads, group = k.shape[2], q.shape[2] // k.shape[2]
    # All scores of a row without a visible key are masked, so any finite lse will do.
    lse = raised(finite(lse) * LOG2E, 2.5, q.dtype)

    def place(
        b: jax.Array, h: jax.Array, t: jax.Array, g: jax.Array, *lists: Ref
    ) -> Place:
        row, j, i = walk.blocks((lists[0], lists[1]), b, t)
        return Place(row, h * group + g, h, i, j)

    specs = Specs(cut, place)
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    queries, keys, values = cut.q(q), cut.kv(k), cut.kv(v)
    results = tuple(
        jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (queries, keys, values)
    )
    return Kernel(
        partial(
            _backward_kernel,
            walk=walk,
            rule=cut.mask.rule,
            logits=logits,
            kv_compute=cut.kv_compute,
            may_mask=not cut.mask.sees_all,
            group=group,
        ),
        name="usp_flash_backward",
        walk=walk,
        grid=(num_kv_heads, group),
        operands=(
            cut.tokens,
            *(queries, cut.q(dout), keys, values),
            *(cut.row(lse, 0.0), cut.row(delta, 0.0)),
        ),
        operand_specs=(
            specs.tokens(),
            *(specs.q(q.shape[-1]), specs.q(v.shape[-1])),
            *(specs.kv(k.shape[-1]), specs.kv(v.shape[-1])),
            *(specs.row(), specs.row()),
        ),
        results=results,
        result_specs=(in_hbm, specs.kv(k.shape[-1]), specs.kv(v.shape[-1])),
        # A block that no step visits is 0.
        state=tuple(jnp.zeros(x.shape, x.dtype) for x in results),
        state_specs=(in_hbm,) * 3,
        scratch=(
            pltpu.VMEM((2, cut.block_kv, LANES), jnp.int32),
            pltpu.VMEM((3, cut.block_q, q.shape[-1]), jnp.float32),
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
    kv_compute: int,
    may_mask: bool,
    group: int,
) -> None:
    del zeros
    (q_tokens, kv_tokens), q, do, k, v, lse, delta = operands
    dq_hbm, dk, dv = results
    columns, dq_blocks, reads, writes = scratch
    b, h, t, g = (pl.program_id(axis) for axis in range(4))
    step = walk.step(lists, b, t)
    row, _, _ = walk.blocks(lists, b, t)
    unscaled = dataclasses.replace(logits, scale=1.0)
    dq = InPlace(
        hbm=dq_hbm,
        blocks=dq_blocks,
        reads=reads,
        writes=writes,
        row=row,
        head=h * group,
        group=group,
        count=step.count,
        minor=lambda t: walk.entry(lists, b, t)[1],
        t=t,
        g=g,
    )

    # An EMPTY entry is alone in its list, so no copy waits for one that never starts.
    visited = step.listed & (step.kind != EMPTY)
    pl.when(visited)(dq.begin)

    @pl.when(step.first & (g == 0))
    def begin() -> None:
        save_columns(columns, kv_tokens)
        dk[...] = jnp.zeros_like(dk)
        dv[...] = jnp.zeros_like(dv)

    def attend(masked: bool) -> None:
        total: jax.Array | None = None
        for keys in pieces(k.shape[0], kv_compute):
            s, natural = base2(logits, dot(k[keys], q[...], 1, 1))
            p = jnp.exp2(s - lse[...])
            if masked:
                tokens_kv = load_columns(columns, kv_tokens, s.shape[1], keys)
                tokens_q = jax.tree.map(lambda x: x[...], q_tokens)
                p = jnp.where(sees(rule, tokens_q, tokens_kv), p, 0.0)
            dp = dot(v[keys], do[...], 1, 1)
            # The scale is applied to the sums, which are smaller arrays.
            ds = unscaled.pull_back(p * (dp - delta[...]), natural).astype(q.dtype)
            dv[keys] += dot(p.astype(do.dtype), do[...], 1, 0)
            dk[keys] += dot(ds, q[...], 1, 0)
            part = dot(ds, k[keys], 0, 0)
            total = part if total is None else total + part
        assert total is not None, "a block has at least one piece"
        dq.add(total * logits.scale)

    when_listed(step, attend, may_mask=may_mask)

    pl.when(visited)(dq.end)

    @pl.when(step.last & (g == group - 1))
    def end() -> None:
        dk[...] *= logits.scale

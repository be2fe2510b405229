"""The backward of a chunk on Hopper in one kernel: dq, dk and dv from five products.

Keys stay and queries stream, as for dk and dv in `backward.py`. The weights' gradient
ds of a block is used twice: from registers for dk, and, through shared memory, for the
block's part of dq. These parts are added in global memory by TMA, in an order that
changes from run to run, so they are added as integers (`fixed_point.py`):

    dk, dv   k, v stay   q, do stream   dv += pᵀ do, dk += dsᵀ q
    dq                                  dq += round(units · ds k), of all 128 keys

Each computing warpgroup has the ds of its 64 keys, and multiplies that of all 128 by
half of the columns of k.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree, Shaped

from usp_jax._compat import gpu_load, gpu_store
from usp_jax.kernels.choice import Target
from usp_jax.kernels.contract import BlockTables, Grads
from usp_jax.kernels.logits import LOG2E, Logits, raised
from usp_jax.kernels.mosaic_gpu.blocks import BlockSizes, Tile
from usp_jax.kernels.mosaic_gpu.fixed_point import (
    column_bounds,
    factors,
    key_maxima,
    row_bounds,
    to_fixed,
    to_float,
)
from usp_jax.kernels.mosaic_gpu.launch import launch, padded, tokens_last
from usp_jax.kernels.mosaic_gpu.roles import Cta, Kernel, swizzle
from usp_jax.kernels.mosaic_gpu.spec import ChunkSpec
from usp_jax.kernels.mosaic_gpu.tiles import (
    COLUMN,
    COMPUTING,
    MATRIX,
    ROW,
    ROWS,
    TILE,
    Ref,
    full,
    hidden_zero,
    slot_of,
    transposed,
)
from usp_jax.kernels.mosaic_gpu.walk import walk_tables
from usp_jax.masking import EMPTY, Mask, block_kinds, pad_tokens
from usp_jax.merge import finite
from usp_jax.varying import vary_like

State = list[jax.Array]
Operands = dict[str, jax.Array]
Results = tuple[jax.Array, jax.Array, jax.Array]

# Head sizes are padded to one of these.
WIDTHS = (64, 128)

# The block of queries that streams; the rows of a product are 64.
TILE_Q = Tile(ROWS)


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
    interpret: bool = False,
) -> Grads:
    """Computes dq, dk, dv of one chunk from the global lse and delta.

    The units of dq are those of this chunk's keys; see `integer_backward`, and
    `chunk_forward` for the keyword arguments and the errors.
    """
    maxima = key_maxima(k, v, mask.kv.segment_ids)
    total, dk, dv = integer_backward(
        q,
        k,
        v,
        dout,
        lse,
        delta,
        mask,
        logits,
        maxima,
        target=target,
        interpret=interpret,
    )
    return finish(total, q, dout, lse, delta, maxima, logits), dk, dv


def block_tables(
    mask: Mask, head_size: int, value_size: int, dtype: DTypeLike, *, target: Target
) -> BlockTables:
    """Makes the tables of a mask for the forward and this kernel."""
    size = max(head_size, value_size)
    forward = BlockSizes.of(target, size, dtype, value_size).forward
    return walk_tables(mask, ((forward.tokens, False), (TILE_Q.tokens, True)))


def finish(
    total: Int[Array, "B T N H"],
    q: Float[Array, "B T N H"],
    dout: Float[Array, "B T N V"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    maxima: Float[Array, "B K M"],
    logits: Logits,
) -> Float[Array, "B T N H"]:
    """Converts a sum of the integers of `integer_backward` to dq, in float32.

    Args:
      maxima: the same as there; the other arguments are those of the contract.
    """
    rows = row_bounds(q, dout.astype(q.dtype), lse, delta, maxima, logits)
    late = logits.scale if logits.soft_cap is None else 1.0
    return to_float(total, rows, column_bounds(maxima)) * late


def integer_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    dout: Float[Array, "B T N V"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    mask: Mask,
    logits: Logits,
    maxima: Float[Array, "B K M"] | None,
    *,
    target: Target,
    interpret: bool = False,
) -> tuple[Shaped[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K V"]]:
    """Computes dq in integers, and dk, dv, of one chunk.

    Args:
      maxima: the result of `key_maxima` over the keys of all chunks whose integers are
        added up. None adds up floats, whose bits change from run to run, to measure
        what the integers cost.
      target, interpret: as in `chunk_forward`.

    Returns:
      int32 dq, which `finish` converts, and float32 dk, dv. Without maxima, dq is
        float32, before the scale.

    Raises:
      NotImplementedError: q is not bfloat16 or float16, or the head size is over 128.
    """
    spec = ChunkSpec.of(q, k, v, _listed(mask), logits, target, None, interpret)
    size = max(q.shape[-1], v.shape[-1])
    width = next((x for x in WIDTHS if size <= x), None)
    if width is None:
        raise NotImplementedError(
            f"mosaic_gpu_fused supports head sizes up to {max(WIDTHS)}, not {size}; "
            "use implementation='mosaic_gpu'"
        )
    dout = dout.astype(q.dtype)
    operands = {"q": q, "k": k, "v": v, "do": dout}
    operands = {name: padded(x, width) for name, x in operands.items()}
    operands["lse"] = tokens_last(raised(finite(lse) * LOG2E, 2.5, q.dtype), 0.0)
    operands["delta"] = tokens_last(delta, 0.0)
    if maxima is not None:
        rows = factors(row_bounds(q, dout, lse, delta, maxima, logits))
        columns = factors(column_bounds(maxima))
        widths = (0, 0), (0, 0), (0, width - columns.shape[2])
        operands["rows"] = tokens_last(rows, 1.0)
        operands["columns"] = jnp.pad(columns, widths, constant_values=1.0)
    dq, dk, dv = _mappable(spec)(operands, spec.mask)
    return (
        dq[:, : q.shape[1], :, : q.shape[3]],
        dk[:, : k.shape[1], :, : k.shape[3]],
        dv[:, : v.shape[1], :, : v.shape[3]],
    )


def _listed(mask: Mask) -> Mask:
    """Adds segment ids to a mask that sees all, so that the blocks are listed.

    The compiler then does not know the number of steps, and keeps fewer addresses in
    registers for all of them.
    """
    if not mask.sees_all:
        return mask
    q, kv = (pad_tokens(tokens, 0, with_ids=True) for tokens in (mask.q, mask.kv))
    return Mask(mask.rule, q, kv)


def _mappable(spec: ChunkSpec) -> Callable[[Operands, Mask], Results]:
    """Returns `_run` for `jax.vmap`, which cannot map a kernel that adds to an array.

    The mapped axis becomes a part of the batch.
    """

    @jax.custom_batching.custom_vmap
    def run(operands: Operands, mask: Mask) -> Results:
        return _run(dataclasses.replace(spec, mask=mask), operands)

    @run.def_vmap
    def mapped(
        size: int, is_mapped: Sequence[PyTree], operands: Operands, mask: Mask
    ) -> tuple[Results, tuple[bool, bool, bool]]:
        q = operands["q"]
        batch = q.shape[1] if is_mapped[0]["q"] else q.shape[0]

        def fold(x: jax.Array, is_mapped: bool) -> jax.Array:
            x = x if is_mapped else x[None]
            x = jnp.broadcast_to(x, (size, batch, *x.shape[2:]))
            return x.reshape(-1, *x.shape[2:])

        folded = jax.tree.map(fold, (operands, mask), tuple(is_mapped))
        dq, dk, dv = (x.reshape(size, batch, *x.shape[1:]) for x in run(*folded))
        return (dq, dk, dv), (True, True, True)

    return run


def _run(spec: ChunkSpec, operands: Operands) -> Results:
    """Launches the kernel: integer dq, dk, dv, padded like q, k, v."""
    dtype, part = operands["q"].dtype, operands["q"].shape[-1] // COMPUTING
    units = tuple({"rows"} & operands.keys())
    sums = jnp.int32 if units else jnp.float32
    further = {
        # Two buffers: a warpgroup may be one block ahead of the other.
        "ds": plgpu.SMEM(
            (2, COMPUTING, ROWS, TILE_Q.tokens), dtype, transforms=swizzle(part, 2)
        ),
        "ds_full": plgpu.Barrier(num_arrivals=COMPUTING, num_barriers=2),
        "part": plgpu.SMEM(
            (COMPUTING, TILE_Q.tokens, part), sums, transforms=swizzle(32, 4)
        ),
    }
    streams = ("q", "lse", *units), ("do", "delta")
    kernel = Kernel("fused", _fused, ("k", "v"), streams, TILE_Q, further, part)
    shapes = [operands[name].shape for name in "kv"]
    shape = operands["q"].shape
    if spec.interpret:
        tiles = operands["k"].shape[1] // TILE
        shapes.append((tiles, *shape))
        dtypes = [jnp.float32, jnp.float32, sums]
        dk, dv, parts = launch(spec, kernel, operands, shapes, dtypes)
        return _sum_of_visited(spec.mask, parts), dk, dv
    dq = jax.new_ref(jnp.zeros(shape, sums))
    dk, dv = launch(spec, kernel, operands, shapes, sums={"dq": dq})
    # Only now: jax refuses references to what varies.
    return vary_like(jax.freeze(dq), list(operands.values())), dk, dv


def _sum_of_visited(
    mask: Mask, parts: Shaped[Array, "tiles B T N H"]
) -> Shaped[Array, "B T N H"]:
    """Adds each tile's dq, of which only the blocks that it visits are set."""
    step = TILE_Q.tokens
    visited = jnp.repeat(block_kinds(mask, step, TILE) != EMPTY, step, axis=1)
    visited = jnp.moveaxis(visited, 2, 0)[..., None, None]
    return jnp.sum(jnp.where(visited, parts, 0), 0)


def _fused(cta: Cta) -> None:
    """Computes dk and dv of one tile of keys, and adds its part of dq."""
    spec, walk, scratch, mine = cta.spec, cta.walk, cta.scratch, cta.warpgroup
    stages, size, width = scratch["q"].shape
    shape = (ROWS, size)
    part = ROWS, width // COMPUTING
    columns = pl.ds(mine * part[1], part[1])
    pl.when(walk.listed > 0)(cta.await_own)

    def step(n: jax.Array, state: State, masked: bool) -> State:
        slot, buffer = slot_of(n, stages), slot_of(n, 2)
        q, do = scratch["q"].at[slot], scratch["do"].at[slot]
        zero = hidden_zero(n)
        k, v = (scratch[name].at[mine + zero] for name in ("k", "v"))
        cta.await_full("q", slot)
        cta.await_full("do", slot)

        def by_column(name: str) -> jax.Array:
            x = gpu_load(scratch[name].at[slot], COLUMN)
            return lax.broadcast_in_dim(x, shape, (1,))

        def products(into: Sequence[Ref], s_ref: Ref, dp_ref: Ref) -> None:
            plgpu.wgmma(s_ref, k, transposed(q))
            plgpu.wgmma(dp_ref, v, transposed(do))
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
            p = spec.weights(s, by_column("lse"), cta.seen(n) if masked else None)
            slope = spec.pull_back(p, s)
            cta.multiply(into[1], p.astype(q.dtype), do)
            # The product into dv may still be in flight.
            dp = plgpu.wgmma_accumulator_load(dp_ref, wait_n=1)
            ds = (slope * (dp - by_column("delta"))).astype(q.dtype)
            cta.multiply(into[0], ds, q)
            scratch["ds"].at[buffer, mine][...] = ds

        def part_of_dq(ref: Ref) -> jax.Array:
            for i in range(COMPUTING):
                ds = scratch["ds"].at[buffer, i]
                plgpu.wgmma(ref, transposed(ds), scratch["k"].at[i + zero, :, columns])
            return plgpu.wgmma_accumulator_load(ref)

        def body(into: Sequence[Ref]) -> None:
            accumulator = plgpu.ACC(shape, jnp.float32)
            pl.run_scoped(partial(products, into), accumulator, accumulator)
            plgpu.commit_smem()
            plgpu.barrier_arrive(scratch["ds_full"].at[buffer])
            plgpu.barrier_wait(scratch["ds_full"].at[buffer])
            dq = pl.run_scoped(part_of_dq, plgpu.ACC(part, jnp.float32))
            _add(cta, n, dq, columns)

        state, _ = cta.in_flight(body, state)
        cta.free("q", slot)
        cta.free("do", slot)
        return state

    zeros = [full((ROWS, width), 0.0, MATRIX) for _ in "kv"]
    dk, dv = walk.fold(step, zeros, 0)
    gpu_store(cta.rows_of(cta.outs[0]), dk * spec.late_scale)
    gpu_store(cta.rows_of(cta.outs[1]), dv)
    plgpu.wait_smem_to_gmem(0)


def _add(cta: Cta, n: jax.Array, dq: jax.Array, columns: pl.Slice) -> None:
    """Adds some columns of a block of dq, in integers, in global memory."""
    spec, walk, scratch, refs = cta.spec, cta.walk, cta.scratch, cta.refs
    if "rows" in refs:
        by_row = gpu_load(scratch["rows"].at[slot_of(n, scratch["q"].shape[0])], ROW)
        by_column = gpu_load(refs["columns"].at[cta.batch, cta.head, columns], COLUMN)
        for units, dim in ((by_row, 0), (by_column, 1)):
            dq *= lax.broadcast_in_dim(units, dq.shape, (dim,))
    buffer = scratch["part"].at[cta.warpgroup]
    # The copy of the block before may still be reading.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    buffer[...] = to_fixed(dq) if "rows" in refs else dq
    plgpu.commit_smem()
    rows = pl.ds(walk.column(n) * dq.shape[0], dq.shape[0])
    head = cta.head * walk.repeats + lax.rem(n, jnp.int32(walk.repeats))
    block = cta.batch, rows, head, columns
    if spec.interpret:
        # The interpreter does not add, so every tile of keys has its own dq.
        plgpu.copy_smem_to_gmem(buffer, cta.outs[2].at[walk.tile, *block])
    else:
        plgpu.copy_smem_to_gmem(buffer, refs["dq"].at[*block], reduction_op="add")

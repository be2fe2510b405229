"""The backward of a chunk on Hopper: one kernel for dq, one or two for dk and dv."""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from usp_jax._compat import gpu_load, gpu_store
from usp_jax.kernels.choice import Target
from usp_jax.kernels.contract import DirectGrads, Grads
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
    COLUMN,
    MATRIX,
    ROW,
    ROWS,
    Columns,
    Operand,
    Ref,
    by_row,
    columns_of,
    full,
    hidden_zero,
    slot_of,
    transposed,
)
from usp_jax.masking import Mask
from usp_jax.merge import finite

# The sums that a warpgroup keeps in registers.
State = list[jax.Array]


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
    interpret: bool = False,
) -> Grads:
    """Computes dq, dk, dv of one chunk from the global lse and delta.

    See `chunk_forward` for the keyword arguments and the errors.
    """
    dq, dk, dv = direct_backward(
        q,
        k,
        v,
        dout,
        lse,
        delta,
        mask,
        logits,
        target=target,
        blocks=blocks,
        interpret=interpret,
    )
    assert dv is not None
    return dq, dk, dv


def direct_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K V"] | None,
    dout: Float[Array, "B T N V"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    mask: Mask,
    logits: Logits,
    *,
    target: Target,
    dtypes: tuple[DTypeLike | None, DTypeLike | None] = (None, None),
    blocks: BlockSizes | None = None,
    interpret: bool = False,
) -> DirectGrads:
    """Computes `chunk_backward` with results in `dtypes`, as in `DirectBackward`."""
    keys, values = keys_and_values(k, v, q.shape[-1])
    spec = ChunkSpec.of(q, keys, values, mask, logits, target, blocks, interpret)
    dq_dtype, dkv_dtype = (dtype or jnp.float32 for dtype in dtypes)
    operands: dict[str, Operand] = {"q": padded(q), "k": keys, "v": values}
    operands["do"] = padded(dout.astype(q.dtype))
    operands["lse"] = tokens_last(raised(finite(lse) * LOG2E, 2.5, q.dtype), 0.0)
    operands["delta"] = tokens_last(delta, 0.0)
    streams = ("k",), ("v",)
    kernel = Kernel("dq", _dq, ("q", "do"), streams, spec.blocks.dq)
    (dq,) = launch(spec, kernel, operands, [operands["q"].shape], [dq_dtype])
    dq = dq[:, : q.shape[1], :, : q.shape[3]]
    dkv = _dk_and_dv(spec, operands, dkv_dtype)
    if len(dkv) == 1:
        return dq, dkv[0], None
    size = k.shape[3] - q.shape[3] if v is None else v.shape[3]
    dk, dv = dkv[0][:, : k.shape[1], :, : q.shape[3]], dkv[1][:, : k.shape[1], :, :size]
    return (dq, jnp.concatenate([dk, dv], -1), None) if v is None else (dq, dk, dv)


def _dk_and_dv(
    spec: ChunkSpec, operands: Mapping[str, Operand], dtype: DTypeLike
) -> list[jax.Array]:
    """Computes dk and dv, padded like k and v, in one pass or two.

    One pass over keys and values side by side returns one array of that kind.
    """

    def run(*names: str, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
        body, tile = partial(_dkv, names), spec.blocks.dkv
        own: tuple[str, ...] = ("k", "v")
        streams: tuple[tuple[str, ...], ...] = ("q", "lse"), ("do", "delta")
        if names == ("dv",):
            # It needs no product of do and v.
            own, streams = ("k",), (("q", "lse"), ("do",))
            tile = spec.blocks.dv or tile
        name = "dkv" if len(names) > 1 else names[0]
        kernel = Kernel(name, body, own, streams, tile)
        return launch(spec, kernel, operands, shapes, [dtype] * len(shapes))

    keys, values = operands["k"], operands["v"]
    if spec.blocks.split_dkv:
        dk, dv = run("dk", shapes=[keys.shape]), run("dv", shapes=[values.shape])
        return [*dk, *dv]
    if isinstance(keys, Columns):
        return run("dk", "dv", shapes=[keys.array.shape])
    return run("dk", "dv", shapes=[keys.shape, values.shape])


def _dq(cta: Cta) -> None:
    """Computes dq of one tile of queries and one head, in one warpgroup."""
    spec, walk = cta.spec, cta.walk
    k_s, v_s = cta.scratch["k"], cta.scratch["v"]
    shape = (ROWS, k_s.shape[1])
    accumulator = plgpu.ACC(shape, jnp.float32)
    lse, delta = (
        by_row(gpu_load(cta.rows_of(cta.refs[name]), ROW), shape)
        for name in ("lse", "delta")
    )
    pl.when(walk.listed > 0)(cta.await_own)

    def step(n: jax.Array, state: State, masked: bool) -> State:
        k_slot, v_slot = (slot_of(n, ref.shape[0]) for ref in (k_s, v_s))
        k, v = k_s.at[k_slot], v_s.at[v_slot]
        mine = cta.warpgroup + hidden_zero(n)
        q, do = (cta.scratch[name].at[mine] for name in ("q", "do"))
        cta.await_full("k", k_slot)
        cta.await_full("v", v_slot)
        # Registers do not hold both products while segment ids are compared.
        late = masked and spec.mask.q.segment_ids is not None

        def scores(s_ref: Ref, *dp_ref: Ref) -> tuple[jax.Array, ...]:
            plgpu.wgmma(s_ref, q, transposed(k))
            for ref in dp_ref:
                plgpu.wgmma(ref, do, transposed(v))
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=len(dp_ref))
            p = spec.weights(s, lse, cta.seen(n) if masked else None)
            return s, p, *map(plgpu.wgmma_accumulator_load, dp_ref)

        def late_product(dp_ref: Ref) -> jax.Array:
            plgpu.wgmma(dp_ref, do, transposed(v))
            return plgpu.wgmma_accumulator_load(dp_ref)

        def body(accumulators: Sequence[Ref]) -> None:
            s, p, *dp = pl.run_scoped(scores, *[accumulator] * (1 if late else 2))
            (dp,) = [pl.run_scoped(late_product, accumulator)] if late else dp
            cta.free("v", v_slot)
            ds = spec.pull_back(p * (dp - delta), s).astype(k_s.dtype)
            cta.multiply(accumulators[0], ds, k)

        state, _ = cta.in_flight(body, state)
        cta.free("k", k_slot)
        return state

    (dq,) = walk.fold(step, [full((ROWS, k_s.shape[-1]), 0.0, MATRIX)], 0)
    dq = dq * spec.late_scale
    gpu_store(cta.rows_of(cta.outs[0]), dq.astype(cta.outs[0].dtype))


def _dkv(names: tuple[str, ...], cta: Cta) -> None:
    """Computes dk, dv or both of one tile of keys and one key head, in one warpgroup.

    Scores are transposed: [keys, queries].
    """
    spec, walk, scratch = cta.spec, cta.walk, cta.scratch
    stages, second = (scratch[name].shape[0] for name in ("q", "do"))
    shape = (ROWS, scratch["q"].shape[1])
    accumulator = plgpu.ACC(shape, jnp.float32)
    pl.when(walk.listed > 0)(cta.await_own)

    def step(n: jax.Array, state: State, masked: bool) -> State:
        slot, do_slot = slot_of(n, stages), slot_of(n, second)
        q, do = scratch["q"].at[slot], scratch["do"].at[do_slot]
        mine = cta.warpgroup + hidden_zero(n)
        cta.await_full("q", slot)
        cta.await_full("do", do_slot)

        def by_column(name: str, slot: jax.Array) -> jax.Array:
            x = gpu_load(scratch[name].at[slot], COLUMN)
            return lax.broadcast_in_dim(x, shape, (1,))

        def body(accumulators: Sequence[Ref]) -> None:
            into = dict(zip(names, accumulators, strict=True))

            def products(s_ref: Ref, *dp_ref: Ref) -> None:
                def multiply_v() -> None:
                    for ref in dp_ref:
                        plgpu.wgmma(ref, scratch["v"].at[mine], transposed(do))

                plgpu.wgmma(s_ref, scratch["k"].at[mine], transposed(q))
                # Registers do not hold both products while a mask is computed.
                if not masked:
                    multiply_v()
                flying = 0 if masked else len(dp_ref)
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=flying)
                seen = cta.seen(n) if masked else None
                p = spec.weights(s, by_column("lse", slot), seen)
                if "dv" in names:
                    cta.multiply(into["dv"], p.astype(q.dtype), do)
                if masked:
                    multiply_v()
                for ref in dp_ref:
                    # The product into dv may still be in flight, if it started last.
                    flying = 0 if masked else len(names) - 1
                    dp = plgpu.wgmma_accumulator_load(ref, wait_n=flying)
                    ds = spec.pull_back(p * (dp - by_column("delta", do_slot)), s)
                    cta.multiply(into["dk"], ds.astype(q.dtype), q)
                    if names == ("dk",):
                        cta.free("do", do_slot)

            num_products = 2 if "dk" in names else 1
            pl.run_scoped(products, *[accumulator] * num_products)

        state, _ = cta.in_flight(body, state)
        cta.free("q", slot)
        if names != ("dk",):
            cta.free("do", do_slot)
        return state

    sizes = {"dk": scratch["k"].shape[-1], "dv": scratch["do"].shape[-1]}
    scales = {"dk": spec.late_scale, "dv": 1.0}
    zeros = [full((ROWS, sizes[name]), 0.0, MATRIX) for name in names]
    state = walk.fold(step, zeros, 0)
    outs = list(cta.outs)
    if len(outs) < len(names):
        size = sizes["dk"]
        outs = [columns_of(outs[0], *part) for part in ((0, size), (size, sizes["dv"]))]
    for name, ref, x in zip(names, outs, state, strict=True):
        gpu_store(cta.rows_of(ref), (x * scales[name]).astype(ref.dtype))

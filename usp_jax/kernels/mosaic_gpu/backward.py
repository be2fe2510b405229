"""The backward of a chunk on Hopper: a kernel of dq, and one or two of dk and dv."""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from usp_jax._compat import gpu_load, gpu_store
from usp_jax.kernels.choice import Target
from usp_jax.kernels.contract import Grads
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.mosaic_gpu.blocks import BlockSizes
from usp_jax.kernels.mosaic_gpu.call import Call, padded, tokens_last
from usp_jax.kernels.mosaic_gpu.roles import Kernel
from usp_jax.kernels.mosaic_gpu.tiles import (
    COLUMN,
    LOG2E,
    MATRIX,
    ROW,
    ROWS,
    by_row,
    full,
    slot_of,
    transposed,
)
from usp_jax.masking import Mask
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
    interpret: bool = False,
) -> Grads:
    """dq, dk, dv of one chunk from the global lse and delta.

    Args and raises: those of `chunk_forward`.
    """
    call = Call.of(q, k, v, mask, logits, target, blocks, interpret)
    operands = {"q": q, "k": k, "v": v, "do": dout.astype(q.dtype)}
    operands = {name: padded(x) for name, x in operands.items()}
    shapes = {f"d{name}": operands[name].shape for name in "qkv"}
    operands["lse"] = tokens_last(finite(lse) * LOG2E, 0)
    operands["delta"] = tokens_last(delta, 0)
    streams: tuple[Any, ...] = ("k",), ("v",)
    kernels: dict[Any, Kernel] = {
        ("dq",): Kernel(_dq, ("q", "do"), streams, call.blocks.dq)
    }
    streams = ("q", "lse"), ("do", "delta")
    for names in [("dk",), ("dv",)] if call.blocks.split_dkv else [("dk", "dv")]:
        body = partial(_dkv, names)
        kernels[names] = Kernel(body, ("k", "v"), streams, call.blocks.dkv)
    grads: dict[str, Any] = {}
    for names, kernel in kernels.items():
        made = call.launch(kernel, operands, [shapes[name] for name in names])
        grads |= zip(names, made, strict=True)
    return tuple(
        grads[name][:, : x.shape[1], :, : x.shape[3]]
        for name, x in (("dq", q), ("dk", k), ("dv", v))
    )


def _dq(block: Any) -> None:
    """One tile of queries and one head of dq, by one warpgroup."""
    call, walk = block.call, block.walk
    k_s, v_s = block.scratch["k"], block.scratch["v"]
    q, do = (block.scratch[name].at[block.warpgroup] for name in ("q", "do"))
    shape = (ROWS, k_s.shape[1])
    lse, delta = (
        by_row(gpu_load(block.rows_of(block.refs[name]), ROW), shape)
        for name in ("lse", "delta")
    )
    pl.when(walk.listed > 0)(block.await_own)

    def step(n: Any, state: Any, masked: bool) -> Any:
        slot = slot_of(n, k_s.shape[0])
        block.await_full("k", slot)
        block.await_full("v", slot)

        def products(s_ref: Any, dp_ref: Any) -> Any:
            plgpu.wgmma(s_ref, q, transposed(k_s.at[slot]))
            plgpu.wgmma(dp_ref, do, transposed(v_s.at[slot]))
            s = plgpu.wgmma_accumulator_load(s_ref, wait_n=1)
            p = call.weights(s, lse, block.seen(n) if masked else None)
            dp = plgpu.wgmma_accumulator_load(dp_ref)
            return call.pull_back(p * (dp - delta), s)

        def body(accumulators: Any) -> None:
            ds = pl.run_scoped(products, *[plgpu.ACC(shape, jnp.float32)] * 2)
            block.free("v", slot)
            block.multiply(accumulators[0], ds.astype(k_s.dtype), k_s.at[slot])

        state, _ = call.in_flight(body, state)
        block.free("k", slot)
        return state

    (dq,) = walk.fold(step, [full((ROWS, k_s.shape[-1]), 0, MATRIX)])
    gpu_store(block.rows_of(block.outs[0]), dq * call.late_scale)


def _dkv(names: Any, block: Any) -> None:
    """One tile of keys and one key head of dk, dv or both, by one warpgroup.

    Scores are transposed, [keys, queries].
    """
    call, walk, scratch = block.call, block.walk, block.scratch
    k, v = (scratch[name].at[block.warpgroup] for name in ("k", "v"))
    stages, size = scratch["q"].shape[:2]
    shape = (ROWS, size)
    pl.when(walk.listed > 0)(block.await_own)

    def step(n: Any, state: Any, masked: bool) -> Any:
        slot = slot_of(n, stages)
        q, do = scratch["q"].at[slot], scratch["do"].at[slot]
        block.await_full("q", slot)
        block.await_full("do", slot)

        def by_column(name: str) -> Any:
            x = gpu_load(scratch[name].at[slot], COLUMN)
            return lax.broadcast_in_dim(x, shape, (1,))

        def body(accumulators: Any) -> None:
            into = dict(zip(names, accumulators, strict=True))

            def products(s_ref: Any, *dp_ref: Any) -> None:
                plgpu.wgmma(s_ref, k, transposed(q))
                for ref in dp_ref:
                    plgpu.wgmma(ref, v, transposed(do))
                s = plgpu.wgmma_accumulator_load(s_ref, wait_n=len(dp_ref))
                seen = block.seen(n) if masked else None
                p = call.weights(s, by_column("lse"), seen)
                if "dv" in names:
                    block.multiply(into["dv"], p.astype(q.dtype), do)
                for ref in dp_ref:
                    # The product into dv may still be in flight.
                    dp = plgpu.wgmma_accumulator_load(ref, wait_n=len(names) - 1)
                    ds = call.pull_back(p * (dp - by_column("delta")), s)
                    block.multiply(into["dk"], ds.astype(q.dtype), q)

            how_many = 2 if "dk" in names else 1
            pl.run_scoped(products, *[plgpu.ACC(shape, jnp.float32)] * how_many)

        state, _ = call.in_flight(body, state)
        block.free("q", slot)
        block.free("do", slot)
        return state

    sizes = {"dk": k.shape[-1], "dv": v.shape[-1]}
    scales = {"dk": call.late_scale, "dv": 1.0}
    state = walk.fold(step, [full((ROWS, sizes[name]), 0, MATRIX) for name in names])
    for name, ref, x in zip(names, block.outs, state, strict=True):
        gpu_store(block.rows_of(ref), x * scales[name])

"""The backward of a chunk: one kernel for dq, and one for dk and dv."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from usp_jax.kernels.choice import Target
from usp_jax.kernels.contract import Grads
from usp_jax.kernels.logits import LOG2E, Logits, raised
from usp_jax.kernels.triton.blocks import BlockSizes, Tile
from usp_jax.kernels.triton.launch import (
    batch_specs,
    heads_spec,
    rows_spec,
    to_rows,
    whole_pieces,
)
from usp_jax.kernels.triton.lists import Lists, listed, seen, transposed, walk
from usp_jax.kernels.triton.tiles import (
    Pieces,
    Ref,
    add,
    base2,
    dot_nn,
    dot_nt,
    load,
    store,
    unscaled,
    zeros,
)
from usp_jax.masking import Mask
from usp_jax.merge import finite
from usp_jax.varying import vary_like, varying_like

# dk and dv of a block of keys.
State = tuple[Pieces, Pieces]


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

    See `chunk_forward` for the keyword arguments.
    """
    blocks = blocks or BlockSizes.of(target, max(q.shape[3], v.shape[3]), q.dtype)
    head_size, value_size = q.shape[3], v.shape[3]
    q, k, v, dout = map(whole_pieces, (q, k, v, dout.astype(q.dtype)))
    # All scores of a row without a visible key are masked, so any finite lse will do.
    lse = raised(finite(lse) * LOG2E, 2.5, q.dtype)
    operands = (q, k, v, dout, lse, delta)
    operands, mask = vary_like((operands, mask), (operands, mask))
    dq = _dq(*operands, mask, logits, blocks.dq, interpret)
    dk, dv = _dkv(*operands, mask, logits, blocks.dkv, interpret)
    return dq[..., :head_size], dk[..., :head_size], dv[..., :value_size]


def _dq(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    mask: Mask,
    logits: Logits,
    tile: Tile,
    interpret: bool,
) -> jax.Array:
    tile = tile.within(q, k)
    lists = listed(mask, tile.block_q, tile.block_kv)
    batch, length, heads, _ = q.shape
    share = heads // k.shape[2]
    lse, delta = (to_rows(x, tile.block_q, 0.0) for x in (lse, delta))
    return pl.pallas_call(
        partial(_dq_kernel, tile=tile, logits=base2(logits), scale=logits.scale),
        grid=(pl.cdiv(length, tile.block_q), heads, batch),
        in_specs=[
            heads_spec(q),
            heads_spec(k, share=share),
            heads_spec(v, share=share),
            heads_spec(dout),
            rows_spec(lse),
            rows_spec(delta),
            batch_specs(lists),
        ],
        out_specs=heads_spec(q),
        out_shape=varying_like(q, q.shape, jnp.float32),
        compiler_params=tile.params,
        interpret=interpret,
        name="usp_dq",
    )(q, k, v, dout, lse, delta, lists)


def _dq_kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    dout_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    lists: Lists | None,
    dq_ref: Ref,
    *,
    tile: Tile,
    logits: Logits,
    scale: float,
) -> None:
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    rows = pl.ds(i * tile.block_q, tile.block_q)
    q, do = (load(ref, i, tile.block_q) for ref in (q_ref, dout_ref))
    lse, delta = lse_ref[rows], delta_ref[rows]

    def attend(j: jax.Array, is_partial: bool, dq: Pieces) -> Pieces:
        k, v = (load(ref, j, tile.block_kv) for ref in (k_ref, v_ref))
        s = logits.of(dot_nt(q, k))
        p = jnp.exp2(s - lse[:, None])
        dp = dot_nt(do, v)
        ds = unscaled(logits).pull_back(p * (dp - delta[:, None]), s)
        if is_partial:
            visible = seen(lists, i, tile.block_q, j, tile.block_kv)
            ds = jnp.where(visible, ds, 0.0)
        return add(dq, dot_nn(ds, k))

    num_kv = pl.cdiv(k_ref.shape[0], tile.block_kv)
    dq = walk(lists, i, num_kv, attend, zeros(q_ref, tile.block_q))
    store(dq_ref, i, tile.block_q, tuple(x * scale for x in dq))


def _dkv(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    dout: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    mask: Mask,
    logits: Logits,
    tile: Tile,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    tile = tile.within(q, k)
    lists = listed(transposed(mask), tile.block_kv, tile.block_q)
    batch, length, heads, _ = k.shape
    group = q.shape[2] // heads
    lse, delta = (to_rows(x, tile.block_q, 0.0) for x in (lse, delta))
    return pl.pallas_call(
        partial(_dkv_kernel, tile=tile, logits=base2(logits), scale=logits.scale),
        grid=(pl.cdiv(length, tile.block_kv), heads, batch),
        in_specs=[
            heads_spec(q, group=group),
            heads_spec(k),
            heads_spec(v),
            heads_spec(dout, group=group),
            rows_spec(lse, group=group),
            rows_spec(delta, group=group),
            batch_specs(lists),
        ],
        out_specs=[heads_spec(k), heads_spec(v)],
        out_shape=[
            varying_like(k, k.shape, jnp.float32),
            varying_like(v, v.shape, jnp.float32),
        ],
        compiler_params=tile.params,
        interpret=interpret,
        name="usp_dkv",
    )(q, k, v, dout, lse, delta, lists)


def _dkv_kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    dout_ref: Ref,
    lse_ref: Ref,
    delta_ref: Ref,
    lists: Lists | None,
    dk_ref: Ref,
    dv_ref: Ref,
    *,
    tile: Tile,
    logits: Logits,
    scale: float,
) -> None:
    # The scores and the mask are transposed: [block_kv, block_q].
    j = pl.program_id(0)
    k, v = (load(ref, j, tile.block_kv) for ref in (k_ref, v_ref))

    def attend(head: jax.Array, i: jax.Array, is_partial: bool, state: State) -> State:
        dk, dv = state
        rows = pl.ds(i * tile.block_q, tile.block_q)
        q, do = (load(ref, i, tile.block_q, head) for ref in (q_ref, dout_ref))
        s = logits.of(dot_nt(k, q))
        p = jnp.exp2(s - lse_ref[head, rows][None, :])
        dp = dot_nt(v, do)
        ds = unscaled(logits).pull_back(p * (dp - delta_ref[head, rows][None, :]), s)
        if is_partial:
            visible = seen(lists, j, tile.block_kv, i, tile.block_q)
            p, ds = jnp.where(visible, p, 0.0), jnp.where(visible, ds, 0.0)
        return add(dk, dot_nn(ds, q)), add(dv, dot_nn(p, do))

    def group(head: jax.Array, state: State) -> State:
        num_q = pl.cdiv(q_ref.shape[0], tile.block_q)
        return walk(lists, j, num_q, partial(attend, head), state)

    state = zeros(k_ref, tile.block_kv), zeros(v_ref, tile.block_kv)
    dk, dv = lax.fori_loop(0, q_ref.shape[1], group, state)
    store(dk_ref, j, tile.block_kv, tuple(x * scale for x in dk))
    store(dv_ref, j, tile.block_kv, dv)

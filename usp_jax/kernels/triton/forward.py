"""The forward of a chunk: each program computes out and lse of one block of queries."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from usp_jax.kernels.choice import Target
from usp_jax.kernels.contract import Carry
from usp_jax.kernels.logits import LOG2E, Logits, raised
from usp_jax.kernels.triton.blocks import BlockSizes, Tile
from usp_jax.kernels.triton.launch import (
    batch_specs,
    from_rows,
    heads_spec,
    rows_spec,
    to_rows,
    whole_pieces,
)
from usp_jax.kernels.triton.lists import Lists, listed, seen, walk
from usp_jax.kernels.triton.tiles import (
    Pieces,
    Ref,
    add,
    base2,
    dot_nn,
    dot_nt,
    load,
    store,
    zeros,
)
from usp_jax.masking import Mask
from usp_jax.merge import finite
from usp_jax.varying import vary_like, varying_like

# The running maximum, sum and accumulator of a block of queries.
State = tuple[jax.Array, jax.Array, Pieces]


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
      interpret: whether to run on any device, block by block in XLA.
    """
    blocks = blocks or BlockSizes.of(target, max(q.shape[3], v.shape[3]), q.dtype)
    arrays = (q, k, v, mask, carry)
    q, k, v, mask, carry = vary_like(arrays, arrays)
    value_size = v.shape[3]
    q, k, v = map(whole_pieces, (q, k, v))
    tile = blocks.forward.within(q, k)
    lists = listed(mask, tile.block_q, tile.block_kv)
    batch, length, heads, _ = q.shape
    num_blocks = pl.cdiv(length, tile.block_q)
    share = heads // k.shape[2]
    if carry is not None:
        rows = to_rows(carry[1], tile.block_q, -jnp.inf)
        carry = whole_pieces(carry[0]), rows
    out = varying_like(q, (batch, length, heads, v.shape[3]), jnp.float32)
    lse = varying_like(q, (batch, heads, num_blocks * tile.block_q), jnp.float32)
    carry_specs = None if carry is None else (heads_spec(carry[0]), rows_spec(lse))
    out, lse = pl.pallas_call(
        partial(_forward_kernel, tile=tile, logits=base2(logits)),
        grid=(num_blocks, heads, batch),
        in_specs=[
            heads_spec(q),
            heads_spec(k, share=share),
            heads_spec(v, share=share),
            batch_specs(lists),
            carry_specs,
        ],
        out_specs=[heads_spec(out), rows_spec(lse)],
        out_shape=[out, lse],
        compiler_params=tile.params,
        interpret=interpret,
        name="usp_forward",
    )(q, k, v, lists, carry)
    return out[..., :value_size], from_rows(lse, length)


def _forward_kernel(
    q_ref: Ref,
    k_ref: Ref,
    v_ref: Ref,
    lists: Lists | None,
    carry: tuple[Ref, Ref] | None,
    out_ref: Ref,
    lse_ref: Ref,
    *,
    tile: Tile,
    logits: Logits,
) -> None:
    # The last blocks start first, because they see most under a causal mask.
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    rows = pl.ds(i * tile.block_q, tile.block_q)
    q = load(q_ref, i, tile.block_q)
    if carry is None:
        m = jnp.full((tile.block_q,), -jnp.inf, jnp.float32)
        acc = zeros(v_ref, tile.block_q)
    else:
        acc, m = load(carry[0], i, tile.block_q), carry[1][rows] * LOG2E
    # A finished row resumes with its lse as the maximum and a sum of 1. If it has seen
    # nothing (lse = -inf), the first block that it sees discards that 1.
    l = jnp.ones((tile.block_q,), jnp.float32)

    def attend(j: jax.Array, is_partial: bool, state: State) -> State:
        m, l, acc = state
        k = load(k_ref, j, tile.block_kv)
        s = logits.of(dot_nt(q, k))
        if is_partial:
            visible = seen(lists, i, tile.block_q, j, tile.block_kv)
            s = jnp.where(visible, s, -jnp.inf)
        m_next = jnp.maximum(m, raised(s.max(1), 0.5, v_ref.dtype))
        safe = finite(m_next)
        p = jnp.exp2(s - safe[:, None])
        decay = jnp.exp2(m - safe)
        v = load(v_ref, j, tile.block_kv)
        acc = add(tuple(x * decay[:, None] for x in acc), dot_nn(p, v))
        return m_next, l * decay + p.sum(1), acc

    num_kv = pl.cdiv(k_ref.shape[0], tile.block_kv)
    m, l, acc = walk(lists, i, num_kv, attend, (m, l, acc))
    # The sum is 0 if nothing was visible in the blocks of the list.
    l = jnp.where(l == 0.0, 1.0, l)
    store(out_ref, i, tile.block_q, tuple(x / l[:, None] for x in acc))
    lse_ref[rows] = m / LOG2E + jnp.log(l)

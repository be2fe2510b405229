"""The chunk contract in plain XLA: blockwise, O(T) memory, any platform.

A scan runs over the blocks of queries. Each block of queries visits the blocks of keys
that it can see, and keeps a running maximum and sum (FlashAttention-2, arXiv
2307.08691, Algorithms 1 and 2). A block of keys that is fully visible needs no mask
arithmetic. The backward is a single pass of this kind: dq belongs to the block of
queries, and dk and dv are accumulated in place.

Arrays are stored block by block with heads before tokens: queries as
[B, nq, K, G·bq, H] and keys as [B, nk, K, bk, H]. The G query heads of a key head are
then rows of one matrix product, which also sums their dk and dv.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Int8

from usp_jax.kernels.contract import Carry, Grads
from usp_jax.kernels.dropout import Dropout
from usp_jax.kernels.logits import Logits, at_most_0, lowered
from usp_jax.kernels.padding import pad_length, pad_mask
from usp_jax.masking import (
    FULL,
    Mask,
    Tokens,
    block_kinds,
    block_lists,
    visible,
)
from usp_jax.merge import finite, normalize
from usp_jax.varying import vary_like

# Sums over blocks of keys: (m, l, acc) in the forward and (dq, dk, dv) in the backward.
State = tuple[jax.Array, jax.Array, jax.Array]
Pair = tuple[jax.Array, jax.Array]

# The batch row and the index of a block of keys.
Index = tuple[jax.Array, jax.Array]

# A block of scores fits in a CPU's cache; 512 took 1.2 times as long (8K tokens).
BLOCK = 256


def chunk_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    mask: Mask,
    carry: Carry | None,
    logits: Logits,
) -> Carry:
    """Computes the attention of q over k, v and merges it into `carry`."""
    blocks = _Blocks.of(q, k, v, mask)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q_blocks, k_blocks, v_blocks = blocks.q(q), blocks.kv(k), blocks.kv(v)
    if carry is None:
        m = jnp.full_like(q_blocks[..., 0], -jnp.inf, dtype)
        acc = jnp.zeros_like(q_blocks, dtype, shape=(*m.shape, v.shape[-1]))
        l = jnp.zeros_like(m)
    else:
        # A finished row resumes with its lse as the maximum and a sum of 1.
        acc, m = blocks.q(carry[0]), blocks.rows(carry[1], -jnp.inf)
        l = jnp.where(m == -jnp.inf, 0, 1).astype(dtype)

    def by_row(x: jax.Array) -> jax.Array:
        """[n, bq, bk] -> [K, G·bq, bk], the layout of the scores"""
        return x.reshape(blocks.heads, -1, x.shape[-1])

    def attend(
        q: jax.Array, state: State, kv_index: Index, tokens: Mask, is_masked: bool
    ) -> State:
        m, l, acc = state
        k, v = k_blocks[kv_index], v_blocks[kv_index]
        s = logits.of(_einsum("KTH,KSH->KTS", q, k, dtype))
        if logits.slopes is not None:
            s += by_row(logits.bias(tokens.q, tokens.kv, dtype))
        if is_masked:
            s = _masked(s, visible(tokens), -jnp.inf)
        m_next = jnp.maximum(m, lowered(s.max(-1)))
        safe = finite(m_next)
        p = jnp.exp(at_most_0(s - safe[..., None]))
        decay = jnp.exp(m - safe)
        l = l * decay + p.sum(-1)
        if logits.dropout is not None:
            p *= by_row(_factors(logits.dropout, kv_index[0], tokens, dtype))
        pv = _einsum("KTS,KSH->KTH", p.astype(v.dtype), v, dtype)
        return m_next, l, acc * decay[..., None] + pv

    def body(_: None, x: tuple[jax.Array, ...]) -> tuple[None, State]:
        q, m, l, acc, index = x
        return None, blocks.walk(index, partial(attend, q), (m, l, acc))

    _, (m, l, acc) = lax.scan(body, None, (q_blocks, m, l, acc, blocks.indices))
    out, lse = normalize(acc, m, l)
    return blocks.from_q(out), blocks.from_rows(lse)


def chunk_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K V"],
    dout: Float[Array, "B T N V"],
    lse: Float[Array, "B T N"],
    delta: Float[Array, "B T N"],
    mask: Mask,
    logits: Logits,
) -> Grads:
    """Computes dq, dk, dv of one chunk from the global lse and delta."""
    blocks = _Blocks.of(q, k, v, mask)
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    k_blocks, v_blocks = blocks.kv(k), blocks.kv(v)
    # All scores of a row without a visible key are masked, so any finite lse will do.
    xs = (
        blocks.q(q),
        blocks.q(dout.astype(q.dtype)),
        blocks.rows(finite(lse), 0.0),
        blocks.rows(delta, 0.0),
    )

    # Scores are [K, bk, G·bq] and dq is [K, H, G·bq], so that no product has a large
    # transposed operand: those run at half the speed on a CPU.
    def by_key(x: jax.Array) -> jax.Array:
        """[n, bq, bk] -> [K, bk, G·bq], the layout of the scores"""
        x = x.reshape(blocks.heads, -1, *x.shape[1:]).transpose(0, 3, 1, 2)
        return x.reshape(*x.shape[:2], -1)

    def attend(
        q: jax.Array,
        do: jax.Array,
        lse: jax.Array,
        delta: jax.Array,
        state: State,
        kv_index: Index,
        tokens: Mask,
        is_masked: bool,
    ) -> State:
        dq, dk, dv = state
        k, v = k_blocks[kv_index], v_blocks[kv_index]
        s = logits.of(_einsum("KSH,KTH->KST", k, q, dtype))
        biased = s
        if logits.slopes is not None:
            biased += by_key(logits.bias(tokens.q, tokens.kv, dtype))
        p = jnp.exp(at_most_0(biased - lse[:, None]))
        dp = _einsum("KSH,KTH->KST", v, do, dtype)
        factors: jax.Array | int = 1
        if logits.dropout is not None:
            factors = by_key(_factors(logits.dropout, kv_index[0], tokens, dtype))
        ds = logits.pull_back(p * (dp * factors - delta[:, None]), s)
        p *= factors
        if is_masked:
            seen = visible(tokens).T
            p, ds = _masked(p, seen, 0.0), _masked(ds, seen, 0.0)
        p, ds = p.astype(do.dtype), ds.astype(q.dtype)
        dq += _einsum("KHS,KST->KHT", k.swapaxes(1, 2), ds, dtype)
        dk = dk.at[kv_index].add(_einsum("KST,KTH->KSH", ds, q, dtype))
        dv = dv.at[kv_index].add(_einsum("KST,KTH->KSH", p, do, dtype))
        return dq, dk, dv

    def body(dkv: Pair, x: tuple[jax.Array, ...]) -> tuple[Pair, jax.Array]:
        q, do, lse, delta, index = x
        dq = jnp.zeros_like(q.swapaxes(1, 2), dtype)
        own = partial(attend, q, do, lse, delta)
        dq, dk, dv = blocks.walk(index, own, (dq, *dkv))
        return (dk, dv), dq.swapaxes(1, 2)

    dkv = jnp.zeros_like(k_blocks, dtype), jnp.zeros_like(v_blocks, dtype)
    (dk, dv), dq = lax.scan(body, dkv, (*xs, blocks.indices))
    return blocks.from_q(dq), blocks.from_kv(dk), blocks.from_kv(dv)


def _factors(
    dropout: Dropout, row: jax.Array, tokens: Mask, dtype: DTypeLike
) -> jax.Array:
    """Computes the dropout factors [n, bq, bk] of one block."""
    return dropout.factors(dropout.rows[row], tokens.q, tokens.kv, dtype)


def _masked(x: jax.Array, seen: jax.Array, fill: float) -> jax.Array:
    """Fills the scores `x` that are not visible.

    `x` has the axes of `seen` after its heads, one of them repeated G times.
    """
    (a, b), (_, c, d) = seen.shape, x.shape
    blocks = x.reshape(x.shape[0], c // a, a, d // b, b)
    return jnp.where(seen[None, None, :, None], blocks, fill).reshape(x.shape)


def _einsum(spec: str, a: jax.Array, b: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Multiplies in the dtype of the inputs and accumulates in `dtype`."""
    highest = lax.Precision.HIGHEST
    return jnp.einsum(spec, a, b, precision=highest, preferred_element_type=dtype)


@dataclasses.dataclass(frozen=True)
class _Lists:
    """The blocks of keys that each block of queries sees, from `block_lists`."""

    kinds: Int8[Array, "B nq nk"]
    counts: Int[Array, "B nq"]
    order: Int[Array, "B nq nk"]

    @classmethod
    def of(cls, mask: Mask, block_q: int, block_kv: int) -> "_Lists":
        kinds = block_kinds(mask, block_q, block_kv)
        return cls(kinds, *block_lists(kinds))


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The blocks of one chunk, and the lists of those to visit."""

    batch: int
    heads: int
    q_length: int
    kv_length: int
    block_q: int
    block_kv: int
    mask: Mask
    lists: _Lists | None

    @classmethod
    def of(cls, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> "_Blocks":
        """Chooses the block sizes of a chunk and lists the visible blocks of `mask`."""
        block_q, block_kv = _block(q.shape[1]), _block(k.shape[1])
        mask = pad_mask(mask, block_q, block_kv)
        lists = None if mask.sees_all else _Lists.of(mask, block_q, block_kv)
        sizes = (q.shape[0], k.shape[2], q.shape[1], k.shape[1], block_q, block_kv)
        return cls(*sizes, mask, lists)

    @property
    def indices(self) -> jax.Array:
        """Indices of the blocks of queries over all batch rows."""
        return lax.iota(jnp.int32, self.batch * -(-self.q_length // self.block_q))

    def walk(
        self,
        index: jax.Array,
        attend: Callable[[State, Index, Mask, bool], State],
        state: State,
    ) -> State:
        """Folds `attend` over the blocks of keys that query block `index` sees.

        Args:
          index: an entry of `indices`.
          attend: (state, (batch row, block of keys), mask of the block, whether that
            mask hides anything) -> state.
          state: the initial state.
        """
        num_q = -(-self.q_length // self.block_q)
        num_kv = -(-self.kv_length // self.block_kv)
        row, i = index // num_q, index % num_q
        state = vary_like(state, (state, self.mask))

        def visit(j: jax.Array, state: State, is_masked: bool) -> State:
            return attend(state, (row, j), self._tokens(row, i, j), is_masked)

        lists = self.lists
        if lists is None:
            return lax.fori_loop(0, num_kv, partial(visit, is_masked=False), state)
        mask_row = row if lists.kinds.shape[0] > 1 else 0

        def step(n: jax.Array, state: State) -> State:
            j = lists.order[mask_row, i, n]
            return lax.cond(
                lists.kinds[mask_row, i, j] == FULL,
                partial(visit, j, is_masked=False),
                partial(visit, j, is_masked=True),
                state,
            )

        return lax.fori_loop(0, lists.counts[mask_row, i], step, state)

    def _tokens(self, row: jax.Array, i: jax.Array, j: jax.Array) -> Mask:
        """Returns the mask of one block."""

        def cut(tokens: Tokens, block: int, index: jax.Array) -> Tokens:
            def piece(x: jax.Array) -> jax.Array:
                blocks = x.reshape(x.shape[0], -1, block)
                return blocks[row if x.shape[0] > 1 else 0, index]

            return jax.tree.map(piece, tokens)

        q = cut(self.mask.q, self.block_q, i)
        return Mask(self.mask.rule, q, cut(self.mask.kv, self.block_kv, j))

    def q(self, x: jax.Array) -> jax.Array:
        """[B, T, N, H] -> [B·nq, K, G·bq, H]"""
        x = pad_length(x, self.block_q, 0.0)
        x = x.reshape(self.batch, -1, self.block_q, self.heads, *_split(x, self.heads))
        x = x.transpose(0, 1, 3, 4, 2, 5)
        return x.reshape(-1, self.heads, x.shape[3] * self.block_q, x.shape[-1])

    def rows(self, x: jax.Array, fill: float) -> jax.Array:
        """[B, T, N] -> [B·nq, K, G·bq]"""
        return self.q(pad_length(x, self.block_q, fill)[..., None])[..., 0]

    def kv(self, x: jax.Array) -> jax.Array:
        """[B, S, K, H] -> [B, nk, K, bk, H]"""
        x = pad_length(x, self.block_kv, 0.0)
        x = x.reshape(self.batch, -1, self.block_kv, *x.shape[2:])
        return x.swapaxes(2, 3)

    def from_q(self, x: jax.Array) -> jax.Array:
        """Inverse of `q`."""
        shape = (self.batch, -1, self.heads, x.shape[2] // self.block_q, self.block_q)
        x = x.reshape(*shape, x.shape[-1]).transpose(0, 1, 4, 2, 3, 5)
        x = x.reshape(self.batch, -1, x.shape[3] * x.shape[4], x.shape[5])
        return x[:, : self.q_length]

    def from_rows(self, x: jax.Array) -> jax.Array:
        """Inverse of `rows`."""
        return self.from_q(x[..., None])[..., 0]

    def from_kv(self, x: jax.Array) -> jax.Array:
        """Inverse of `kv`."""
        x = x.swapaxes(2, 3)
        return x.reshape(self.batch, -1, *x.shape[3:])[:, : self.kv_length]


def _block(length: int) -> int:
    """Returns a block size of at most BLOCK that cuts a length evenly.

    A length of at most BLOCK // 2 is one block. Longer ones have an even number of
    blocks, so that none straddles the two chunks of a zigzag shard.
    """
    if length <= BLOCK // 2:
        return max(length, 1)
    return -(-length // (2 * -(-length // (2 * BLOCK))))


def _split(x: jax.Array, heads: int) -> tuple[int, int]:
    """Returns (G, H) of an array [B, T, N, H]."""
    return x.shape[2] // heads, x.shape[3]

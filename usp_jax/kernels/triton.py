"""The chunk contract as Pallas Triton kernels: NVIDIA GPUs from Ampere on.

FlashAttention-2 (arXiv 2307.08691), one program for each block of rows: the forward and
dq take a block of queries and walk its list of key blocks; dk, dv take a block of keys
and walk the list of query blocks that see it, for all query heads of its key head. No
result has two writers, so nothing is atomic and every sum has one order.

Lists are read from global memory. In each the FULL blocks come first, so that a program
runs one loop without mask arithmetic and then one with it.

Arrays stay [B, T, N, H]. A head is taken in pieces whose sizes are powers of two, as
Triton wants them (80 = 64 + 16), so heads of 80, 96 or 192 have no padded work.
Exponentials are base 2 inside; lse is the natural log outside.

JAX has deprecated Pallas Triton; only the choice of kernels depends on this file.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from usp_jax.kernels.choice import Target
from usp_jax.kernels.contract import Carry, Grads
from usp_jax.kernels.logits import Logits
from usp_jax.kernels.table import Row, lookup
from usp_jax.masking import (
    EMPTY,
    FULL,
    Mask,
    MaskRule,
    block_kinds,
    pad_tokens,
    visible,
)
from usp_jax.merge import finite
from usp_jax.varying import vary_like, varying_like

LOG2E = math.log2(math.e)

# Lists are sorted, and as long as rows times columns: for very long sequences an entry
# is several blocks.
MAX_LIST = 1024


@dataclasses.dataclass(frozen=True)
class Tile:
    """The blocks of one kernel, and how Triton compiles it."""

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name}={size} must be a power of two >= 16")
        if self.num_warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"num_warps={self.num_warps} must be 1, 2, 4, 8 or 16")
        if self.num_stages < 1:
            raise ValueError(f"num_stages={self.num_stages} must be >= 1")

    def within(self, q: Any, k: Any) -> "Tile":
        """The same, with no block longer than what it cuts."""
        block_q = min(self.block_q, max(16, pl.next_power_of_2(q.shape[1])))
        block_kv = min(self.block_kv, max(16, pl.next_power_of_2(k.shape[1])))
        return dataclasses.replace(self, block_q=block_q, block_kv=block_kv)

    @property
    def params(self) -> plgpu.CompilerParams:
        """What Pallas is told, which also says that this is a Triton kernel."""
        return plgpu.CompilerParams(self.num_warps, self.num_stages)


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """The tiles of the three kernels."""

    forward: Tile
    dq: Tile
    dkv: Tile

    @classmethod
    def of(cls, target: Target, head_size: int, dtype: Any) -> "BlockSizes":
        """The default for a device, a head size and the dtype of q, k, v.

        Raises:
          ValueError: no default is for heads of that size.
        """
        return lookup(TABLE, target, head_size, dtype)


# Where no source is named, found by compiling, not by timing: with 16 bits none spills
# registers on an A100 or an H200. A B200 spills some at head sizes 96 and 256, an A100
# at 256 in float32 and, under a window with two bounds, at 192. The capabilities named
# have 163 KiB of shared memory a block and more, others 99.
TABLE = (
    Row(
        BlockSizes(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
        head_size=64,
        itemsize=2,
    ),
    Row(
        BlockSizes(Tile(128, 64, 8, 3), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)),
        head_size=96,
        itemsize=2,
    ),
    Row(
        BlockSizes(Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
        capabilities=((9, 0),),
        head_size=128,
        itemsize=2,
        source="2026-11-26, jax 0.11.2, NVIDIA H100, causal 16384, head size 128",
    ),
    Row(
        BlockSizes(Tile(128, 64, 8, 3), Tile(64, 64, 4, 2), Tile(64, 64, 8, 2)),
        head_size=128,
        itemsize=2,
    ),
    Row(
        BlockSizes(Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 32, 4, 2)),
        head_size=192,
        itemsize=2,
    ),
    Row(
        BlockSizes(Tile(64, 64, 8, 2), Tile(64, 32, 8, 2), Tile(32, 32, 8, 2)),
        capabilities=((8, 0), (9, 0), (10, 0), (10, 3)),
        head_size=256,
        itemsize=2,
    ),
    Row(
        BlockSizes(Tile(64, 32, 8, 2), Tile(32, 32, 4, 2), Tile(32, 32, 8, 2)),
        head_size=256,
        itemsize=2,
    ),
    Row(
        BlockSizes(Tile(64, 32, 8, 2), Tile(32, 32, 8, 2), Tile(32, 32, 8, 2)),
        head_size=128,
        itemsize=4,
    ),
    Row(
        BlockSizes(Tile(32, 32, 8, 2), Tile(16, 32, 8, 2), Tile(16, 16, 4, 2)),
        head_size=256,
        itemsize=4,
    ),
)


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
    """Attention of q over k, v, merged into `carry`.

    Args:
      target: the device; with the head size it gives the block sizes.
      blocks: other block sizes.
      interpret: runs on any device, block by block in XLA.
    """
    blocks = blocks or BlockSizes.of(target, max(q.shape[3], v.shape[3]), q.dtype)
    arrays = (q, k, v, mask, carry)
    q, k, v, mask, carry = vary_like(arrays, arrays)
    value_size = v.shape[3]
    q, k, v = map(_whole_pieces, (q, k, v))
    tile = blocks.forward.within(q, k)
    mask, lists = _listed(mask, tile.block_q, tile.block_kv)
    batch, length, heads, _ = q.shape
    num_blocks = pl.cdiv(length, tile.block_q)
    share = heads // k.shape[2]
    if carry is not None:
        rows = _to_rows(carry[1], tile.block_q, -jnp.inf)
        carry = _whole_pieces(carry[0]), rows
    out = varying_like(q, (batch, length, heads, v.shape[3]), jnp.float32)
    lse = varying_like(q, (batch, heads, num_blocks * tile.block_q), jnp.float32)
    carry_specs = None if carry is None else (_heads_spec(carry[0]), _rows_spec(lse))
    out, lse = pl.pallas_call(
        partial(_forward_kernel, tile=tile, logits=_base2(logits)),
        grid=(num_blocks, heads, batch),
        in_specs=[
            _heads_spec(q),
            _heads_spec(k, share=share),
            _heads_spec(v, share=share),
            _batch_specs(mask),
            _batch_specs(lists),
            carry_specs,
        ],
        out_specs=[_heads_spec(out), _rows_spec(lse)],
        out_shape=[out, lse],
        compiler_params=tile.params,
        interpret=interpret,
        name="usp_forward",
    )(q, k, v, mask, lists, carry)
    return out[..., :value_size], _from_rows(lse, length)


def _forward_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    mask: Mask | None,
    lists: "_Lists | None",
    carry: Any,
    out_ref: Any,
    lse_ref: Any,
    *,
    tile: Tile,
    logits: Logits,
) -> None:
    # The last blocks see most under a causal mask: they start first.
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    rows = pl.ds(i * tile.block_q, tile.block_q)
    q = _load(q_ref, i, tile.block_q)
    if carry is None:
        m = jnp.full((tile.block_q,), -jnp.inf, jnp.float32)
        acc = _zeros(v_ref, tile.block_q)
    else:
        acc, m = _load(carry[0], i, tile.block_q), carry[1][rows] * LOG2E
    # A finished row is a running one whose sum is 1 at its lse. That of a row that has
    # seen nothing, at -inf, is forgotten with the first block.
    l = jnp.ones((tile.block_q,), jnp.float32)

    def attend(j: Any, is_partial: bool, state: Any) -> Any:
        m, l, acc = state
        k = _load(k_ref, j, tile.block_kv)
        s = logits.of(_dot_nt(q, k))
        if is_partial:
            s = jnp.where(
                _visible(mask, i, tile.block_q, j, tile.block_kv), s, -jnp.inf
            )
        m_next = jnp.maximum(m, s.max(1))
        safe = finite(m_next)
        p = jnp.exp2(s - safe[:, None])
        decay = jnp.exp2(m - safe)
        v = _load(v_ref, j, tile.block_kv)
        acc = _add([x * decay[:, None] for x in acc], _dot_nn(p, v))
        return m_next, l * decay + p.sum(1), acc

    num_kv = pl.cdiv(k_ref.shape[0], tile.block_kv)
    m, l, acc = _walk(lists, i, num_kv, attend, (m, l, acc))
    # And 0 if it saw nothing in the blocks that it was shown.
    l = jnp.where(l == 0.0, 1.0, l)
    _store(out_ref, i, tile.block_q, [x / l[:, None] for x in acc])
    lse_ref[rows] = m / LOG2E + jnp.log(l)


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
    """dq, dk, dv of one chunk from the global lse and delta."""
    blocks = blocks or BlockSizes.of(target, max(q.shape[3], v.shape[3]), q.dtype)
    arrays = map(_whole_pieces, (q, k, v, dout.astype(q.dtype)))
    # Rows without a visible key have every score masked, whatever is subtracted.
    args: Any = (*arrays, finite(lse) * LOG2E, delta, mask)
    args = vary_like(args, args)
    dq = _dq(*args, logits, blocks.dq, interpret)  # type: ignore[call-arg]
    dk, dv = _dkv(*args, logits, blocks.dkv, interpret)  # type: ignore[call-arg]
    head_size, value_size = q.shape[3], v.shape[3]
    return dq[..., :head_size], dk[..., :head_size], dv[..., :value_size]


def _dq(
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    lse: Any,
    delta: Any,
    mask: Mask,
    logits: Logits,
    tile: Tile,
    interpret: bool,
) -> Any:
    tile = tile.within(q, k)
    mask, lists = _listed(mask, tile.block_q, tile.block_kv)
    batch, length, heads, _ = q.shape
    share = heads // k.shape[2]
    lse, delta = (_to_rows(x, tile.block_q, 0.0) for x in (lse, delta))
    return pl.pallas_call(
        partial(_dq_kernel, tile=tile, logits=_base2(logits), scale=logits.scale),
        grid=(pl.cdiv(length, tile.block_q), heads, batch),
        in_specs=[
            _heads_spec(q),
            _heads_spec(k, share=share),
            _heads_spec(v, share=share),
            _heads_spec(dout),
            _rows_spec(lse),
            _rows_spec(delta),
            _batch_specs(mask),
            _batch_specs(lists),
        ],
        out_specs=_heads_spec(q),
        out_shape=varying_like(q, q.shape, jnp.float32),
        compiler_params=tile.params,
        interpret=interpret,
        name="usp_dq",
    )(q, k, v, dout, lse, delta, mask, lists)


def _dq_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    mask: Mask | None,
    lists: "_Lists | None",
    dq_ref: Any,
    *,
    tile: Tile,
    logits: Logits,
    scale: float,
) -> None:
    i = pl.num_programs(0) - 1 - pl.program_id(0)
    rows = pl.ds(i * tile.block_q, tile.block_q)
    q, do = (_load(ref, i, tile.block_q) for ref in (q_ref, dout_ref))
    lse, delta = lse_ref[rows], delta_ref[rows]

    def attend(
        j: Any,
        is_partial: bool,
        dq: Any,
    ) -> Any:
        k, v = (_load(ref, j, tile.block_kv) for ref in (k_ref, v_ref))
        s = logits.of(_dot_nt(q, k))
        p = jnp.exp2(s - lse[:, None])
        dp = _dot_nt(do, v)
        ds = _unscaled(logits).pull_back(p * (dp - delta[:, None]), s)
        if is_partial:
            seen = _visible(mask, i, tile.block_q, j, tile.block_kv)
            ds = jnp.where(seen, ds, 0.0)
        return _add(dq, _dot_nn(ds, k))

    num_kv = pl.cdiv(k_ref.shape[0], tile.block_kv)
    dq = _walk(lists, i, num_kv, attend, _zeros(q_ref, tile.block_q))
    _store(dq_ref, i, tile.block_q, [x * scale for x in dq])


def _dkv(
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    lse: Any,
    delta: Any,
    mask: Mask,
    logits: Logits,
    tile: Tile,
    interpret: bool,
) -> Any:
    tile = tile.within(q, k)
    mask, lists = _listed(_transposed(mask), tile.block_kv, tile.block_q)
    batch, length, heads, _ = k.shape
    group = q.shape[2] // heads
    lse, delta = (_to_rows(x, tile.block_q, 0.0) for x in (lse, delta))
    return pl.pallas_call(
        partial(_dkv_kernel, tile=tile, logits=_base2(logits), scale=logits.scale),
        grid=(pl.cdiv(length, tile.block_kv), heads, batch),
        in_specs=[
            _heads_spec(q, group=group),
            _heads_spec(k),
            _heads_spec(v),
            _heads_spec(dout, group=group),
            _rows_spec(lse, group=group),
            _rows_spec(delta, group=group),
            _batch_specs(mask),
            _batch_specs(lists),
        ],
        out_specs=[_heads_spec(k), _heads_spec(v)],
        out_shape=[
            varying_like(k, k.shape, jnp.float32),
            varying_like(v, v.shape, jnp.float32),
        ],
        compiler_params=tile.params,
        interpret=interpret,
        name="usp_dkv",
    )(q, k, v, dout, lse, delta, mask, lists)


def _dkv_kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    dout_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    mask: Mask | None,
    lists: "_Lists | None",
    dk_ref: Any,
    dv_ref: Any,
    *,
    tile: Tile,
    logits: Logits,
    scale: float,
) -> None:
    # Scores are held transposed, [block_kv, block_q], and so is the mask.
    j = pl.program_id(0)
    k, v = (_load(ref, j, tile.block_kv) for ref in (k_ref, v_ref))

    def attend(head: Any, i: Any, is_partial: bool, state: Any) -> Any:
        dk, dv = state
        rows = pl.ds(i * tile.block_q, tile.block_q)
        q, do = (_load(ref, i, tile.block_q, head) for ref in (q_ref, dout_ref))
        s = logits.of(_dot_nt(k, q))
        p = jnp.exp2(s - lse_ref[head, rows][None, :])
        dp = _dot_nt(v, do)
        ds = _unscaled(logits).pull_back(p * (dp - delta_ref[head, rows][None, :]), s)
        if is_partial:
            seen = _visible(mask, j, tile.block_kv, i, tile.block_q)
            p, ds = jnp.where(seen, p, 0.0), jnp.where(seen, ds, 0.0)
        return _add(dk, _dot_nn(ds, q)), _add(dv, _dot_nn(p, do))

    def walk(head: Any, state: Any) -> Any:
        num_q = pl.cdiv(q_ref.shape[0], tile.block_q)
        return _walk(lists, j, num_q, partial(attend, head), state)

    state = _zeros(k_ref, tile.block_kv), _zeros(v_ref, tile.block_kv)
    dk, dv = lax.fori_loop(0, q_ref.shape[1], walk, state)
    _store(dk_ref, j, tile.block_kv, [x * scale for x in dk])
    _store(dv_ref, j, tile.block_kv, dv)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Lists:
    """For each block of rows the spans of columns it sees, FULL ones first.

    Arrays, or what Pallas puts in their place: int32 [B, rows], [B, rows] and
    [B, rows, spans]; B may be 1. A span is `blocks` blocks of columns.
    """

    num_full: Any
    num_some: Any
    order: Any
    blocks: int = dataclasses.field(metadata={"static": True})


def _listed(mask: Mask, block_rows: int, block_columns: int) -> Any:
    """The mask, padded to whole blocks, and its lists; (None, None) if all is seen."""
    row_padding = -mask.q.positions.shape[1] % block_rows
    column_padding = -mask.kv.positions.shape[1] % block_columns
    with_ids = bool(row_padding or column_padding)
    q = pad_tokens(mask.q, row_padding, with_ids=with_ids)
    mask = Mask(mask.rule, q, pad_tokens(mask.kv, column_padding, with_ids=with_ids))
    if mask.sees_all:
        return None, None
    num_columns, blocks = mask.kv.positions.shape[1] // block_columns, 1
    while num_columns // blocks > MAX_LIST and num_columns % (2 * blocks) == 0:
        blocks *= 2
    kinds = block_kinds(mask, block_rows, block_columns * blocks)
    num_full = jnp.sum(kinds == FULL, -1, dtype=jnp.int32)
    num_some = jnp.sum(kinds != EMPTY, -1, dtype=jnp.int32)
    order = jnp.argsort(-kinds, axis=-1, stable=True).astype(jnp.int32)
    return mask, _Lists(num_full, num_some, order, blocks)


def _transposed(mask: Mask) -> Mask:
    """The mask as keys see queries."""
    rule = MaskRule(left=mask.rule.after, right=mask.rule.before)
    return Mask(rule, mask.kv, mask.q)


def _walk(
    lists: _Lists | None,
    row: Any,
    num_columns: int,
    attend: Callable[..., Any],
    state: tuple[Any, ...],
) -> tuple[Any, ...]:
    """Folds `attend(column, is_partial, state)` over the blocks that a row sees."""
    if lists is None:
        return lax.fori_loop(0, num_columns, lambda j, x: attend(j, False, x), state)

    def step(is_partial: bool) -> Callable[..., Any]:
        def body(n: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
            span = lists.order[row, lax.div(n, lists.blocks)]
            column = span * lists.blocks + lax.rem(n, lists.blocks)
            return attend(column, is_partial, state)

        return body

    num_full = lists.num_full[row] * lists.blocks
    num_some = lists.num_some[row] * lists.blocks
    state = lax.fori_loop(0, num_full, step(False), state)
    return lax.fori_loop(num_full, num_some, step(True), state)


def _visible(
    mask: Mask | None, i: Any, block_rows: int, j: Any, block_columns: int
) -> Any:
    """The mask of one block."""
    assert mask is not None, "where all is seen no block is partial"

    def cut(tokens: Any, index: Any, block: int) -> Any:
        return jax.tree.map(lambda ref: ref[pl.ds(index * block, block)], tokens)

    q, kv = cut(mask.q, i, block_rows), cut(mask.kv, j, block_columns)
    return visible(Mask(mask.rule, q, kv))


def _whole_pieces(x: Any) -> Any:
    """Heads padded with zeros to a multiple of 16, the least that Triton multiplies."""
    if not (padding := -x.shape[3] % 16):
        return x
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, padding)))


def _pieces(head_size: int) -> list[tuple[int, int]]:
    """(start, size) of the powers of two that add up to a head."""
    pieces, start, rest = [], 0, head_size
    while rest:
        size = 1 << (rest.bit_length() - 1)
        pieces.append((start, size))
        start, rest = start + size, rest - size
    return pieces


def _zeros(ref: Any, block: int) -> Any:
    """An accumulator for a block of the heads in `ref`."""
    pieces = _pieces(ref.shape[-1])
    return tuple(jnp.zeros((block, size), jnp.float32) for _, size in pieces)


def _load(ref: Any, index: Any, block: int, head: Any = None) -> Any:
    """A block of rows of [T, H] or of one of [T, G, H], in pieces; 0 past the end."""
    inside = _inside(ref, index, block)
    return tuple(
        plgpu.load(view, mask=inside, other=None if inside is None else 0.0)
        for view in _views(ref, index, block, head)
    )


def _store(
    ref: Any,
    index: Any,
    block: int,
    pieces: Any,
) -> None:
    """Writes what `_load` reads."""
    inside = _inside(ref, index, block)
    for view, x in zip(_views(ref, index, block), pieces, strict=True):
        plgpu.store(view, x, mask=inside)


def _views(ref: Any, index: Any, block: int, head: Any = None) -> Iterator[Any]:
    """The pieces of a block."""
    rows = pl.ds(index * block, block)
    for start, size in _pieces(ref.shape[-1]):
        columns = pl.ds(start, size)
        yield ref.at[(rows, columns) if head is None else (rows, head, columns)]


def _inside(ref: Any, index: Any, block: int) -> Any:
    """Which rows of a block there are; None if all, always."""
    length = ref.shape[0]
    if not length % block:
        return None
    return (index * block + jnp.arange(block) < length)[:, None]


def _dot_nt(
    a: Any,
    b: Any,
) -> Any:
    """[m, H], [n, H] in pieces -> [m, n]"""
    return sum(_dot(x, y, 1) for x, y in zip(a, b, strict=True))


def _dot_nn(a: Any, b: Any) -> Any:
    """[m, n], [n, H] in pieces -> [m, H] in pieces"""
    return tuple(_dot(a.astype(x.dtype), x, 0) for x in b)


def _dot(a: Any, b: Any, axis: int) -> Any:
    """A product over the last axis of `a` and one of `b`, accumulated in float32."""
    return lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def _add(
    a: Any,
    b: Any,
) -> Any:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _base2(logits: Logits) -> Logits:
    """Logits in units of log 2, so that exp2 takes the place of exp."""
    cap = None if logits.soft_cap is None else logits.soft_cap * LOG2E
    return Logits(logits.scale * LOG2E, cap)


def _unscaled(logits: Logits) -> Logits:
    """Logits whose derivative leaves the scale to whoever sums up."""
    return dataclasses.replace(logits, scale=1.0)


def _heads_spec(x: Any, *, group: int | None = None, share: int = 1) -> Any:
    """The whole length of one head of [B, T, N, H], or of a group of heads.

    `share` programs' heads have one head of `x`.
    """
    shape = (None, x.shape[1], group, x.shape[3])
    return pl.BlockSpec(shape, lambda _, n, b: (b, 0, n // share, 0))


def _rows_spec(x: Any, *, group: int | None = None) -> Any:
    """One head's rows of [B, N, T], or those of a group of heads."""
    return pl.BlockSpec((None, group, x.shape[2]), lambda _, n, b: (b, n, 0))


def _batch_specs(tree: _Lists | Mask | None) -> Any:
    """All of one batch row's; an array with one batch row serves all."""

    def spec(x: Any) -> Any:
        shape, rest = (None, *x.shape[1:]), (0,) * (x.ndim - 1)
        return pl.BlockSpec(shape, lambda _, n, b: (b if x.shape[0] > 1 else 0, *rest))

    return jax.tree.map(spec, tree)


def _to_rows(x: Any, block: int, fill: float) -> Any:
    """[B, T, N] -> [B, N, T'], T' the next multiple of the block"""
    x = x.swapaxes(1, 2)
    if not (padding := -x.shape[2] % block):
        return x
    return jnp.pad(x, ((0, 0), (0, 0), (0, padding)), constant_values=fill)


def _from_rows(x: Any, length: int) -> Any:
    """[B, N, T'] -> [B, T, N]"""
    return x[:, :, :length].swapaxes(1, 2)

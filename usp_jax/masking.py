"""Masks as data: which query sees which key, by token and by block.

A key is visible if four conditions hold: on order (causal), on distance (window), on
the document (segment), and that neither side is padding. All four are one function of
(query position, key position, query segment, key segment). Kernels use no other mask,
but for those of packages (`kernels/cases.py`).

nq and nk are numbers of blocks. The batch axis of positions may be 1 (same for all).
"""

import dataclasses
import functools
import operator
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int8, Shaped

PADDING = -1

EMPTY, PARTIAL, FULL = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class MaskRule:
    """The static part of a mask.

    A query at position p sees positions from p - left to p + right (None: no bound)
    and, when causal, none after p.
    """

    is_causal: bool = False
    left: int | None = None
    right: int | None = None

    @property
    def before(self) -> int | None:
        """Largest distance to a key before a query; None means no bound."""
        return self.left

    @property
    def after(self) -> int | None:
        """Largest distance to a key after a query; None means no bound."""
        if not self.is_causal:
            return self.right
        return 0 if self.right is None else min(0, self.right)


def zero_padding(
    x: Shaped[Array, "B T N H"], segment_ids: Int[Array, "B T"]
) -> Shaped[Array, "B T N H"]:
    """`x` with zeros in padded tokens, so that a NaN or Inf there cannot get out.

    A mask alone does not keep it in: its weight of 0 times NaN is NaN.
    """
    padding = (segment_ids == PADDING)[..., None, None]
    return jnp.where(padding, jnp.zeros((), x.dtype), x)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The tokens from `start` to `stop` of a ring shard, in the order of a layout.

    The shard is known only from the positions, since it depends on device and step.

    Attributes:
      length: number of tokens in the whole shard.
    """

    layout: str
    ring_size: int
    length: int
    start: int
    stop: int


# A leaf of a pytree: an array or None, or in its place a shape, a sharding or a
# reference to memory.
Leaf = Any

if TYPE_CHECKING:
    Stretches = tuple[Stretch, ...]
else:
    # Without the type of the items: beartype checks random ones, which hypothesis
    # forbids.
    Stretches = tuple


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """The facts about a run of tokens that a mask needs.

    Attributes:
      positions: int32 [B, T], or [T] for a block of one row. B may be 1 for all rows.
      segment_ids: int32, shaped like `positions`, or None.
      stretches: the stretches that make up the run, in order, if the positions are
        those of a layout; for kernels that need masks before running.
    """

    positions: Leaf
    segment_ids: Leaf = None
    stretches: Stretches | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def cut(self, rows: slice) -> "Tokens":
        """Selects consecutive tokens out of [B, T]."""
        positions, ids = self.positions[:, rows], self.segment_ids
        ids = None if ids is None else ids[:, rows]
        if self.stretches is None:
            return Tokens(positions, ids)
        start, stop, _ = rows.indices(self.positions.shape[1])
        stretches, before = [], 0
        for stretch in self.stretches:
            origin = stretch.start - before
            first = max(stretch.start, origin + start)
            last = min(stretch.stop, origin + stop)
            if first < last:
                cut = dataclasses.replace(stretch, start=first, stop=last)
                stretches.append(cut)
            before += stretch.stop - stretch.start
        return Tokens(positions, ids, tuple(stretches))


def join(*runs: Tokens) -> Tokens:
    """Concatenates runs of tokens [B, T]."""
    facts = [(run.positions, run.segment_ids) for run in runs]
    positions, ids = jax.tree.map(lambda *xs: jnp.concatenate(xs, 1), *facts)
    stretches: list[Stretch] = []
    for run in runs:
        if run.stretches is None:
            return Tokens(positions, ids)
        stretches += run.stretches
    return Tokens(positions, ids, tuple(stretches))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """The mask of some queries against some keys.

    Attributes:
      tables: the result of the kernel's `Chunk.tables` for this mask; None lets the
        kernel make its tables where it runs.
    """

    rule: MaskRule = dataclasses.field(metadata={"static": True})
    q: Tokens
    kv: Tokens
    tables: Leaf = None

    @property
    def sees_all(self) -> bool:
        """True if it is known before running that nothing is masked."""
        return (
            self.rule.before is None
            and self.rule.after is None
            and self.q.segment_ids is None
        )

    def rows(self, rows: slice) -> "Mask":
        """The mask of some of the queries."""
        return Mask(self.rule, self.q.cut(rows), self.kv)


def visible(mask: Mask) -> Bool[Array, "*B T S"]:
    """Computes whether each query sees each key: [B, T], [B, S] -> [B, T, S].

    Leading axes are kept, so blocks of tokens [t], [s] give [t, s].
    """
    q = jax.tree.map(lambda x: x[..., :, None], mask.q)
    kv = jax.tree.map(lambda x: x[..., None, :], mask.kv)
    return sees(mask.rule, q, kv)


def sees(rule: MaskRule, q: Tokens, kv: Tokens) -> Bool[Array, "..."]:
    """Computes whether each query sees each key; the shapes of the tokens broadcast.

    Positions are read only if the rule bounds distances.
    """
    if rule.after is None and rule.before is None and q.segment_ids is None:
        shape = jnp.broadcast_shapes(q.positions.shape, kv.positions.shape)
        return jnp.ones(shape, bool)
    return functools.reduce(operator.and_, _conditions(rule, q, kv))


def _conditions(rule: MaskRule, q: Tokens, kv: Tokens) -> Iterator[jax.Array]:
    """Yields the conditions for a query to see a key."""
    # The bounds are shifted, not the distances compared: an operation for each query
    # and not for each pair.
    if rule.after is not None:
        yield kv.positions <= _shifted(q.positions, rule.after)
    if rule.before is not None:
        yield kv.positions >= _shifted(q.positions, -rule.before)
    if q.segment_ids is not None:
        # A query that is padding gets an id that no key has.
        is_padding = q.segment_ids == PADDING
        yield jnp.where(is_padding, PADDING - 1, q.segment_ids) == kv.segment_ids


def _shifted(positions: jax.Array, by: int) -> jax.Array:
    """`positions + by`, which stops at the ends of the dtype instead of wrapping."""
    ends = jnp.iinfo(positions.dtype)
    if by > 0:
        return jnp.minimum(positions, ends.max - by) + by
    if by < 0:
        return jnp.maximum(positions, ends.min - by) + by
    return positions


def block_kinds(mask: Mask, block_q: int, block_kv: int) -> Int8[Array, "B nq nk"]:
    """Classifies each block of (queries, keys) as EMPTY, PARTIAL or FULL.

    Uses each block's least and greatest position and segment id. EMPTY and FULL are
    certain; a PARTIAL block may happen to be empty or full. The lengths must be
    multiples of the block sizes.
    """
    rule = mask.rule
    q, kv = _extent(mask.q, block_q, 2), _extent(mask.kv, block_kv, 1)
    # The least and the greatest distance that a key can be ahead of a query.
    least, most = kv.first - q.last, kv.last - q.first
    some = jnp.ones(least.shape, bool)
    every = jnp.ones(least.shape, bool)
    if rule.after is not None:
        some &= least <= rule.after
        every &= most <= rule.after
    if rule.before is not None:
        some &= most >= -rule.before
        every &= least >= -rule.before
    if q.ids is not None and kv.ids is not None:
        a, b = q.ids, kv.ids
        overlap = (a.low <= b.high) & (b.low <= a.high)
        some = some & overlap & ~a.all_padding & ~b.all_padding
        same = (a.low == b.high) & (b.low == a.high)
        every = every & same & ~a.any_padding & ~b.any_padding
    return jnp.where(some, jnp.where(every, FULL, PARTIAL), EMPTY).astype(jnp.int8)


def block_lists(
    kinds: Int8[Array, "B nq nk"],
) -> tuple[Int[Array, "B nq"], Int[Array, "B nq nk"]]:
    """Counts each query block's nonempty key blocks, and lists key blocks, those first.

    Returns:
      The counts [B, nq], and the indices of the key blocks [B, nq, nk].
    """
    order = jnp.argsort(kinds == EMPTY, axis=-1, stable=True).astype(jnp.int32)
    return jnp.sum(kinds != EMPTY, axis=-1, dtype=jnp.int32), order


def pad_tokens(tokens: Tokens, padding: int, *, with_ids: bool) -> Tokens:
    """Appends `padding` tokens that nothing sees; `with_ids` always adds segment ids.

    They repeat the last position, so that they do not widen their block's extent.
    """
    ids = tokens.segment_ids
    if ids is None and (with_ids or padding):
        ids = jnp.zeros_like(tokens.positions)
    if ids is None or not padding:
        return Tokens(tokens.positions, ids)
    widths = ((0, 0), (0, padding))
    positions = jnp.pad(tokens.positions, widths, mode="edge")
    return Tokens(positions, jnp.pad(ids, widths, constant_values=PADDING))


@dataclasses.dataclass(frozen=True)
class _Ids:
    """Segment id bounds of each block, without padding, shaped like `_Extent`."""

    low: Int[Array, "..."]
    high: Int[Array, "..."]
    any_padding: Bool[Array, "..."]
    all_padding: Bool[Array, "..."]


@dataclasses.dataclass(frozen=True)
class _Extent:
    """Least and greatest positions of each block, broadcastable to [B, nq, nk]."""

    first: Int[Array, "..."]
    last: Int[Array, "..."]
    ids: _Ids | None


def _extent(tokens: Tokens, block: int, axis: int) -> _Extent:
    """The extents of the blocks of a run of tokens, with a 1 inserted at `axis`."""

    def blocks(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1, block)

    def outer(*facts: jax.Array) -> list[jax.Array]:
        return [jnp.expand_dims(fact, axis) for fact in facts]

    positions = blocks(tokens.positions)
    if tokens.segment_ids is None:
        first, last = outer(positions.min(-1), positions.max(-1))
        return _Extent(first, last, None)
    ids = blocks(tokens.segment_ids)
    padding = ids == PADDING
    greatest = jnp.iinfo(jnp.int32).max
    first, last, *of_ids = outer(
        positions.min(-1),
        positions.max(-1),
        jnp.where(padding, greatest, ids).min(-1),
        jnp.where(padding, -1, ids).max(-1),
        padding.any(-1),
        padding.all(-1),
    )
    return _Extent(first, last, _Ids(*of_ids))

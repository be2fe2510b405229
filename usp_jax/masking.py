"""Masks as data: who may see whom, token by token and block by block.

A token is visible when four facts allow it: its order (causal), its distance (window),
its document (segment) and that neither side is padding. All four are one function of
(query position, key position, query segment, key segment); kernels know no other.

nq and nk are numbers of blocks; the batch axis of positions may be 1 (same for all).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Int8

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
        """How far back a query sees."""
        return self.left

    @property
    def after(self) -> int | None:
        """How far ahead a query sees."""
        if not self.is_causal:
            return self.right
        return 0 if self.right is None else min(0, self.right)


@dataclasses.dataclass(frozen=True)
class Stretch:
    """The tokens from `start` to `stop` of a ring shard, in the order of a layout.

    Of which shard, only their positions say: devices and steps differ in that.

    Attributes:
      length: the number of tokens of the whole shard.
    """

    layout: str
    ring_size: int
    length: int
    start: int
    stop: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """What a mask asks of a run of tokens: its order and, if given, its documents.

    Attributes:
      positions: int32 [B, T], or [T] for one row's block; B may be 1 for all rows.
      segment_ids: the same of documents, or None.
      stretches: Stretch (...), where the tokens come from, one after the other, if
        their positions are those of a layout; for kernels that need to know masks
        before running.
    """

    # A pytree's leaves are whatever jax puts there, so they have no array type.
    positions: Any
    segment_ids: Any = None
    # Without its items' type: checkers look at random ones, which hypothesis forbids.
    stretches: tuple[Any, ...] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    def cut(self, rows: slice) -> "Tokens":
        """Some of the tokens [B, T], which stand one after the other."""
        facts: Any = (self.positions, self.segment_ids)
        facts = jax.tree.map(lambda x: x[:, rows], facts)
        if self.stretches is None:
            return Tokens(*facts)
        start, stop, _ = rows.indices(self.positions.shape[1])
        stretches, before = [], 0
        for one in self.stretches:
            origin = one.start - before
            first, last = max(one.start, origin + start), min(one.stop, origin + stop)
            if first < last:
                cut = dataclasses.replace(one, start=first, stop=last)
                stretches.append(cut)
            before += one.stop - one.start
        return Tokens(*facts, tuple(stretches))  # type: ignore[call-arg]


def join(*runs: Tokens) -> Tokens:
    """Runs of tokens [B, T], one after the other."""
    facts: Any = [(run.positions, run.segment_ids) for run in runs]
    facts = jax.tree.map(lambda *xs: jnp.concatenate(xs, 1), *facts)
    if any(run.stretches is None for run in runs):
        return Tokens(*facts)
    return Tokens(*facts, sum((run.stretches or () for run in runs), ()))  # type: ignore[call-arg]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys each query sees."""

    rule: MaskRule = dataclasses.field(metadata={"static": True})
    q: Tokens
    kv: Tokens

    @property
    def sees_all(self) -> bool:
        """Whether it is known before running that nothing is masked."""
        return (
            self.rule.before is None
            and self.rule.after is None
            and self.q.segment_ids is None
        )

    def rows(self, rows: slice) -> "Mask":
        """The mask of some of the queries."""
        return dataclasses.replace(self, q=self.q.cut(rows))


def visible(mask: Mask) -> Bool[Array, "*B T S"]:
    """Whether each query sees each key: [B, T], [B, S] -> [B, T, S].

    Leading axes are carried along, so a block of tokens [t] gives [t, s].
    """
    q = jax.tree.map(lambda x: x[..., :, None], mask.q)
    kv = jax.tree.map(lambda x: x[..., None, :], mask.kv)
    return sees(mask.rule, q, kv)


def sees(rule: MaskRule, q: Tokens, kv: Tokens) -> Bool[Array, "..."]:
    """Whether each query sees each key, of tokens whose shapes broadcast together.

    Positions are read only if the rule bounds distances.
    """
    seen = None
    if rule.after is not None or rule.before is not None:
        ahead = kv.positions - q.positions
        if rule.after is not None:
            seen = _both(seen, ahead <= rule.after)
        if rule.before is not None:
            seen = _both(seen, ahead >= -rule.before)
    if q.segment_ids is not None:
        seen = _both(seen, q.segment_ids == kv.segment_ids)
        seen = _both(seen, q.segment_ids != PADDING)
    if seen is None:
        shape = jnp.broadcast_shapes(q.positions.shape, kv.positions.shape)
        return jnp.ones(shape, bool)
    return seen  # type: ignore[return-value]


def _both(
    a: jax.Array | np.ndarray | None, b: jax.Array | np.ndarray
) -> jax.Array | np.ndarray:
    return b if a is None else a & b


def block_kinds(mask: Mask, block_q: int, block_kv: int) -> Int8[Array, "B nq nk"]:
    """Whether each block of (queries, keys) is EMPTY, PARTIAL or FULL.

    Read from each block's least and greatest position and segment id. FULL is certain;
    a block called PARTIAL may happen to be empty or full. The lengths must be multiples
    of the block sizes.
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
    if mask.q.segment_ids is not None:
        overlap = (q.low <= kv.high) & (kv.low <= q.high)  # type: ignore[operator]
        some = some & overlap & ~q.all_padding & ~kv.all_padding  # type: ignore[operator]
        one = (q.low == kv.high) & (kv.low == q.high)
        every = every & one & ~q.any_padding & ~kv.any_padding  # type: ignore[operator]
    return jnp.where(some, jnp.where(every, FULL, PARTIAL), EMPTY).astype(jnp.int8)


def block_lists(
    kinds: Int8[Array, "B nq nk"],
) -> tuple[Int[Array, "B nq"], Int[Array, "B nq nk"]]:
    """For each block of queries how many key blocks are not empty, and those first."""
    order = jnp.argsort(kinds == EMPTY, axis=-1, stable=True).astype(jnp.int32)
    return jnp.sum(kinds != EMPTY, axis=-1, dtype=jnp.int32), order


def pad_tokens(tokens: Tokens, padding: int, *, with_ids: bool) -> Tokens:
    """Appends `padding` tokens that nothing sees; `with_ids` makes ids if need be.

    They repeat the last position, so that they do not widen their block's extent.
    """
    ids = tokens.segment_ids
    if ids is None and with_ids:
        ids = jnp.zeros_like(tokens.positions)
    if not padding:
        return Tokens(tokens.positions, ids)
    widths = ((0, 0), (0, padding))
    positions = jnp.pad(tokens.positions, widths, mode="edge")
    return Tokens(positions, jnp.pad(ids, widths, constant_values=PADDING))


@dataclasses.dataclass(frozen=True)
class _Extent:
    """Least and greatest values of each block, shaped to broadcast to [B, nq, nk]."""

    first: Int[Array, "..."]
    last: Int[Array, "..."]
    low: Int[Array, "..."] | None = None
    high: Int[Array, "..."] | None = None
    any_padding: Bool[Array, "..."] | None = None
    all_padding: Bool[Array, "..."] | None = None


def _extent(tokens: Tokens, block: int, axis: int) -> _Extent:
    """The extents of the blocks of a run of tokens; `axis` is where 1 is inserted."""

    def blocks(x: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
        return x.reshape(x.shape[0], -1, block)

    positions = blocks(tokens.positions)
    if tokens.segment_ids is None:
        facts: tuple[Any, ...] = (positions.min(-1), positions.max(-1))
    else:
        ids = blocks(tokens.segment_ids)
        padding = ids == PADDING
        greatest = jnp.iinfo(jnp.int32).max
        facts = (
            positions.min(-1),
            positions.max(-1),
            jnp.where(padding, greatest, ids).min(-1),
            jnp.where(padding, -1, ids).max(-1),
            padding.any(-1),
            padding.all(-1),
        )
    return _Extent(*(jnp.expand_dims(fact, axis) for fact in facts))

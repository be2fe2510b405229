"""Work of the ring's shards, counted in visible pairs, and how even it is.

Tokens may be in any order. W[r, s] is the number of visible pairs of queries of shard r
and keys of shard s, and R the number of shards. At step i of the ring, shard r meets
the keys of shard r - i. Two figures measure how even the work is, each 1 at best:

* totals: the work of the busiest shard, over the mean work of a shard.
* path: sum over i of max over r of W[r, r - i], over the mean work of a shard. This is
  the time of the ring if every step waits for its slowest shard.

All of it is numpy, on the host.
"""

import dataclasses

import numpy as np
from jaxtyping import Int64

from usp_jax import arguments
from usp_jax.checks import check_count
from usp_jax.masking import PADDING, MaskRule


@dataclasses.dataclass(frozen=True, eq=False)
class RingWork:
    """The work of each ring shard, by the shard of the keys.

    Attributes:
      pairs: int64 [R, R], the number of visible pairs of queries of shard r and keys of
        shard s.
    """

    pairs: Int64[np.ndarray, "R R"]

    @property
    def totals(self) -> float:
        """Pairs of the busiest shard over the mean of a shard; 1 if there are none."""
        return self._over_mean(self.pairs.sum(1).max())

    @property
    def path(self) -> float:
        """Sum over steps of the most pairs of a shard, over the mean of a shard."""
        return self._over_mean(by_step(self.pairs).max(1).sum())

    def _over_mean(self, pairs: np.integer) -> float:
        total = self.pairs.sum()
        return float(pairs * len(self.pairs) / total) if total else 1.0


def ring_balance(
    positions: np.ndarray,
    segment_ids: np.ndarray | None,
    ring: int,
    *,
    is_causal: bool = True,
    local_window_size: int | tuple[int | None, int | None] | None = None,
) -> RingWork:
    """Counts the visible pairs of every two ring shards, for tokens in any order.

    Args:
      positions: integers [T] in stored order, for a layout those of
        `usp_jax.layout_positions`.
      segment_ids: integers [T] in stored order, -1 for padding; None means one
        document.
      ring: number of ring shards, which must divide T.
      is_causal: as in `usp_attention`.
      local_window_size: as in `usp_attention`.

    Returns:
      The counts, a `RingWork`.

    Raises:
      ValueError: an argument has the wrong type, or lengths differ or do not divide.
    """
    rule = arguments.mask_rule(is_causal, local_window_size)
    check_count("ring", ring, least=1)
    positions = _row_of("positions", positions)
    ids = np.zeros_like(positions)
    if segment_ids is not None:
        ids = _row_of("segment_ids", segment_ids)
    if len(ids) != len(positions):
        raise ValueError(
            f"segment_ids has {len(ids)} tokens, it must have the {len(positions)} of "
            "positions"
        )
    if len(positions) % ring:
        raise ValueError(f"{len(positions)} tokens must be a multiple of {ring=}")
    shards = np.repeat(np.arange(ring), len(positions) // ring)
    real = ids != PADDING
    return RingWork(_pairs(positions[real], ids[real], shards[real], ring, rule))


def _pairs(
    positions: np.ndarray,
    ids: np.ndarray,
    shards: np.ndarray,
    ring: int,
    rule: MaskRule,
) -> np.ndarray:
    """Counts visible pairs, int64 [R, R], of tokens without padding."""
    pairs = np.zeros((ring, ring), np.int64)
    if not len(positions):
        return pairs
    positions = positions - positions.min()
    span = positions.max() + 1
    natural = np.lexsort((positions, ids))
    positions, ids, shards = positions[natural], ids[natural], shards[natural]
    # A query sees a consecutive run of the keys on this line.
    line = ids * span + positions
    last = span - 1 if rule.after is None else np.minimum(positions + rule.after, span)
    first = 0 if rule.before is None else np.maximum(positions - rule.before, 0)
    stop = np.searchsorted(line, ids * span + np.minimum(last, span - 1), side="right")
    start = np.searchsorted(line, ids * span + first, side="left")
    count = np.zeros(len(line) + 1, np.int64)
    for s in range(ring):
        np.cumsum(shards == s, out=count[1:])
        seen = count[stop] - count[start]
        pairs[:, s] = np.bincount(shards, weights=seen, minlength=ring)
    return pairs


def by_step(pairs: np.ndarray) -> np.ndarray:
    """W [R, R] indexed by (query shard, key shard) -> by (step, query shard)."""
    r = np.arange(len(pairs))
    return pairs[r[None], (r[None] - r[:, None]) % len(pairs)]


def _row_of(name: str, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x)
    if x.ndim != 1 or not np.issubdtype(x.dtype, np.integer):
        raise ValueError(f"{name} is {x.dtype}{list(x.shape)}, it must be integers [T]")
    return x.astype(np.int64)

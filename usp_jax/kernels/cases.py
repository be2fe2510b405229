"""The static cases of a mask whose layout is known at trace time.

Some kernels take no mask as data: each query sees every key, or those in a band around
a diagonal. The positions of a ring shard form a few increasing runs, so what its
queries see of another shard is a few such bands. With a causal mask and zigzag it is
one: a shard sees itself causally; it sees half of the keys of an earlier shard; and
half of its queries see a later shard.

The two shards of a mask depend on the device and the ring step. Each pair of shards has
a case, which is looked up at run time by the first positions of the mask.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from usp_jax.kernels.bands import Block, Rows, Span
from usp_jax.layout import shard_runs
from usp_jax.masking import Mask, Stretch, Stretches, Tokens

WHOLE = slice(None)


Case = tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Cases:
    """The possible cases of one stretch of queries and one of keys.

    Attributes:
      each: the cases; one may have no block.
      which: the index in `each` of the case that applies.
    """

    each: tuple[Case, ...]
    which: Int[Array, ""] | int


def static_cases(mask: Mask) -> tuple[Cases, ...] | None:
    """Returns the cases of a mask, which does not hide documents or padding yet.

    Returns:
      One `Cases` for each pair of stretches, whose blocks cover each visible pair once;
        or None where the cases are not static: positions that do not come from a
        layout, or layouts with different strides.
    """
    if mask.rule.before is None and mask.rule.after is None:
        return (Cases(((Block(WHOLE, WHOLE),),), 0),)
    if mask.q.stretches is None or mask.kv.stretches is None:
        return None
    cases = []
    for q, q_start in _placed(mask.q.stretches):
        for kv, kv_start in _placed(mask.kv.stretches):
            table = _table(q, kv, mask.rule.before, mask.rule.after)
            if table is None:
                return None
            each = tuple(
                tuple(block.moved(q_start, kv_start) for block in case)
                for case in table.cases
            )
            which: Int[Array, ""] | int = 0
            if len(each) > 1:
                row = _shard_of(mask.q, q_start, table.q_firsts)
                column = _shard_of(mask.kv, kv_start, table.kv_firsts)
                which = jnp.asarray(table.index)[row, column]
            cases.append(Cases(each, which))
    return tuple(cases)


def _placed(stretches: Stretches) -> Iterator[tuple[Stretch, int]]:
    """Yields each stretch and the index of its first token."""
    start = 0
    for stretch in stretches:
        yield stretch, start
        start += stretch.stop - stretch.start


def _shard_of(tokens: Tokens, start: int, firsts: np.ndarray) -> jax.Array:
    """Finds the shard whose stretch begins at token `start`."""
    return jnp.argmax(jnp.asarray(firsts) == tokens.positions[0, start])


@dataclasses.dataclass(frozen=True)
class _Table:
    """The cases of two stretches for each pair of shards.

    Attributes:
      cases: the distinct cases.
      index: [R, R], the index of the case for the queries of one shard and the keys of
        another.
      q_firsts: [R], the first position of the stretch of queries in each shard.
      kv_firsts: [R], the first position of the stretch of keys in each shard.
    """

    cases: tuple[Case, ...]
    index: np.ndarray
    q_firsts: np.ndarray
    kv_firsts: np.ndarray


@functools.cache
def _table(
    q: Stretch, kv: Stretch, before: int | None, after: int | None
) -> _Table | None:
    q_runs, kv_runs = _runs(q), _runs(kv)
    index = np.zeros((len(q_runs), len(kv_runs)), np.int32)
    cases = []
    for place in np.ndindex(index.shape):
        case = _case(q_runs[place[0]], kv_runs[place[1]], before, after)
        if case is None:
            return None
        if case not in cases:
            cases.append(case)
        index[place] = cases.index(case)
    firsts = (
        np.asarray([runs[0].first for runs in side], np.int32)
        for side in (q_runs, kv_runs)
    )
    return _Table(tuple(cases), index, *firsts)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Consecutive tokens of a stretch whose positions grow by `stride`."""

    start: int
    count: int
    first: int
    stride: int

    @property
    def last(self) -> int:
        return self.first + (self.count - 1) * self.stride


def _runs(stretch: Stretch) -> list[list[_Run]]:
    """Returns the runs of a stretch in each shard, in order."""
    shards = shard_runs(stretch.layout, stretch.ring_size, stretch.length)
    return [
        [run for run in (_part(stretch, *map(int, x)) for x in runs) if run.count > 0]
        for runs in shards
    ]


def _part(stretch: Stretch, start: int, count: int, first: int, stride: int) -> _Run:
    """Returns the part of a shard's run that lies within a stretch."""
    skipped = max(stretch.start - start, 0)
    stop = min(stretch.stop, start + count)
    count = stop - start - skipped
    place = start + skipped - stretch.start
    return _Run(place, count, first + skipped * stride, stride)


def _case(
    q_runs: list[_Run], kv_runs: list[_Run], before: int | None, after: int | None
) -> Case | None:
    """Returns the visible blocks. Positions grow, so a query sees consecutive keys.

    Returns None if the first or the last key seen changes somewhere, but not by one
    per row.
    """
    bands: list[Rows] = []
    for run in q_runs:
        turns = _turns(run, kv_runs, before, after)
        for row, stop in zip(turns, turns[1:], strict=False):
            ends = row, stop - 1
            hidden = Span(*(_hidden(run, i, kv_runs, before) for i in ends))
            seen = Span(*(_seen(run, i, kv_runs, after) for i in ends))
            if not {hidden.growth, seen.growth} <= {0, stop - 1 - row}:
                return None
            rows = Rows(run.start + row, stop - row, hidden, seen).nonempty()
            if rows is None:
                continue
            joined = bands[-1].joined(rows) if bands else None
            bands[-1:] = [*bands[-1:], rows] if joined is None else [joined]
    return tuple(band.block() for band in bands)


def _turns(
    run: _Run, kv_runs: list[_Run], before: int | None, after: int | None
) -> list[int]:
    """Returns the rows between which the keys seen start or stop to change, in order.

    Between two of them, the first and the last key seen are constant or grow by one
    per row.
    """
    reaches = [] if after is None else [after]
    reaches += [] if before is None else [-before - 1]
    rows = {0, run.count}
    for kv in kv_runs:
        for reach in reaches:
            starts = -(-(kv.first - reach - run.first) // run.stride)
            ends = -(-(kv.last - reach - run.first) // run.stride) + 1
            rows |= {min(max(row, 0), run.count) for row in (starts, ends)}
    return sorted(rows)


def _seen(run: _Run, row: int, kv_runs: list[_Run], after: int | None) -> int:
    """Returns the number of keys up to the last one that a query sees."""
    if after is None:
        return sum(kv.count for kv in kv_runs)
    ahead = run.first + row * run.stride + after
    counts = ((ahead - kv.first) // kv.stride + 1 for kv in kv_runs)
    return sum(min(max(n, 0), kv.count) for n, kv in zip(counts, kv_runs, strict=True))


def _hidden(run: _Run, row: int, kv_runs: list[_Run], before: int | None) -> int:
    """Returns the number of keys before the first one that a query sees."""
    return 0 if before is None else _seen(run, row, kv_runs, -before - 1)

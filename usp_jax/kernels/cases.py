"""The static cases of a mask whose layout is known at trace time.

Some kernels support only two masks: every query sees every key, or row i of a square
sees keys 0 to i. The positions of a ring shard form a few increasing runs, so what its
queries see of another shard is a staircase of a few such blocks. With zigzag it is one
block: a shard sees itself causally; it sees half of the keys of an earlier shard; and
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

from usp_jax.layout import shard_runs
from usp_jax.masking import Mask, Stretch, Stretches, Tokens

WHOLE = slice(None)


@dataclasses.dataclass(frozen=True)
class Block:
    """A range of queries that sees a range of keys.

    Attributes:
      q: the range of queries.
      kv: the range of keys.
      is_causal: whether row i sees keys 0 to i (with as many keys as queries); if not,
        all queries see all keys.
    """

    q: slice
    kv: slice
    is_causal: bool

    def moved(self, q: int, kv: int) -> "Block":
        """Returns the block shifted by `q` queries and `kv` keys."""
        return Block(_moved(self.q, q), _moved(self.kv, kv), self.is_causal)


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
    """Returns the cases of a mask; their blocks cover each visible pair once.

    Returns:
      One `Cases` for each pair of stretches, or None where the cases are not static:
        segment ids, the left bound of a window, positions that do not come from a
        layout, or layouts with different strides.
    """
    if mask.sees_all:
        return (Cases(((Block(WHOLE, WHOLE, False),),), 0),)
    if mask.q.segment_ids is not None or mask.rule.before is not None:
        return None
    if mask.q.stretches is None or mask.kv.stretches is None:
        return None
    cases = []
    for q, q_start in _placed(mask.q.stretches):
        for kv, kv_start in _placed(mask.kv.stretches):
            table = _table(q, kv, mask.rule.after)
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
def _table(q: Stretch, kv: Stretch, after: int) -> _Table | None:
    q_runs, kv_runs = _runs(q), _runs(kv)
    index = np.zeros((len(q_runs), len(kv_runs)), np.int32)
    cases = []
    for place in np.ndindex(index.shape):
        case = _case(q_runs[place[0]], kv_runs[place[1]], after)
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


def _case(q_runs: list[_Run], kv_runs: list[_Run], after: int) -> Case | None:
    """Returns the visible blocks: positions grow, so a query sees a prefix of the keys.

    Returns None if the number of keys seen grows somewhere, but not by one per row.
    """
    stairs: list[_Step] = []
    for run in q_runs:
        # Between two of these rows the number of keys seen is constant or grows by one.
        ends_of_rows = {0, run.count}
        for kv in kv_runs:
            starts = -(-(kv.first - after - run.first) // run.stride)
            ends = -(-(kv.last - after - run.first) // run.stride) + 1
            ends_of_rows |= {min(max(row, 0), run.count) for row in (starts, ends)}
        rows = sorted(ends_of_rows)
        for row, stop in zip(rows, rows[1:], strict=False):
            seen, last = (_seen(run, i, kv_runs, after) for i in (row, stop - 1))
            grows = last > seen
            if grows and last - seen != stop - 1 - row:
                return None
            _add(stairs, _Step(run.start + row, stop - row, seen, grows))
    return tuple(block for step in stairs for block in step.blocks())


def _seen(run: _Run, row: int, kv_runs: list[_Run], after: int) -> int:
    """Returns the number of keys that a query sees."""
    ahead = run.first + row * run.stride + after
    counts = ((ahead - kv.first) // kv.stride + 1 for kv in kv_runs)
    return sum(min(max(n, 0), kv.count) for n, kv in zip(counts, kv_runs, strict=True))


@dataclasses.dataclass(frozen=True)
class _Step:
    """Consecutive rows of queries that form one step of the staircase.

    Attributes:
      seen: the number of keys that the first row sees.
      grows: whether each further row sees one key more than the row before it.
    """

    row: int
    count: int
    seen: int
    grows: bool

    @property
    def next(self) -> tuple[int, int]:
        """The row after these, and the keys it sees if it continues the step."""
        return self.row + self.count, self.seen + self.count * self.grows

    def blocks(self) -> Iterator[Block]:
        rows = slice(self.row, self.row + self.count)
        prefix = self.seen - self.grows
        if prefix:
            yield Block(rows, slice(0, prefix), False)
        if self.grows:
            yield Block(rows, slice(prefix, prefix + self.count), True)


def _add(stairs: list[_Step], step: _Step) -> None:
    """Appends a step, or extends the last one."""
    before = stairs[-1] if stairs else None
    start = step.grows, (step.row, step.seen)
    if before is not None and (before.grows, before.next) == start:
        count = before.count + step.count
        stairs[-1] = dataclasses.replace(before, count=count)
    else:
        stairs.append(step)


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)

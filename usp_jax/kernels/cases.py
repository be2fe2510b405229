"""What a mask can turn out to be, where its layout tells that before running.

Some kernels know two masks only: every query sees every key, or row i of a square sees
keys 0 to i. The positions of a ring shard are a few runs, in order; so what its queries
see of another shard is a staircase of a few such blocks. Zigzag's are one each: the
own shard causally; half of an earlier shard's keys; half of the queries a later one's.
Of which two shards a mask is, differs by device and step: each pair of them has its
case, and which one it is, is looked up while running, by its positions.
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
    """Some of the queries that see some of the keys.

    Attributes:
      is_causal: row i sees keys 0 to i, of as many keys as queries; else all.
    """

    q: slice
    kv: slice
    is_causal: bool

    def moved(self, q: int, kv: int) -> "Block":
        """The block of queries and keys that stand further on."""
        return Block(_moved(self.q, q), _moved(self.kv, kv), self.is_causal)


Case = tuple[Block, ...]


@dataclasses.dataclass(frozen=True)
class Cases:
    """The cases of one stretch of queries and one of keys; a case may have no block.

    Attributes:
      which: the place in `each` of the case that it is.
    """

    each: tuple[Case, ...]
    which: Int[Array, ""] | int


def static_cases(mask: Mask) -> tuple[Cases, ...] | None:
    """The cases of a mask, whose blocks together are all that is seen, each once.

    None where it is not known before running what they are: segment ids, a window's
    left bound, positions that are no layout's, or layouts with unlike strides.
    """
    if mask.sees_all:
        return (Cases(((Block(WHOLE, WHOLE, False),),), 0),)
    if mask.q.segment_ids is not None or mask.rule.before is not None:
        return None
    if mask.q.stretches is None or mask.kv.stretches is None:
        return None
    found = []
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
            found.append(Cases(each, which))
    return tuple(found)


def _placed(stretches: Stretches) -> Iterator[tuple[Stretch, int]]:
    """Each stretch, and where it stands."""
    start = 0
    for stretch in stretches:
        yield stretch, start
        start += stretch.stop - stretch.start


def _shard_of(tokens: Tokens, start: int, firsts: np.ndarray) -> jax.Array:
    """Which shard's stretch it is that begins at `start`."""
    return jnp.argmax(jnp.asarray(firsts) == tokens.positions[0, start])


@dataclasses.dataclass(frozen=True)
class _Table:
    """The cases of two stretches of any shards.

    Attributes:
      index: [R, R], the case of queries of one shard and keys of another.
      q_firsts, kv_firsts: [R], the first position of the stretch in each shard.
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
    """Tokens in a row of a stretch, whose positions grow by `stride`."""

    start: int
    count: int
    first: int
    stride: int

    @property
    def last(self) -> int:
        return self.first + (self.count - 1) * self.stride


def _runs(stretch: Stretch) -> list[list[_Run]]:
    """The runs of the stretch in each shard, one after the other."""
    shards = shard_runs(stretch.layout, stretch.ring_size, stretch.length)
    return [
        [run for run in (_part(stretch, *map(int, x)) for x in runs) if run.count > 0]
        for runs in shards
    ]


def _part(stretch: Stretch, start: int, count: int, first: int, stride: int) -> _Run:
    """What a stretch has of a run of the shard."""
    skipped = max(stretch.start - start, 0)
    stop = min(stretch.stop, start + count)
    count = stop - start - skipped
    place = start + skipped - stretch.start
    return _Run(place, count, first + skipped * stride, stride)


def _case(q_runs: list[_Run], kv_runs: list[_Run], after: int) -> Case | None:
    """The blocks that are seen; positions grow, so each query sees the first keys."""
    stairs: list[_Step] = []
    for run in q_runs:
        # Between two of these rows the number of keys seen stays, or grows by one.
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
    """How many keys a query sees."""
    ahead = run.first + row * run.stride + after
    counts = ((ahead - kv.first) // kv.stride + 1 for kv in kv_runs)
    return sum(min(max(n, 0), kv.count) for n, kv in zip(counts, kv_runs, strict=True))


@dataclasses.dataclass(frozen=True)
class _Step:
    """Rows of queries; the first sees `seen` keys, each further one as many or more."""

    row: int
    count: int
    seen: int
    grows: bool

    @property
    def next(self) -> tuple[int, int]:
        """The row after these and what it sees if it goes on as they do."""
        return self.row + self.count, self.seen + self.count * self.grows

    def blocks(self) -> Iterator[Block]:
        rows = slice(self.row, self.row + self.count)
        every = self.seen - self.grows
        if every:
            yield Block(rows, slice(0, every), False)
        if self.grows:
            yield Block(rows, slice(every, every + self.count), True)


def _add(stairs: list[_Step], step: _Step) -> None:
    """Appends a step, or makes the last one longer."""
    before = stairs[-1] if stairs else None
    here = step.grows, (step.row, step.seen)
    if before is not None and (before.grows, before.next) == here:
        count = before.count + step.count
        stairs[-1] = dataclasses.replace(before, count=count)
    else:
        stairs.append(step)


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)

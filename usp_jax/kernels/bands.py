"""Bands of visible keys: what kernels without a mask as data can be called for.

A `Block` is one call: a range of queries, a range of keys, and the band between two
diagonals that they see. A staircase of `Rows` joins into few blocks. `squares` cuts a
block for kernels whose band must begin or end at the diagonal of a square.
"""

import dataclasses
from collections.abc import Iterator

# (left, right): with n queries and m keys, row i sees keys i + m - n - left to
# i + m - n + right; None is no bound.
Window = tuple[int | None, int | None]


@dataclasses.dataclass(frozen=True)
class Block:
    """A range of queries that sees a band of a range of keys.

    Row i sees keys i - before to i + after, counted from the first query and the first
    key of the block. Every row sees at least one key. A block with neither bound is
    full; a square with after=0 and no other bound is causal.

    Attributes:
      q: the range of queries.
      kv: the range of keys.
      before: the bound on keys before the diagonal, at least 0; None means no bound.
      after: the bound on keys after the diagonal, at least 0; None means no bound.
    """

    q: slice
    kv: slice
    before: int | None = None
    after: int | None = None

    @property
    def is_full(self) -> bool:
        """Whether every query sees every key."""
        return self.before is None and self.after is None

    @property
    def window(self) -> Window:
        """The bounds (left, right) counted from the last query and the last key.

        Of n queries and m keys, row i sees keys i + m - n - left to i + m - n + right.
        This is how FlashAttention counts. Neither bound is negative.
        """
        if self.is_full:
            return None, None
        ahead = _length(self.kv) - _length(self.q)
        left = None if self.before is None else self.before + ahead
        return left, None if self.after is None else self.after - ahead

    def moved(self, q: int, kv: int) -> "Block":
        """Returns the block shifted by `q` queries and `kv` keys."""
        return dataclasses.replace(self, q=_moved(self.q, q), kv=_moved(self.kv, kv))

    def part(self, rows: slice, keys: slice, before: int | None = None) -> "Block":
        """Returns a block of some of the rows and keys, without a bound after.

        A bound before that hides nothing of the part is left out.
        """
        if before is not None and before >= rows.stop - rows.start - 1:
            before = None
        start, first = self.q.start, self.kv.start
        return Block(_moved(rows, start), _moved(keys, first), before)


def squares(block: Block) -> Iterator[Block]:
    """Cuts a block into full ones and squares with a bound at their diagonal.

    Yields:
      Blocks that are full, or have as many keys as queries and (before, after) of
        (None, 0), (a number, 0) or (0, None).
    """
    n, m = (_length(block.q), _length(block.kv)) if not block.is_full else (0, 0)
    before, after = block.before, block.after
    if after is not None:
        # The first `rows` rows see one key more than the row before them. The last of
        # those keys are a square, the first `after` ones have no bound after.
        rows = min(n, m - after)
        square = block.part(slice(0, rows), slice(after, after + rows))
        if before is not None and before + after < rows - 1:
            square = dataclasses.replace(square, before=before + after)
        yield dataclasses.replace(square, after=0)
        reach = rows if before is None else min(rows, before + after)
        if after and reach:
            yield from squares(block.part(slice(0, reach), slice(0, after), before))
        if rows < n:
            start = 0 if before is None else max(0, rows - before)
            left = None if before is None else before - rows + start
            rest = block.part(slice(rows, n), slice(start, m), left)
            yield from squares(rest)
    elif before:
        # The first rows see all keys.
        yield block.part(slice(0, before), slice(0, m))
        rest = block.part(slice(before, n), slice(0, m), 0)
        yield from squares(rest)
    elif before == 0 and n < m:
        square = block.part(slice(0, n), slice(0, n), 0)
        yield square
        yield block.part(slice(0, n), slice(n, m))
    else:
        yield block


@dataclasses.dataclass(frozen=True)
class Span:
    """A number at the first and at the last of some rows."""

    start: int
    stop: int

    @property
    def growth(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Rows:
    """Consecutive rows of queries that see consecutive keys.

    Attributes:
      start: the first row.
      count: number of rows.
      hidden: the number of keys before the first one that is seen. From row to row it
        is constant, and then grows by one.
      seen: the number of keys up to the last one that is seen. From row to row it grows
        by one, and then is constant.
    """

    start: int
    count: int
    hidden: Span
    seen: Span

    def nonempty(self) -> "Rows | None":
        """Returns the rows that see a key, of rows where each number has one slope."""
        first = self.seen.start - self.hidden.start
        last = self.seen.stop - self.hidden.stop
        if first <= 0 and last <= 0:
            return None
        skipped, dropped = max(0, 1 - first), max(0, 1 - last)
        return self._cut(skipped, self.count - dropped)

    def _cut(self, start: int, stop: int) -> "Rows":
        def cut(x: Span) -> Span:
            slope = int(x.growth > 0)
            return Span(x.start + slope * start, x.start + slope * (stop - 1))

        if (start, stop) == (0, self.count):
            return self
        return Rows(self.start + start, stop - start, cut(self.hidden), cut(self.seen))

    def joined(self, other: "Rows") -> "Rows | None":
        """Returns these rows and the next ones, or None if they are not one band.

        Args:
          other: rows where each number has one slope.
        """
        if self.start + self.count != other.start:
            return None
        hides = [other.hidden.start - self.hidden.stop]
        sees = [other.seen.start - self.seen.stop]
        if self.count > 1:
            hides.insert(0, int(self.hidden.growth > 0))
            sees.insert(0, int(self.seen.growth == self.count - 1))
        if other.count > 1:
            hides.append(int(other.hidden.growth > 0))
            sees.append(int(other.seen.growth > 0))
        if not {*hides, *sees} <= {0, 1}:
            return None
        if hides != sorted(hides) or sees != sorted(sees, reverse=True):
            return None
        return Rows(
            self.start,
            self.count + other.count,
            Span(self.hidden.start, other.hidden.stop),
            Span(self.seen.start, other.seen.stop),
        )

    def block(self) -> Block:
        """Returns the block of these rows."""
        keys = slice(self.hidden.start, self.seen.stop)
        before = after = None
        if self.hidden.growth:
            before = self.count - 1 - self.hidden.growth
        if self.seen.growth:
            after = self.seen.start - 1 - self.hidden.start
        return Block(slice(self.start, self.start + self.count), keys, before, after)


def _length(part: slice) -> int:
    return part.stop - part.start


def _moved(part: slice, by: int) -> slice:
    return slice(part.start + by, part.stop + by)

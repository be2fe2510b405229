"""The order of a model's layers: runs of equal layers, and periods of runs.

Gemma 3 with 26 layers, w windowed and f full, as `segments` returns it:

    wwwwwf wwwwwf wwwwwf wwwwwf ww
    Segment(4, (Run("w", 5), Run("f", 1))), Segment(1, (Run("w", 2),))

"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
# Something for each run of each segment.
PerRun = tuple[tuple[T, ...], ...]


@dataclasses.dataclass(frozen=True)
class Run:
    """Consecutive layers of one kind."""

    kind: str
    count: int


@dataclasses.dataclass(frozen=True)
class Segment:
    """Runs of layers, in order, and how often they are repeated."""

    repeats: int
    runs: tuple[Run, ...]


@functools.lru_cache(maxsize=1024)
def segments(kinds: tuple[str, ...]) -> tuple[Segment, ...]:
    """Splits layers into head layers, repeats of a period, and tail layers.

    Of all ways, it returns the one with the fewest runs.

    Args:
      kinds: the kind of each layer, at least one.
    """
    best = _cut(kinds, 0, 0)
    for head in range(len(kinds)):
        for period in range(2, (len(kinds) - head) // 2 + 1):
            found = _cut(kinds, head, period)
            if _size(found) < _size(best):
                best = found
    return best


def _cut(kinds: tuple[str, ...], head: int, period: int) -> tuple[Segment, ...]:
    """Splits layers at a head and a period; a period of 0 is none."""
    if period == 0:
        return (Segment(1, _runs(kinds)),)
    repeats, start = 1, head
    unit = kinds[head : head + period]
    while kinds[start + period : start + 2 * period] == unit:
        repeats, start = repeats + 1, start + period
    parts = ((1, kinds[:head]), (repeats, unit), (1, kinds[start + period :]))
    return tuple(Segment(n, _runs(part)) for n, part in parts if part)


def _runs(kinds: Sequence[str]) -> tuple[Run, ...]:
    groups = itertools.groupby(kinds)
    return tuple(Run(kind, len(list(group))) for kind, group in groups)


def _size(found: tuple[Segment, ...]) -> int:
    return sum(len(segment.runs) for segment in found)

"""Loss spikes: a loss far above those before it.

With the median m of the last losses and the median d of their distances from m, a loss
above m + factor · d is a spike. Neither median is moved by a few spikes.
"""

import collections
import math
import statistics
from collections.abc import Iterable

# Fewer losses say nothing of their spread.
LEAST = 10
# A loss that hardly moves has hardly a spread: d is at least this part of m.
LEAST_SPREAD = 0.01


class Spikes:
    """The last losses of a run."""

    def __init__(self, *, factor: float, window: int, losses: Iterable[float] = ()):
        self._factor = factor
        self._least = min(LEAST, window)
        self._losses = collections.deque(losses, maxlen=window)

    def limit(self) -> float:
        """What the next loss must be above to be a spike; infinite after too few."""
        if len(self._losses) < self._least:
            return math.inf
        median = statistics.median(self._losses)
        spread = statistics.median(abs(loss - median) for loss in self._losses)
        return median + self._factor * max(spread, LEAST_SPREAD * abs(median))

    def add(self, loss: float) -> bool:
        """Whether the next loss is a spike. One that is not finite is not counted."""
        if not math.isfinite(loss):
            return False
        is_spike = loss > self.limit()
        self._losses.append(loss)
        return is_spike

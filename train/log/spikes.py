"""Detection of loss spikes.

With the median m of the last losses and the median d of their distances from m, a loss
above m + factor · d is a spike. A few spikes hardly move either median.
"""

import collections
import math
import statistics
from collections.abc import Iterable

# Minimum number of losses needed to estimate their spread.
LEAST = 10
# Lower bound of d as a fraction of m, for a loss that is almost constant.
LEAST_SPREAD = 0.01


class Spikes:
    """The last losses of a run."""

    def __init__(self, *, factor: float, window: int, losses: Iterable[float] = ()):
        self._factor = factor
        self._least = min(LEAST, window)
        self._losses = collections.deque(losses, maxlen=window)

    def limit(self) -> float:
        """The loss above which the next one is a spike; infinite after too few."""
        if len(self._losses) < self._least:
            return math.inf
        median = statistics.median(self._losses)
        spread = statistics.median(abs(loss - median) for loss in self._losses)
        return median + self._factor * max(spread, LEAST_SPREAD * abs(median))

    def add(self, loss: float) -> bool:
        """Adds the next loss and returns True if it is a spike.

        A loss that is not finite is ignored.
        """
        if not math.isfinite(loss):
            return False
        is_spike = loss > self.limit()
        self._losses.append(loss)
        return is_spike

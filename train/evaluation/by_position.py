"""Perplexity by position: whether a model uses a longer context, or is lost in it.

Documents are cut into windows; a token's position is its place in its window, before
which the model has seen nothing. Only whole windows count, so that all positions are of
the same texts.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from itertools import islice

import jax.numpy as jnp
import numpy as np

from usp_jax.models.llama import Llama
from usp_jax.models.loss import NO_LABEL, token_nats


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Positions next to each other.

    Attributes:
      first, end: the positions, from `first` to the one before `end`.
      nats: the mean of their labels' negative log-likelihood.
    """

    first: int
    end: int
    nats: float

    @property
    def perplexity(self) -> float:
        """Of how many tokens the model is in doubt."""
        return math.exp(self.nats)


def windows(documents: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Whole windows of int32 [length + 1]: inputs, and the label of the last."""
    for document in documents:
        for start in range(0, document.size - length, length):
            yield document[start : start + length + 1]


def doubling(length: int, buckets: int) -> list[int]:
    """The bounds of buckets that each end at twice the position of the one before.

    Raises:
      ValueError: more buckets than that gives.
    """
    if buckets < 1 or length >> (buckets - 1) < 1:
        raise ValueError(
            f"buckets={buckets} must be between 1 and {length.bit_length()} at "
            f"length={length}"
        )
    return [0, *(length >> back for back in reversed(range(buckets)))]


def nats_by_position(
    model: Llama, rows: Iterable[np.ndarray], length: int, batch_size: int = 1
) -> np.ndarray:
    """Mean nats of each position's label over all rows, float64 [length].

    Args:
      rows: windows, int32 [length + 1].
      batch_size: rows at once; filled up to what the mesh splits.

    Raises:
      ValueError: there are no rows.
    """
    ways = model.split.size(model.split.ends.batch)
    total, count = np.zeros(length), 0
    for batch in _batches(rows, batch_size):
        count += len(batch)
        tokens = np.pad(np.stack(batch), ((0, -len(batch) % ways), (0, 0)))
        labels = tokens[:, 1:].copy()
        labels[len(batch) :] = NO_LABEL
        nats = token_nats(model, jnp.asarray(tokens[:, :-1]), jnp.asarray(labels))
        total += np.asarray(nats, np.float64).sum(0)
    if not count:
        raise ValueError(
            f"no document has the {length + 1} tokens that length={length} needs: give "
            "a shorter --length, or longer texts"
        )
    return total / count


def in_buckets(nats: np.ndarray, bounds: list[int]) -> list[Bucket]:
    """The means of positions between neighbouring bounds."""
    return [
        Bucket(first, end, float(nats[first:end].mean()))
        for first, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def _batches(rows: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    left = iter(rows)
    while batch := list(islice(left, size)):
        yield batch

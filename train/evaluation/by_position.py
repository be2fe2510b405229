"""Perplexity by position: does a model make use of a longer context?

Documents are cut into windows; a token's position is its index in its window, and the
model sees nothing before the window. Only whole windows count, so that all positions
are measured on the same texts.
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
    """A range of consecutive positions.

    Attributes:
      first: the first position.
      end: the position after the last one.
      nats: mean negative log-likelihood of the positions' labels.
    """

    first: int
    end: int
    nats: float

    @property
    def perplexity(self) -> float:
        """The exponential of `nats`."""
        return math.exp(self.nats)


def pieces(documents: Iterable[np.ndarray], length: int) -> Iterator[np.ndarray]:
    """Cuts documents into windows, int32 [length + 1], and what is left of each.

    The last token of a window is a label only. What is left has at least two tokens.
    """
    for document in documents:
        for start in range(0, document.size - 1, length):
            yield document[start : start + length + 1]


def doubling(length: int, buckets: int) -> list[int]:
    """Bounds of buckets, each of which ends at twice the position of the previous one.

    Raises:
      ValueError: `length` does not allow this many buckets.
    """
    if buckets < 1 or length >> (buckets - 1) < 1:
        raise ValueError(
            f"buckets={buckets} must be between 1 and {length.bit_length()} at "
            f"length={length}"
        )
    return [0, *(length >> back for back in reversed(range(buckets)))]


def nats_of_labels(
    model: Llama, rows: Iterable[np.ndarray], length: int, batch_size: int = 1
) -> Iterator[np.ndarray]:
    """Yields the nats of the labels of each row, float64 [n] for n labels.

    Args:
      model: the model to evaluate.
      rows: windows, int32 [n + 1], with n at most `length`.
      length: positions in a window; shorter ones are padded.
      batch_size: rows to evaluate at once, padded to a multiple that the mesh splits.
    """
    ways = model.split.size(model.split.ends.batch)
    for batch in _batches(rows, batch_size):
        count = len(batch) + -len(batch) % ways
        tokens = np.zeros((count, length), np.int32)
        labels = np.full((count, length), NO_LABEL, np.int32)
        for i, row in enumerate(batch):
            tokens[i, : row.size - 1], labels[i, : row.size - 1] = row[:-1], row[1:]
        nats = np.asarray(token_nats(model, jnp.asarray(tokens), jnp.asarray(labels)))
        for own, row in zip(nats.astype(np.float64), batch, strict=False):
            yield own[: row.size - 1]


def no_windows(length: int) -> ValueError:
    """The error for texts without a whole window."""
    return ValueError(
        f"no document has the {length + 1} tokens that length={length} needs: give a "
        "shorter --length, or longer texts"
    )


def in_buckets(nats: np.ndarray, bounds: list[int]) -> list[Bucket]:
    """Averages positions between neighbouring bounds."""
    return [
        Bucket(first, end, float(nats[first:end].mean()))
        for first, end in zip(bounds[:-1], bounds[1:], strict=True)
    ]


def _batches(rows: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    left = iter(rows)
    while batch := list(islice(left, size)):
        yield batch

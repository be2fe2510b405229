"""Batches that a wrong program may compute on: shifted labels, arrays out of order."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from jax.sharding import AbstractMesh

from usp_jax.layout import from_layout, to_layout

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shift:
    """Labels one token off, round the end.

    Attributes:
      labels: the path of the labels.
      by: -1 takes each label from the next token, 1 from the one before.
    """

    labels: str
    by: int

    def of(self, batch: Arrays) -> Arrays:
        """The batch with its labels moved."""
        return {**batch, self.labels: np.roll(batch[self.labels], self.by, 1)}

    def __str__(self) -> str:
        if self.by < 0:
            return "labels are shifted once more than on one device (twice)"
        return "labels are shifted once less than on one device (not at all)"


@dataclasses.dataclass(frozen=True)
class Reordering:
    """Arrays that alone are in the order of a layout, or alone are not.

    Attributes:
      paths: the arrays.
      layout: "zigzag" or "striped".
      ring: number of ring shards.
      missing: True if these arrays lack the layout, False if only they have it.
      whole: whether these are all arrays with tokens.
    """

    paths: tuple[str, ...]
    layout: str
    ring: int
    missing: bool
    whole: bool

    def of(self, batch: Arrays) -> Arrays:
        """What one device must be given to compute what the mesh then computes.

        A mesh that expects the layout reads natural tokens as if they were stored ones.
        """
        mesh = AbstractMesh((self.ring,), ("ring",))
        permute = from_layout if self.missing else to_layout
        moved = {
            p: np.asarray(permute(batch[p], self.layout, mesh)) for p in self.paths
        }
        return {**batch, **moved}

    def __str__(self) -> str:
        what = " with ".join(f"batch{path}" for path in self.paths)
        order = f"in the {self.layout} order of {self.ring} ring shards"
        if self.whole and self.missing:
            return f"the batch is not {order}, in which attention computes"
        if self.whole:
            return f"the batch is {order}, in which attention does not compute"
        if self.missing:
            return f"{what} is not {order}, in which the rest is"
        return f"{what} is {order} (or put there twice), in which the rest is not"


def shifts(labels: str) -> tuple[Shift, Shift]:
    """Labels that are shifted once more, and once less."""
    return Shift(labels, -1), Shift(labels, 1)


def reorderings(
    paths: Sequence[str], labels: str | None, length: int, devices: int
) -> Iterator[Reordering]:
    """All arrays, each one, and all but the labels, in or out of every layout.

    Args:
      paths: the arrays [B, T, ...].
      labels: the one that holds labels, if it is known.
      length: T.
      devices: number of devices in the mesh, of which the ring has a factor.
    """
    others = tuple(path for path in paths if path != labels)
    subsets = dict.fromkeys(((*paths,), *((path,) for path in paths), others))
    rings = [n for n in range(devices, 1, -1) if devices % n == 0 == length % (2 * n)]
    for ring, layout, subset, missing in itertools.product(
        rings, ("zigzag", "striped"), subsets, (True, False)
    ):
        yield Reordering(subset, layout, ring, missing, len(subset) == len(paths))

"""Batches of rows, and their placement on the mesh.

Each process reads only the rows of a batch that its devices hold. The state of its
iterator is the number of the next batch, which is the same in all processes.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import cast

import grain
import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from train.data.corpus import PADDING, Row
from usp_jax import balance, to_layout
from usp_jax.models.training import Batch as Batch

# The axes that split the rows of a batch. Pipeline stages also share out the rows.
ROWS = ("data", "fsdp", "pipe")


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A data source with the same subset of rows from each batch, in order.

    Attributes:
      rows: the rows of all batches, endless.
      own: indices of the chosen rows within a batch.
      batch_size: rows in a batch.
    """

    rows: grain.MapDataset
    own: tuple[int, ...]
    batch_size: int

    def __len__(self) -> int:
        return len(self.rows) // self.batch_size * len(self.own)

    def __getitem__(self, index: int) -> Row:
        batch, row = divmod(index, len(self.own))
        return self.rows[batch * self.batch_size + self.own[row]]


def batches(
    rows: grain.MapDataset, batch_size: int, own: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """Iterates over batches of rows.

    The iterator's `get_state` and `set_state` can resume at any batch.

    Args:
      rows: the rows of all batches, in order.
      batch_size: rows in a batch, over all processes.
      own: indices of the rows to read of each batch; None reads all of them.

    Returns:
      An iterator over dicts of int32 [B, T], with B = `len(own)` if `own` is given.
    """
    if own is not None:
        rows = grain.MapDataset.source(Part(rows, tuple(own), batch_size))
    # Rows are slices of memory: threads would cost more than they save.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    size = batch_size if own is None else len(own)
    # Rows are endless, and grain rounds the number of batches with a remainder up.
    batched = rows.batch(size, drop_remainder=True)
    return iter(batched.to_iter_dataset(options))


def own_rows(batch_size: int, mesh: Mesh) -> list[int]:
    """Indices of the rows of a batch that this process's devices hold, increasing."""
    sharding = NamedSharding(mesh, jax.P(ROWS))
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    every = range(batch_size)
    return sorted({row for index in held if index for row in every[index[0]]})


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of rows [B, T] over a mesh."""
    return NamedSharding(mesh, jax.P(ROWS, ("ring", "ulysses")))


def describe(
    batch_size: int,
    length: int,
    mesh: Mesh,
    layout: str = "zigzag",
    across_documents: bool = False,
) -> Batch:
    """The shapes and shardings of a batch, int32 [B, T] each, for the compiler."""
    shape = jax.ShapeDtypeStruct(
        (batch_size, length), np.int32, sharding=batch_sharding(mesh)
    )
    names = [name for name in PADDING if name != "segment_ids" or not across_documents]
    names += ["positions"] if layout == "balanced" else []
    # Shapes in place of arrays; jax has no type for either.
    return cast(Batch, dict.fromkeys(names, shape))


def place(batch: Row, layout: str, mesh: Mesh) -> Batch:
    """Reorders rows to the stored order and splits them over a mesh.

    Args:
      batch: the rows that this process's devices hold, in order, int32 [B, T] each.
      layout: the layout to store the rows in.
      mesh: the mesh to split them over.

    Returns:
      Global arrays of all processes' rows; with the "balanced" layout also their
      positions.
    """
    stored = _stored(batch, layout, mesh)
    sharding = batch_sharding(mesh)
    ways = math.prod(mesh.shape[name] for name in ROWS)
    groups = own_rows(ways, mesh)

    def distribute(x: np.ndarray) -> jax.Array:
        rows = len(x) // len(groups)

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            # jax's type allows None for arrays without a shard on a device.
            assert index is not None
            first, *_ = index[0].indices(rows * ways)
            here = groups.index(first // rows) * rows
            return x[here : here + rows, index[1]]

        shape = (rows * ways, x.shape[1])
        return jax.make_array_from_callback(shape, sharding, shard)

    return jax.tree.map(distribute, stored)


def _stored(batch: Row, layout: str, mesh: Mesh) -> dict[str, np.ndarray]:
    """Reorders rows to the stored order, and adds positions if "balanced"."""
    if layout != "balanced":
        return jax.tree.map(lambda x: to_layout(x, layout, mesh), batch)
    ids, sizes = batch["segment_ids"], mesh.shape
    plans = [
        balance(
            np.bincount(row[row >= 0]),
            sizes["ring"],
            length=ids.shape[1],
            ulysses=sizes["ulysses"],
        )
        for row in ids
    ]

    def reorder(x: np.ndarray) -> np.ndarray:
        rows = [plan.to_stored(row) for plan, row in zip(plans, x, strict=True)]
        return np.stack(rows)

    positions = np.stack([plan.positions for plan in plans])
    return {**jax.tree.map(reorder, batch), "positions": positions}

"""Lists of the visible blocks that the TPU kernels walk, cut to fit scalar memory."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int8

from usp_jax.masking import EMPTY

# The most entries of one call: 128 KiB of the 1 MiB of scalar memory.
MAX_ENTRIES = 2**15

# A Pallas reference to memory, inside a kernel.
Ref = Any

# The entries and the sizes of one call, in scalar memory.
Lists = tuple[Ref, Ref]

# An index of the grid, or a number.
Index = jax.Array | int

# An entry is major << 16 | minor << 2 | kind.
INDEX_BITS = 14


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the grid, as given by the list.

    Attributes:
      count: the number of entries of the list.
      listed: whether the step has an entry.
      first: whether the step is the first of its run (of one major block).
      last: whether the step is the last of its run.
      kind: the kind of the block.
    """

    count: jax.Array
    listed: jax.Array
    first: jax.Array
    last: jax.Array
    kind: jax.Array


@dataclasses.dataclass(frozen=True)
class Walk:
    """The lists of visible blocks, cut into calls that fit scalar memory.

    A call takes `rows` rows of the mask and a stripe of major blocks. Calls run one
    after another on the same results.

    Attributes:
      entries: int32 [calls, rows * length], the list of each row; entries at its end
        may be unused.
      sizes: int32 [calls, 1 + rows], the first batch row, then the number of entries of
        each row (at least one).
      batch: the number of batch rows per call.
    """

    entries: jax.Array
    sizes: jax.Array
    batch: int

    @classmethod
    def of(
        cls, kinds: Int8[Array, "rows major minor"], batch: int, *, visit_all: bool
    ) -> "Walk":
        """Lists the blocks that are not EMPTY.

        Args:
          kinds: int8 [rows, major, minor].
          batch: the number of batch rows; `rows` is the same, or 1 for all of them.
          visit_all: whether to list one EMPTY block for a major block with no other.

        Raises:
          ValueError: there are more than 2**14 blocks of queries or of keys.
        """
        num_rows, major, minor = kinds.shape
        if max(major, minor) > 2**INDEX_BITS:
            raise ValueError(
                f"{max(major, minor)} blocks of tokens in one shard are more than the "
                f"{2**INDEX_BITS} that mosaic_tpu supports: choose larger BlockSizes "
                "or a larger ring"
            )
        rows = num_rows if num_rows * minor <= MAX_ENTRIES else 1
        stripe = min(major, MAX_ENTRIES // (rows * minor))
        stripes = -(-major // stripe)

        index = partial(lax.broadcasted_iota, jnp.int32, kinds.shape)
        listed = kinds != EMPTY
        if visit_all:
            listed |= (index(2) == 0) & ~listed.any(2, keepdims=True)
        codes = index(1) << (INDEX_BITS + 2) | index(2) << 2 | kinds.astype(jnp.int32)
        unused = jnp.iinfo(jnp.int32).max
        codes = jnp.where(listed, codes, unused)
        widths = ((0, 0), (0, stripes * stripe - major), (0, 0))
        codes = jnp.pad(codes, widths, constant_values=unused)
        # Sorting packs each list and orders it by major, then by minor block.
        codes = codes.reshape(num_rows // rows, rows, stripes, stripe * minor)
        codes = lax.sort(codes.swapaxes(1, 2), dimension=3)
        counts = jnp.sum(codes != unused, axis=3, dtype=jnp.int32)
        # A grid needs at least one step: an EMPTY block of the stripe is harmless.
        start = lax.broadcasted_iota(jnp.int32, codes.shape, 1) * stripe
        codes = jnp.where(codes == unused, start << (INDEX_BITS + 2), codes)
        calls = stripes * (num_rows // rows)
        taken = rows if num_rows > 1 else batch
        shape = (num_rows // rows, stripes, 1)
        first = lax.broadcasted_iota(jnp.int32, shape, 0) * rows
        sizes = jnp.concatenate([first, jnp.maximum(counts, 1)], axis=2)
        return cls(codes.reshape(calls, -1), sizes.reshape(calls, -1), taken)

    @property
    def calls(self) -> int:
        """Number of calls."""
        return self.entries.shape[0]

    def entry(
        self, lists: Lists, b: Index, t: Index
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (major, minor, kind) of entry t, or of the last entry, of row b."""
        entries, sizes = lists
        rows = self.sizes.shape[1] - 1
        row = b if rows > 1 else 0
        last = sizes[1 + row] - 1
        code = entries[row * (self.entries.shape[1] // rows) + jnp.minimum(t, last)]
        index = (1 << INDEX_BITS) - 1
        return code >> (INDEX_BITS + 2), code >> 2 & index, code & 3

    def blocks(
        self, lists: Lists, b: Index, t: Index
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns (batch row, major, minor) of entry t."""
        major, minor, _ = self.entry(lists, b, t)
        return lists[1][0] + b, major, minor

    def step(self, lists: Lists, b: Index, t: Index) -> Step:
        """Returns the step at entry t."""
        count = lists[1][1 + (b if self.sizes.shape[1] > 2 else 0)]
        major, _, kind = self.entry(lists, b, t)
        before, _, _ = self.entry(lists, b, jnp.maximum(t - 1, 0))
        after, _, _ = self.entry(lists, b, t + 1)
        listed = t < count
        first = listed & ((t == 0) | (before != major))
        last = listed & ((t == count - 1) | (after != major))
        return Step(count, listed, first, last, kind)

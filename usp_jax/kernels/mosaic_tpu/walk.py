"""Lists of the visible blocks that the TPU kernels walk, cut to fit scalar memory."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Int8

from usp_jax.masking import EMPTY

# The most entries of one call: 128 KiB of the 1 MiB of scalar memory.
MAX_ENTRIES = 2**15

# A Pallas reference to memory, inside a kernel.
Ref = Any

# The entries and the sizes of one call, in scalar memory.
Lists = tuple[Ref, Ref]

# An index of the grid, or a number.
Index = jax.Array | int

# An entry is last << 31 | first << 30 | major << 16 | minor << 2 | kind: one number, as
# each index map of a kernel reads it anew.
INDEX_BITS = 14
FIRST = 1 << 30
LAST = -(1 << 31)


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the grid, as given by the list.

    Attributes:
      major: the block that the step adds to.
      minor: the block that is seen.
      kind: the kind of the pair; EMPTY beyond the end of the list.
      first: whether the step is the first of its run (of one major block).
      last: whether the step is the last of its run.
    """

    major: jax.Array
    minor: jax.Array
    kind: jax.Array
    first: jax.Array
    last: jax.Array


@dataclasses.dataclass(frozen=True)
class Walk:
    """The lists of visible blocks, cut into calls that fit scalar memory.

    A call takes `rows` rows of the mask and a stripe of major blocks. Calls run one
    after another on the same results.

    Attributes:
      entries: int32 [calls, rows * length], the list of each row; its end repeats its
        last blocks as EMPTY.
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
        counts = jnp.maximum(counts, 1)
        codes = _with_ends(codes, counts)
        calls = stripes * (num_rows // rows)
        taken = rows if num_rows > 1 else batch
        shape = (num_rows // rows, stripes, 1)
        first = lax.broadcasted_iota(jnp.int32, shape, 0) * rows
        sizes = jnp.concatenate([first, counts], axis=2)
        return cls(codes.reshape(calls, -1), sizes.reshape(calls, -1), taken)

    @property
    def calls(self) -> int:
        """Number of calls."""
        return self.entries.shape[0]

    def row(self, lists: Lists, b: jax.Array) -> jax.Array:
        """Returns the batch row of row b of the call."""
        # A single call starts at the first.
        return lists[1][0] + b if self.calls > 1 else b

    def count(self, lists: Lists, b: Index) -> jax.Array:
        """Returns the number of entries of row b."""
        return lists[1][1 + (b if self._num_lists > 1 else 0)]

    def step(self, lists: Lists, b: Index, t: Index) -> Step:
        """Returns entry t of row b."""
        if self._num_lists > 1:
            t += b * (self.entries.shape[1] // self._num_lists)
        code = lists[0][t]
        index = (1 << INDEX_BITS) - 1
        major, minor = code >> (INDEX_BITS + 2) & index, code >> 2 & index
        return Step(major, minor, code & 3, (code & FIRST) != 0, code < 0)

    @property
    def _num_lists(self) -> int:
        return self.sizes.shape[1] - 1


def _with_ends(
    codes: Int[Array, "*calls length"], counts: Int[Array, "*calls"]
) -> Int[Array, "*calls length"]:
    """Marks the first and last step of each run, and repeats the end of each list."""
    t = lax.broadcasted_iota(jnp.int32, codes.shape, codes.ndim - 1)
    end = counts[..., None] - 1
    final = jnp.take_along_axis(codes, end, axis=-1)
    major = codes >> (INDEX_BITS + 2)
    changes = major[..., 1:] != major[..., :-1]
    always = jnp.ones((*changes.shape[:-1], 1), bool)
    first = jnp.concatenate([always, changes], axis=-1)
    last = jnp.concatenate([changes, always], axis=-1) | (t == end)
    marked = codes | jnp.where(first, FIRST, 0) | jnp.where(last, LAST, 0)
    return jnp.where(t <= end, marked, final & ~3)

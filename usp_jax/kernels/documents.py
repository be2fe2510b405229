"""The documents that both sides of a block hold, as ranges of queries and of keys.

Kernels without a mask as data attend within sequences: sequence i has queries
`q_starts[i]` to `q_starts[i + 1]` and keys `kv_starts[i]` to `kv_starts[i + 1]`. They
count a band from the last query and the last key of a sequence. In a square block that
is the diagonal of the block if a document ends at the same query and key. It does in
three cases, which are all that causal masks and their windows need:

* Queries and keys are the same tokens.
* Keys that follow the last query of a document are left out, as they are hidden.
* Only one document is in an earlier chunk and a later one, and its keys end with the
  block. Then its queries may go on to the end of the block. The results of those that
  belong to others are thrown away.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from usp_jax.kernels.bands import Block
from usp_jax.masking import PADDING

# Where sequences of queries and of keys start, and the last ones end.
Starts = tuple[Int[Array, "B P"], Int[Array, "B P"]]


@dataclasses.dataclass(frozen=True)
class Documents:
    """The sequences of one block, in each row.

    Attributes:
      starts: every token is in a sequence. Documents are those at odd places; between
        them are keys that no query sees, and at the end queries that see no key.
      q_seen: the queries that see a key. The results of the others have no meaning.
      kv_seen: the keys in a document that queries hold.
      is_exact: whether the sequences show each query what it sees.
    """

    starts: Starts
    q_seen: Bool[Array, "B T"]
    kv_seen: Bool[Array, "B S"]
    is_exact: Bool[Array, " B"]


def most_documents(length: int) -> int:
    """Returns the number of documents, and runs of padding, that queries may have.

    The number must be static, and a sequence costs memory and thread blocks even if it
    is empty.
    """
    return min(length, 16 + length // 128)


def documents_of(
    block: Block, q_ids: Int[Array, "B T"], kv_ids: Int[Array, "B S"]
) -> Documents:
    """Finds the documents of a block which is full or a square of `squares`.

    Args:
      q_ids, kv_ids: the segment ids of the block's queries and keys.
    """
    length, kv_length = q_ids.shape[1], kv_ids.shape[1]
    most = most_documents(length)
    run = _runs(q_ids)
    edges = _count_below(run, jnp.arange(most + 1, dtype=jnp.int32))
    first, stop = edges[:, :-1], edges[:, 1:]
    ids = jnp.take_along_axis(q_ids, jnp.minimum(first, length - 1), 1)
    ids = jnp.where(first < length, ids, PADDING)
    keys = _ranges(ids, kv_ids)
    kv_first, kv_stop = keys.first, keys.stop
    if block.after is not None:
        kv_stop = jnp.minimum(kv_stop, stop + block.after)
    is_shared = (ids != PADDING) & (kv_first < kv_stop)

    # In a square, the last query and the last key of a sequence are on its diagonal.
    q_stop = stop if block.is_full else kv_stop
    q_done = lax.cummax(jnp.where(is_shared, q_stop, 0), 1)
    kv_done = lax.cummax(jnp.where(is_shared, kv_stop, 0), 1)
    q_before, kv_before = _shifted(q_done), _shifted(kv_done)
    is_right = (first >= q_before) & (kv_first >= kv_before) & (q_stop >= stop)
    is_right &= keys.is_run & ~_repeated(ids)
    is_exact = jnp.all(is_right | ~is_shared, 1) & (run[:, -1] < most)

    # Queries before a document become its first: a band counted from the end hides it
    # from them, or they are thrown away. Keys before it are a sequence of their own.
    kv_between = jnp.where(is_shared, kv_first, kv_before)
    q_starts = _starts(q_before, q_done, (length, length))
    kv_starts = _starts(kv_between, kv_done, (kv_done[:, -1], kv_length))

    # What a row that cannot be honoured has in it must not reach others in the kernel.
    visible = jnp.where(is_shared & is_exact[:, None], kv_stop, 0)
    q_seen = _seen_queries(block, jnp.minimum(run, most - 1), kv_first, visible)
    ends = jnp.arange(1, kv_length + 1, dtype=jnp.int32)
    sequence = _count_below(kv_starts, ends) - 1
    kv_seen = (sequence % 2 == 1) & (sequence < 2 * most)
    return Documents((q_starts, kv_starts), q_seen, kv_seen, is_exact)


def _runs(ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Counts the runs of equal ids before that of each token."""
    is_new = (ids[:, 1:] != ids[:, :-1]).astype(jnp.int32)
    return jnp.pad(jnp.cumsum(is_new, 1, dtype=jnp.int32), ((0, 0), (1, 0)))


@dataclasses.dataclass(frozen=True)
class _Ranges:
    """The keys of each document: from `first` to `stop`, if they are one run."""

    first: Int[Array, "B P"]
    stop: Int[Array, "B P"]
    is_run: Bool[Array, "B P"]


def _ranges(ids: Int[Array, "B P"], kv_ids: Int[Array, "B S"]) -> _Ranges:
    length = kv_ids.shape[1]
    same = ids[:, :, None] == kv_ids[:, None, :]
    place = jnp.arange(length, dtype=jnp.int32)[None, None]
    first = jnp.min(jnp.where(same, place, length), 2)
    stop = jnp.max(jnp.where(same, place + 1, 0), 2)
    return _Ranges(first, stop, stop - first == jnp.sum(same, 2, dtype=jnp.int32))


def _repeated(ids: Int[Array, "B P"]) -> Bool[Array, "B P"]:
    """Whether a run before or after has the same id."""
    same = ids[:, :, None] == ids[:, None, :]
    return jnp.sum(same, 2) > 1


def _seen_queries(
    block: Block, document: jax.Array, kv_first: jax.Array, kv_stop: jax.Array
) -> Bool[Array, "B T"]:
    """Returns the queries that see a key of their document."""
    first, stop = (jnp.take_along_axis(x, document, 1) for x in (kv_first, kv_stop))
    if block.after is not None:
        row = jnp.arange(document.shape[1], dtype=jnp.int32)[None]
        stop = jnp.minimum(stop, row + block.after + 1)
    return first < stop


def _shifted(x: Int[Array, "B P"]) -> Int[Array, "B P"]:
    return jnp.pad(x[:, :-1], ((0, 0), (1, 0)))


def _starts(
    between: jax.Array, done: jax.Array, rest: tuple[int | jax.Array, int]
) -> Int[Array, "B P"]:
    """Interleaves the ends of what lies between documents, and of documents.

    They never fall and never leave the block, whatever the ids are: a kernel would
    read other memory.
    """
    batch, length = done.shape[0], rest[1]
    pairs = jnp.stack([between, done], 2).reshape(batch, -1)
    ends = jnp.stack([jnp.broadcast_to(x, batch) for x in rest], 1)
    starts = jnp.concatenate([jnp.zeros((batch, 1), jnp.int32), pairs, ends], 1)
    return lax.cummax(jnp.clip(starts, 0, length).astype(jnp.int32), 1)


def _count_below(x: Int[Array, "B T"], limits: Int[Array, " P"]) -> Int[Array, "B P"]:
    """Counts the values of a row that never falls which are below each limit."""
    find = partial(jnp.searchsorted, v=limits, method="compare_all")
    return jax.vmap(find)(x).astype(jnp.int32)

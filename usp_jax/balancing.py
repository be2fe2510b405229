"""Balance of packed rows: equal visible work for the ring's shards, not equal tokens.

A query sees keys of its own document only, so a shard that holds the ends of long
documents works much longer than one that holds short ones. `balance` cuts a packed row
into chunks and gives every ring shard the same number of them and, nearly, the same
number of visible (query, key) pairs (`chunk_assignment.py`). What comes out is data for
`layout="data"`. All of it is numpy, on the host; `ringwork.py` has the figures that
tell how even an order is.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64

from usp_jax import arguments
from usp_jax.checks import check_count
from usp_jax.chunk_assignment import Row, assign
from usp_jax.masking import PADDING

# A chunk is a kernel's block where the row is long enough for this many a shard.
_CHUNK = 128
_CHUNKS_A_SHARD = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Balance:
    """The order in which a packed row is stored; ring shards follow one another.

    Attributes:
      order: int32 [T], which token of the padded natural row each stored place holds.
      segment_ids: int32 [T] in stored order: the document's index, -1 for padding.
      work: int64 [ring], the visible pairs of each shard's queries.
      chunk: the tokens of a chunk. Within a shard chunks are in natural order.
    """

    order: Int32[np.ndarray, " T"]
    segment_ids: Int32[np.ndarray, " T"]
    work: Int64[np.ndarray, " ring"]
    chunk: int

    @property
    def positions(self) -> Int32[np.ndarray, " T"]:
        """What masks and RoPE take: each stored token's place in the natural row.

        They do not start again with each document, which neither can tell.
        """
        return self.order

    def to_stored(
        self, x: np.ndarray, *, axis: int = 0, pad_value: int | None = None
    ) -> np.ndarray:
        """Permutes a natural row to stored order along `axis`.

        Args:
          x: of length T along `axis`, or shorter with `pad_value`, which then follows.

        Raises:
          ValueError: the length is neither.
        """
        x = np.asarray(x)
        length, missing = x.shape[axis], len(self.order) - x.shape[axis]
        if missing < 0 or (missing and pad_value is None):
            raise ValueError(
                f"x.shape[{axis}]={length} must be {len(self.order)}, or less with "
                "pad_value="
            )
        if missing:
            widths = [(0, 0)] * x.ndim
            widths[axis] = (0, missing)
            x = np.pad(x, widths, constant_values=pad_value)
        return np.take(x, self.order, axis)

    def to_natural(
        self, x: np.ndarray, *, axis: int = 0, length: int | None = None
    ) -> np.ndarray:
        """The inverse of `to_stored`.

        Args:
          length: how many tokens to keep of the natural row; None keeps the padding.

        Raises:
          ValueError: `x` is not of length T, or has no such beginning.
        """
        x, whole = np.asarray(x), len(self.order)
        if x.shape[axis] != whole:
            raise ValueError(f"x.shape[{axis}]={x.shape[axis]} must be {whole}")
        if length is not None and not 0 <= length <= whole:
            raise ValueError(f"{length=} must be between 0 and {whole}")
        inverse = np.empty_like(self.order)
        inverse[self.order] = np.arange(whole, dtype=np.int32)
        return np.take(x, inverse[:length], axis)


def balance(
    segment_lengths: Sequence[int] | np.ndarray,
    ring: int,
    *,
    length: int | None = None,
    chunk: int | None = None,
    ulysses: int = 1,
    is_causal: bool = True,
    local_window_size: int | tuple[int | None, int | None] | None = None,
) -> Balance:
    """Orders a row of packed documents so that ring shards have equal visible work.

        plan = usp_jax.balance([700, 200, 100], ring=4, length=1024)
        tokens = plan.to_stored(tokens, pad_value=0)
        usp_attention(..., layout="data", positions=plan.positions[None],
                      segment_ids=plan.segment_ids[None])

    Args:
      segment_lengths: the tokens of each document, in the order they are packed.
      ring: the number of ring shards.
      length: T, the row's length with its padding; a multiple of ring · ulysses. None
        is the least that holds the documents and divides.
      chunk: the tokens that stay together; T / ring must be a multiple. None is 128, a
        block of the kernels, or less where a shard would have fewer than 32 chunks.
      ulysses: the other degree, for T.
      is_causal, local_window_size: those of the attention, as in `usp_attention`.

    Raises:
      ValueError: an argument is not of its kind, or lengths do not fit or divide.
    """
    rule = arguments.mask_rule(is_causal, local_window_size)
    lengths = _document_lengths(segment_lengths)
    for name, value in (("ring", ring), ("ulysses", ulysses)):
        check_count(name, value, least=1)
    total = int(lengths.sum())
    shard_length, chunk = _shard_and_chunk(total, ring, ulysses, length, chunk)
    if shard_length % chunk:
        raise ValueError(
            f"{chunk=} must divide the {shard_length} tokens of a ring shard"
        )
    row = Row.of(lengths, ring * shard_length, chunk, rule)
    shards = assign(row, ring)
    chunks = np.argsort(shards, kind="stable")
    tokens = np.arange(chunk, dtype=np.int32)
    order = (chunks.astype(np.int32) * chunk)[:, None] + tokens
    ids = np.full(ring * shard_length, PADDING, np.int32)
    ids[:total] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return Balance(
        order=order.reshape(-1),
        segment_ids=ids.reshape(-1, chunk)[chunks].reshape(-1),
        work=row.work[chunks].reshape(ring, -1).sum(1),
        chunk=chunk,
    )


def _document_lengths(segment_lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    lengths = np.asarray(segment_lengths)
    if not lengths.size:
        lengths = lengths.astype(np.int64)
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise ValueError(
            f"segment_lengths is {lengths.dtype}{list(lengths.shape)}, it must be "
            "integers [documents]"
        )
    if (lengths < 1).any():
        i = int(np.argmax(lengths < 1))
        raise ValueError(f"segment_lengths[{i}]={lengths[i]} must be 1 or greater")
    if lengths.sum(dtype=np.float64) > np.iinfo(np.int32).max:
        raise ValueError("the sum of segment_lengths must fit into int32")
    return lengths.astype(np.int64)


def _shard_and_chunk(
    total: int, ring: int, ulysses: int, length: int | None, chunk: int | None
) -> tuple[int, int]:
    """The tokens of a ring shard and of a chunk."""
    if chunk is not None:
        check_count("chunk", chunk, least=1)
    if length is None:
        if not total:
            raise ValueError("segment_lengths is empty: give length= for a row of it")
        shard = -(-total // ring)
        if chunk is None:
            # The greatest power of two, for padding may be added to make it divide.
            chunk = 1 << _most_chunk(shard).bit_length() - 1
        multiple = math.lcm(chunk, ulysses)
        return -(-shard // multiple) * multiple, chunk
    check_count("length", length, least=1)
    if length < total:
        raise ValueError(f"{length=} must hold the {total} tokens of segment_lengths")
    if length % (ring * ulysses):
        raise ValueError(f"{length=} must be a multiple of {ring=} · {ulysses=}")
    shard = length // ring
    if chunk is None:
        chunk = next(c for c in range(_most_chunk(shard), 0, -1) if shard % c == 0)
    return shard, chunk


def _most_chunk(shard_length: int) -> int:
    """128, or what leaves a shard 32 chunks, or 1."""
    return max(min(_CHUNK, shard_length // _CHUNKS_A_SHARD), 1)

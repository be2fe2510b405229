"""Balancing of packed rows: ring shards with equal visible work, not just equal tokens.

A query sees only keys of its own document, so a shard that holds the ends of long
documents works much longer than one that holds short documents. `balance` cuts a packed
row into chunks and gives every ring shard the same number of chunks and nearly the same
number of visible (query, key) pairs (`chunk_assignment.py`). The result is data for
`layout="data"`. All of it is numpy, on the host. `ringwork.py` measures how even an
order is.
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

# A chunk is as long as a kernel's block, if a shard can have this many of them.
_CHUNK = 128
_CHUNKS_A_SHARD = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Balance:
    """The order in which a packed row is stored, one ring shard after the other.

    Attributes:
      order: int32 [T], the index in the padded natural row of each stored token.
      segment_ids: int32 [T] in stored order, the index of the document; -1 is padding.
      work: int64 [ring], the number of visible pairs of each shard's queries.
      chunk: number of tokens in a chunk. Within a shard, chunks are in natural order.
    """

    order: Int32[np.ndarray, " T"]
    segment_ids: Int32[np.ndarray, " T"]
    work: Int64[np.ndarray, " ring"]
    chunk: int

    @property
    def positions(self) -> Int32[np.ndarray, " T"]:
        """Each stored token's index in the natural row, int32 [T], for masks and RoPE.

        Positions do not restart at each document; neither masks nor RoPE depend on it.
        """
        return self.order

    def to_stored(
        self, x: np.ndarray, *, axis: int = 0, pad_value: int | None = None
    ) -> np.ndarray:
        """Permutes a natural row to stored order along `axis`.

        Args:
          x: array of length T along `axis`, or shorter if `pad_value` is given.
          axis: the axis to permute.
          pad_value: fills a shorter array up to length T.

        Returns:
          The array in stored order, of length T along `axis`.

        Raises:
          ValueError: `x` is too long, or shorter without `pad_value`.
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
        """Permutes a stored row to natural order; the inverse of `to_stored`.

        Args:
          x: array of length T along `axis`.
          axis: the axis to permute.
          length: number of tokens to keep of the natural row; None keeps the padding.

        Returns:
          The array in natural order.

        Raises:
          ValueError: `x` is not of length T, or `length` is not between 0 and T.
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
    """Orders a row of packed documents so that ring shards have nearly equal work.

    Work is the number of visible (query, key) pairs.

    Args:
      segment_lengths: number of tokens in each document, in the order of packing.
      ring: number of ring shards.
      length: T, the length of the row with padding, a multiple of ring · ulysses. None
        takes the shortest that holds the documents and divides.
      chunk: number of consecutive tokens that stay together; it must divide T / ring.
        None takes 128, a block of the kernels, or less if a shard would have fewer than
        32 chunks.
      ulysses: size of the `ulysses` axis, which must divide the shards.
      is_causal: as in `usp_attention`.
      local_window_size: as in `usp_attention`.

    Returns:
      The order, a `Balance`.

    Raises:
      ValueError: an argument has the wrong type, or lengths do not fit or divide.

    Example:
      ```python
      plan = usp_jax.balance([700, 200, 100], ring=4, length=1024)
      tokens = plan.to_stored(tokens, pad_value=0)
      usp_attention(
          ..., layout="data", positions=plan.positions[None],
          segment_ids=plan.segment_ids[None],
      )
      ```
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
    """Number of tokens in a ring shard and in a chunk."""
    if chunk is not None:
        check_count("chunk", chunk, least=1)
    if length is None:
        if not total:
            raise ValueError("segment_lengths is empty: give length= for padding only")
        shard = -(-total // ring)
        if chunk is None:
            # A power of two: padding may be added, so it need not divide the shard.
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
    """Longest chunk: 128, or less so that a shard has 32 chunks; at least 1."""
    return max(min(_CHUNK, shard_length // _CHUNKS_A_SHARD), 1)

"""Loads, stores and products of the blocks of a head in registers, piece by piece."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from usp_jax.kernels.logits import LOG2E, Logits

# A Pallas reference to an array, inside a kernel.
Ref = Any

# A block of one head whose columns are cut into powers of two.
Pieces = tuple[jax.Array, ...]


def _cut(head_size: int) -> list[tuple[int, int]]:
    """Returns the (start, size) of the powers of two that add up to a head size."""
    pieces, start, rest = [], 0, head_size
    while rest:
        size = 1 << (rest.bit_length() - 1)
        pieces.append((start, size))
        start, rest = start + size, rest - size
    return pieces


def zeros(ref: Ref, block: int) -> Pieces:
    """Returns an accumulator for a block of `ref`'s head size."""
    sizes = [size for _, size in _cut(ref.shape[-1])]
    return tuple(jnp.zeros((block, size), jnp.float32) for size in sizes)


def load(
    ref: Ref, index: jax.Array, block: int, head: jax.Array | None = None
) -> Pieces:
    """Loads a block of rows of [T, H], or of one head of [T, G, H]; 0 past the end."""
    inside = _inside(ref, index, block)
    return tuple(
        plgpu.load(view, mask=inside, other=None if inside is None else 0.0)
        for view in _views(ref, index, block, head)
    )


def store(ref: Ref, index: jax.Array, block: int, pieces: Pieces) -> None:
    """Stores a block of rows of [T, H], except rows past the end."""
    inside = _inside(ref, index, block)
    for view, x in zip(_views(ref, index, block), pieces, strict=True):
        plgpu.store(view, x, mask=inside)


def _views(
    ref: Ref, index: jax.Array, block: int, head: jax.Array | None = None
) -> Iterator[Ref]:
    """Yields references to the pieces of a block."""
    rows = pl.ds(index * block, block)
    for start, size in _cut(ref.shape[-1]):
        columns = pl.ds(start, size)
        yield ref.at[(rows, columns) if head is None else (rows, head, columns)]


def _inside(ref: Ref, index: jax.Array, block: int) -> jax.Array | None:
    """Returns which rows of a block exist; None if no block can pass the end."""
    length = ref.shape[0]
    if not length % block:
        return None
    return (index * block + jnp.arange(block) < length)[:, None]


def dot_nt(a: Pieces, b: Pieces) -> jax.Array:
    """[m, H], [n, H] in pieces -> [m, n]"""
    return jnp.asarray(sum(_dot(x, y, 1) for x, y in zip(a, b, strict=True)))


def dot_nn(a: jax.Array, b: Pieces) -> Pieces:
    """[m, n], [n, H] in pieces -> [m, H] in pieces"""
    return tuple(_dot(a.astype(x.dtype), x, 0) for x in b)


def _dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Contracts the last axis of `a` and `axis` of `b`, accumulating in float32."""
    return lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def add(a: Pieces, b: Pieces) -> Pieces:
    """Adds two blocks."""
    return tuple(x + y for x, y in zip(a, b, strict=True))


def base2(logits: Logits) -> Logits:
    """Returns logits in base 2, for exp2 instead of exp."""
    cap = None if logits.soft_cap is None else logits.soft_cap * LOG2E
    return Logits(logits.scale * LOG2E, cap)


def unscaled(logits: Logits) -> Logits:
    """Returns logits whose derivative leaves out the scale, which the sums apply."""
    return dataclasses.replace(logits, scale=1.0)

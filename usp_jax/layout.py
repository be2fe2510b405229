"""Layouts: the order in which the tokens of a sequence are stored on the mesh.

A layout is a permutation of the sequence, cut into one shard for each ring index. It
exists to balance causal work over the ring. Only this file knows the permutations;
other code reads positions.

* contiguous: ring shard r holds the r-th part of the sequence.
* zigzag: the sequence is cut into 2R chunks; ring shard r holds chunks r and 2R-1-r
  (USP, arXiv 2405.07719, section 3.3).
* striped: ring shard t % R holds token t (Striped Attention, arXiv 2311.09431).
* data: the order that the data loader chose; the positions come with the data.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Int

from usp_jax.checks import check_count
from usp_jax.mesh import MeshAxes, check_axes, sequence_sizes

LAYOUTS = ("contiguous", "zigzag", "striped", "data")

# An index of one axis: an int, which drops the axis, or a slice.
Index = int | slice


def check_layout(layout: str) -> None:
    """Raises ValueError if `layout` is not the name of a layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {LAYOUTS}")


def length_multiple(
    layout: str, ring_size: int, ulysses_size: int, tensor_size: int = 1
) -> int:
    """Returns the number that a sequence's stored length must be a multiple of.

    Args:
      tensor_size: number of parts that a model splits a device's tokens into outside
        attention.
    """
    pieces = 2 if layout == "zigzag" else 1
    return ring_size * math.lcm(pieces, ulysses_size * tensor_size)


def shard_positions(
    layout: str, ring_index: Int[Array, ""] | int, ring_size: int, length: int
) -> Int[Array, " t"]:
    """Positions in the sequence of the `length` tokens that a ring shard stores."""
    tokens = lax.iota(jnp.int32, length)
    if layout == "contiguous":
        return ring_index * length + tokens
    if layout == "striped":
        return ring_index + ring_size * tokens
    if layout == "zigzag":
        chunk = length // 2
        late = (2 * ring_size - 2 - ring_index) * chunk
        return tokens + jnp.where(tokens < chunk, ring_index * chunk, late)
    raise ValueError(f"layout={layout!r} has no positions of its own: give positions=")


RUN = np.dtype([(name, int) for name in ("start", "count", "first", "stride")])


def shard_runs(layout: str, ring_size: int, length: int) -> np.ndarray:
    """The positions of `shard_positions` as runs, computed on the host: RUN [R, runs].

    In a run, the `count` tokens of a shard from index `start` on have the positions
    `first`, `first + stride` and so on.
    """
    if layout == "contiguous":
        runs = [[(0, length, r * length, 1)] for r in range(ring_size)]
    elif layout == "striped":
        runs = [[(0, length, r, ring_size)] for r in range(ring_size)]
    elif layout == "zigzag":
        c = length // 2
        last = 2 * ring_size - 1
        runs = [[(0, c, r * c, 1), (c, c, (last - r) * c, 1)] for r in range(ring_size)]
    else:
        raise ValueError(f"layout={layout!r} has no positions of its own")
    return np.array(runs, RUN)


def padded_length(
    length: int,
    layout: str,
    mesh: Mesh | AbstractMesh | None,
    *,
    axes: MeshAxes = MeshAxes(),
) -> int:
    """Returns the length at which `length` tokens are stored in a layout on a mesh.

    Args:
      length: number of tokens.
      layout: name of the layout. For "contiguous" the result is `length` itself, since
        attention pads internally; for the others it is the next multiple that the mesh
        can split.
      mesh: as in `usp_attention`.
      axes: as in `usp_attention`.

    Returns:
      The stored length, an int.

    Raises:
      ValueError: the layout is unknown, or `length` is not an int of at least 0.
    """
    ring_size, ulysses_size = _sizes(layout, mesh, axes)
    check_count("length", length, least=0)
    if layout == "contiguous":
        return length
    multiple = length_multiple(layout, ring_size, ulysses_size)
    return -(-length // multiple) * multiple


def layout_positions(
    length: int,
    layout: str,
    mesh: Mesh | AbstractMesh | None,
    *,
    axes: MeshAxes = MeshAxes(),
) -> Int[Array, " T"]:
    """Returns the position in the sequence of each stored token, for instance for RoPE.

    Args:
      length: T, the stored length, as `padded_length` returns it.
      layout: name of the layout.
      mesh: as in `usp_attention`.
      axes: as in `usp_attention`.

    Returns:
      int32 [T].

    Raises:
      ValueError: the layout is unknown or "data" (whose positions come with the data),
        or it cannot store this length.
    """
    ring_size, ulysses_size = _sizes(layout, mesh, axes)
    check_count("length", length, least=0)
    if layout == "contiguous":
        return lax.iota(jnp.int32, length)
    _check_permutes(layout)
    check_length(length, layout, ring_size, ulysses_size, "length")
    shard = length // ring_size
    index = lax.iota(jnp.int32, ring_size)
    shards = jax.vmap(lambda i: shard_positions(layout, i, ring_size, shard))(index)
    return shards.reshape(length)


def to_layout(
    x: Array | np.ndarray,
    layout: str,
    mesh: Mesh | AbstractMesh | None,
    *,
    axis: int = 1,
    pad_value: int | None = None,
    axes: MeshAxes = MeshAxes(),
) -> Array | np.ndarray:
    """Permutes an array along its sequence axis from natural to stored order.

    For a numpy array the result is a numpy array, so a data loader can run this on the
    host.

    Args:
      x: any array.
      layout: name of the layout.
      mesh: as in `usp_attention`.
      axes: as in `usp_attention`.
      axis: sequence axis of `x`, of length T.
      pad_value: fills up the sequence to `padded_length` if the layout cannot store its
        length; the padding must then have segment id -1. None raises instead.

    Returns:
      `x` in stored order, padded to `padded_length` if necessary.

    Raises:
      ValueError: the layout is unknown or "data", `x` has no such axis, or its length
        does not divide and `pad_value` is None.
    """
    ring_size, ulysses_size = _sizes(layout, mesh, axes)
    _check_axis(x, axis)
    if layout == "contiguous":
        return x
    _check_permutes(layout)
    length = x.shape[axis]
    padding = padded_length(length, layout, mesh, axes=axes) - length
    if padding and pad_value is None:
        check_length(length, layout, ring_size, ulysses_size, f"x.shape[{axis}]")
    return _permute(x, layout, axis, ring_size, padding, pad_value)


def from_layout(
    x: Array | np.ndarray,
    layout: str,
    mesh: Mesh | AbstractMesh | None,
    *,
    axis: int = 1,
    length: int | None = None,
    axes: MeshAxes = MeshAxes(),
) -> Array | np.ndarray:
    """Permutes an array from stored to natural order; the inverse of `to_layout`.

    Args:
      x: any array in stored order.
      layout: name of the layout.
      mesh: as in `usp_attention`.
      axes: as in `usp_attention`.
      axis: sequence axis of `x`.
      length: number of tokens before padding; the rest is cut off. None keeps all.

    Returns:
      `x` in natural order.

    Raises:
      ValueError: the layout is unknown or "data", `x` has no such axis, or the layout
        cannot store its length.
    """
    ring_size, ulysses_size = _sizes(layout, mesh, axes)
    _check_axis(x, axis)
    if layout != "contiguous":
        _check_permutes(layout)
        check_length(x.shape[axis], layout, ring_size, ulysses_size, f"x.shape[{axis}]")
        x = _unpermute(x, layout, axis, ring_size)
    if length is not None and length != x.shape[axis]:
        if not 0 <= length <= x.shape[axis]:
            raise ValueError(f"{length=} must be between 0 and {x.shape[axis]}")
        x = _unsharded(x, axis)[_along(x.ndim, axis, slice(length))]
    return x


def check_length(
    length: int, layout: str, ring_size: int, ulysses_size: int, name: str
) -> None:
    """Raises ValueError if a layout cannot store a sequence of this length."""
    multiple = length_multiple(layout, ring_size, ulysses_size)
    if length % multiple:
        raise ValueError(
            f"{name}={length} must be a multiple of {multiple} for {layout=} at "
            f"ring={ring_size}, ulysses={ulysses_size}: pad it with "
            "usp_jax.to_layout(..., pad_value=) and give the padding segment id -1"
        )


def _sizes(
    layout: str, mesh: AbstractMesh | Mesh | None, axes: MeshAxes
) -> tuple[int, int]:
    check_layout(layout)
    if mesh is not None:
        check_axes(axes, mesh)
    return sequence_sizes(mesh, axes)


def _check_permutes(layout: str) -> None:
    if layout == "data":
        raise ValueError(
            'layout="data" has no permutation: the data loader stores the data in order'
        )


def _check_axis(x: jax.Array | np.ndarray, axis: int) -> None:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{axis=} must be one of the {x.ndim} axes of {x.shape=}")


def _along(ndim: int, axis: int, index: Index) -> tuple[Index, ...]:
    """An index tuple that applies `index` to one axis."""
    return tuple(index if i == axis % ndim else slice(None) for i in range(ndim))


def _permute(
    x: jax.Array | np.ndarray,
    layout: str,
    axis: int,
    ring_size: int,
    padding: int,
    pad_value: int | None,
) -> jax.Array | np.ndarray:
    xp = np if isinstance(x, np.ndarray) else jnp
    spec, x = _spec(x), _unsharded(x, axis)
    axis %= x.ndim
    if padding:
        widths = [(0, padding if i == axis else 0) for i in range(x.ndim)]
        x = xp.pad(x, widths, constant_values=pad_value)
    head, length, tail = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    if layout == "striped":
        pieces = x.reshape(*head, length // ring_size, ring_size, *tail)
        stored = xp.swapaxes(pieces, axis, axis + 1)
    else:
        chunks = x.reshape(*head, 2, ring_size, length // (2 * ring_size), *tail)
        early = chunks[_along(chunks.ndim, axis, 0)]
        late = xp.flip(chunks[_along(chunks.ndim, axis, 1)], axis)
        stored = xp.stack([early, late], axis + 1)
    return _resharded(stored.reshape(*head, length, *tail), spec)


def _unpermute(
    x: jax.Array | np.ndarray, layout: str, axis: int, ring_size: int
) -> jax.Array | np.ndarray:
    xp = np if isinstance(x, np.ndarray) else jnp
    spec, x = _spec(x), _unsharded(x, axis)
    axis %= x.ndim
    head, length, tail = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    if layout == "striped":
        pieces = x.reshape(*head, ring_size, length // ring_size, *tail)
        natural = xp.swapaxes(pieces, axis, axis + 1)
    else:
        chunks = x.reshape(*head, ring_size, 2, length // (2 * ring_size), *tail)
        early = chunks[_along(chunks.ndim, axis + 1, 0)]
        late = xp.flip(chunks[_along(chunks.ndim, axis + 1, 1)], axis)
        natural = xp.concatenate([early, late], axis)
    return _resharded(natural.reshape(*head, length, *tail), spec)


def _spec(x: jax.Array | np.ndarray) -> NamedSharding | None:
    """The sharding of `x` on an Explicit mesh, or None."""
    if isinstance(x, np.ndarray):
        return None
    sharding = jax.typeof(x).sharding
    return sharding if any(part is not None for part in sharding.spec) else None


def _unsharded(x: jax.Array | np.ndarray, axis: int) -> jax.Array | np.ndarray:
    """Gathers one axis of `x` if an Explicit mesh splits it.

    In Explicit mode a split axis can be neither permuted nor cut.
    """
    if (sharding := _spec(x)) is None or sharding.spec[axis % x.ndim] is None:
        return x
    parts = list(sharding.spec)
    parts[axis % x.ndim] = None
    return jax.reshard(x, sharding.update(spec=jax.P(*parts)))


def _resharded(
    x: jax.Array | np.ndarray, sharding: NamedSharding | None
) -> jax.Array | np.ndarray:
    return x if sharding is None else jax.reshard(x, sharding)

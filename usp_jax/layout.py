"""Layouts: the order in which the tokens of a sequence are stored on the mesh.

A layout is a permutation of the sequence, cut into one piece for each ring shard; it
exists to balance causal work over the ring. Nothing outside this file knows how the
permutations look: they read positions.

* contiguous: ring shard r holds the r-th piece of the sequence.
* zigzag: the sequence is cut into 2R chunks; ring shard r holds chunks r and 2R-1-r
  (USP, arXiv 2405.07719, section 3.3).
* striped: token t lives on ring shard t % R (Striped Attention, arXiv 2311.09431).
* data: whatever order the data loader chose; the positions come with the data.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Int

from usp_jax.checks import check_count
from usp_jax.mesh import MeshAxes, axis_size, check_axes

LAYOUTS = ("contiguous", "zigzag", "striped", "data")

# What picks of one axis: a place, which drops the axis, or a stretch of it.
Index = int | slice


def check_layout(layout: str) -> None:
    """Raises ValueError when `layout` is not the name of a layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} must be one of {LAYOUTS}")


def length_multiple(
    layout: str, ring_size: int, ulysses_size: int, tensor_size: int = 1
) -> int:
    """The number that the stored length of a sequence must be a multiple of.

    Args:
      tensor_size: the number of parts that a model splits the tokens of a device into
        outside attention.
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
    """The positions of `shard_positions` as runs, on the host: RUN [R, runs].

    The tokens of a shard from `start`, `count` of them, have the positions `first`,
    `first + stride` and so on.
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
    """The length at which `length` tokens are stored in a layout on a mesh.

    For "contiguous" it is `length` itself (the op pads inside), for the others the next
    multiple that the mesh can split. `mesh` and `axes` are those of `usp_attention`.

    Raises:
      ValueError: an unknown layout, "data", or a length that is not a positive int.
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
    """Position in the sequence of each stored token, for RoPE: int32 [T].

    Args:
      length: the stored length, a multiple that `padded_length` gives.
      mesh, axes: as `usp_attention` takes them.

    Raises:
      ValueError: an unknown layout, "data" (its positions come with the data), or a
        length that the layout cannot have.
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

    A numpy array gives a numpy array, so that a data loader can do it on the host.

    Args:
      x: any array; `axis` is its sequence axis, of length T.
      mesh, axes: as `usp_attention` takes them.
      pad_value: what fills a sequence whose length the layout cannot have, up to
        `padded_length`; its tokens must then have segment id -1. None raises instead.

    Raises:
      ValueError: an unknown layout, "data", an axis that `x` does not have, or a
        length that does not divide while `pad_value` is None.
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
    """The inverse of `to_layout`: from stored to natural order.

    Args:
      mesh, axes: as `usp_attention` takes them.
      length: the number of tokens before padding; what follows them is cut off.

    Raises:
      ValueError: an unknown layout, "data", an axis that `x` does not have, or a
        length that the layout cannot have.
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
    """Raises ValueError when a layout cannot store a sequence of this length."""
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
    return axis_size(mesh, axes.ring), axis_size(mesh, axes.ulysses)


def _check_permutes(layout: str) -> None:
    if layout == "data":
        raise ValueError(
            'layout="data" is permuted by whoever made the data, not by a rule'
        )


def _check_axis(x: jax.Array | np.ndarray, axis: int) -> None:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{axis=} must be one of the {x.ndim} axes of {x.shape=}")


def _along(ndim: int, axis: int, index: Index) -> tuple[Index, ...]:
    """An index that applies `index` to one axis."""
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
    """The sharding that an Explicit mesh has given `x`, or None."""
    if isinstance(x, np.ndarray):
        return None
    sharding = jax.typeof(x).sharding
    return sharding if any(part is not None for part in sharding.spec) else None


def _unsharded(x: jax.Array | np.ndarray, axis: int) -> jax.Array | np.ndarray:
    """`x` with one axis gathered where an Explicit mesh splits it.

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

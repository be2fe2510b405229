"""Checks of the arguments of the gated delta rule."""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from usp_jax import arguments, kernels
from usp_jax.delta.contract import Tiles
from usp_jax.delta.implementations import KERNELS
from usp_jax.delta.split import DeltaCall
from usp_jax.layout import check_layout, check_length
from usp_jax.mesh import NO_AXES, MeshAxes, axis_size
from usp_jax.shards import Shards
from usp_jax.ulysses import Heads

LAYOUTS = ("contiguous", "zigzag")


def checked_call(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    segment_ids: object,
    state: jax.Array | None,
    layout: str,
    implementation: str | None,
    shards: Shards,
) -> tuple[DeltaCall, jax.Array | None]:
    """Checks the arguments, and makes the call and int32 segment ids."""
    for name, x, letters in (
        ("query", query, "[B, T, N, H]"),
        ("key", key, "[B, T, N, H]"),
        ("value", value, "[B, T, M, V]"),
    ):
        arguments.check_array(name, x, letters)
        if x.dtype != query.dtype:
            raise ValueError(
                f"{name}.dtype={x.dtype} must be the query's dtype, {query.dtype}"
            )
    batch, length, n, size = query.shape
    if key.shape != query.shape:
        raise ValueError(f"{key.shape=} must be {query.shape=}")
    if value.shape[:2] != (batch, length):
        raise ValueError(f"{value.shape=} must start with [B, T] = {(batch, length)}")
    m = value.shape[2]
    if m % n:
        raise ValueError(
            f"the value's heads, M={m}, must be a multiple of the query's, N={n}"
        )
    for name, x in (("log_decay", log_decay), ("beta", beta)):
        check_floats(name, x, (batch, length, m), "[B, T, M]")
    if state is not None:
        shape = batch, m, size, value.shape[3]
        check_floats("initial_state", state, shape, "[B, M, H, V]")
    ids = ids_of(segment_ids, (batch, length))
    check_splits((batch, length), {"N": n, "M": m}, layout, shards)
    tensor = axis_size(shards.mesh, shards.axes.tensor)
    heads = Heads(m // tensor, n // tensor, shards.ulysses_size)
    tiles = Tiles(exact=query.dtype.itemsize > 2)
    implementation = kernels.choose(
        implementation,
        target=kernels.target_of(shards.mesh),
        dtype=query.dtype,
        head_size=max(size, value.shape[3]),
        kernels=KERNELS,
    )
    return DeltaCall(shards, heads, layout, tiles, implementation), ids


def shards_of(mesh: Mesh | AbstractMesh | None, axes: MeshAxes) -> Shards:
    """Makes the shards of a mesh, or of one device; `axes.context` is a ring.

    Raises:
      ValueError: `axes.context` is to be split into ring and Ulysses.
    """
    if axes.context_ulysses > 1:
        raise ValueError(
            f"axes.context_ulysses={axes.context_ulysses}: only attention splits the "
            "axis `context`; leave it out, or give the mesh the axes ring and ulysses"
        )
    return Shards(axes=NO_AXES) if mesh is None else Shards.of_mesh(mesh, axes)


def check_floats(name: str, x: jax.Array, shape: tuple[int, ...], letters: str) -> None:
    """Checks that `x` is floating and has a shape."""
    actual, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if dtype is None or actual != shape or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} is {dtype}{actual}, it must be floating {letters} = {list(shape)}"
        )


def ids_of(segment_ids: object, shape: tuple[int, ...]) -> jax.Array | None:
    """Converts segment ids to int32 [B, T]; None stays None."""
    if isinstance(segment_ids, tuple | list):
        raise ValueError(
            f"segment_ids must be one array [B, T], not {len(segment_ids)} arrays"
        )
    sides = arguments.sides_of("segment_ids", segment_ids, shape, shape)
    return None if sides is None else sides[0]


def check_splits(
    shape: tuple[int, ...], heads: dict[str, int], layout: str, shards: Shards
) -> None:
    """Checks that the devices divide the batch, the heads and the layout's length.

    Args:
      shape: [B, T].
      heads: numbers of heads or channels, by their letter.
    """
    check_layout(layout)
    if layout not in LAYOUTS:
        raise ValueError(
            f"{layout=} must be one of {LAYOUTS}: no other layout has runs of "
            "consecutive tokens for a state to pass"
        )
    (batch, length), mesh, axes = shape, shards.mesh, shards.axes
    data, tensor = axis_size(mesh, axes.batch), axis_size(mesh, axes.tensor)
    if batch % data:
        raise ValueError(
            f"the batch, B={batch}, must be a multiple of data·fsdp = {data}"
        )
    for letter, size in heads.items():
        if size % tensor:
            raise ValueError(
                f"{letter}={size} must be a multiple of the mesh axis "
                f"{axes.tensor!r}, {tensor}; give that axis fewer devices"
            )
    if layout == "zigzag":
        devices = 1 if mesh is not None else shards.ring_size * shards.ulysses_size
        what = "T" if devices == 1 else "the length of all shards, T"
        ring_size, ulysses_size = shards.ring_size, shards.ulysses_size
        check_length(length * devices, layout, ring_size, ulysses_size, what)

"""Checks of the arguments of the gated delta rule."""

import jax
import jax.numpy as jnp

from usp_jax import arguments
from usp_jax.delta.contract import Tiles
from usp_jax.delta.split import DeltaCall
from usp_jax.layout import check_layout, check_length
from usp_jax.mesh import axis_size
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
        _check_floats(name, x, (batch, length, m), "[B, T, M]")
    if state is not None:
        shape = batch, m, size, value.shape[3]
        _check_floats("initial_state", state, shape, "[B, M, H, V]")
    ids = arguments.sides_of("segment_ids", segment_ids, query.shape, query.shape)
    if ids is not None and len(ids) > 1:
        raise ValueError("segment_ids must be one array [B, T], not a pair")
    _check_splits(query, value, layout, shards)
    tensor = axis_size(shards.mesh, shards.axes.tensor)
    heads = Heads(m // tensor, n // tensor, shards.ulysses_size)
    call = DeltaCall(shards, heads, layout, Tiles(exact=query.dtype.itemsize > 2))
    return call, None if ids is None else ids[0]


def _check_floats(
    name: str, x: jax.Array, shape: tuple[int, ...], letters: str
) -> None:
    """Checks that `x` is floating and has a shape."""
    actual, dtype = getattr(x, "shape", None), getattr(x, "dtype", None)
    if actual != shape or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name} is {dtype}{actual}, it must be floating {letters} = {list(shape)}"
        )


def _check_splits(
    query: jax.Array, value: jax.Array, layout: str, shards: Shards
) -> None:
    """Checks that the devices divide the batch, the heads and the layout's length."""
    check_layout(layout)
    if layout not in LAYOUTS:
        raise ValueError(
            f"gated_delta cannot take {layout=}: a shard of it has no runs of "
            f"consecutive tokens for a state to pass; use one of {LAYOUTS}"
        )
    mesh, axes = shards.mesh, shards.axes
    data, tensor = axis_size(mesh, axes.batch), axis_size(mesh, axes.tensor)
    if len(query) % data:
        raise ValueError(
            f"the batch, B={len(query)}, must be a multiple of data·fsdp = {data}"
        )
    for letter, x in (("N", query), ("M", value)):
        if x.shape[2] % tensor:
            raise ValueError(
                f"{letter}={x.shape[2]} heads must be a multiple of the mesh axis "
                f"{axes.tensor!r}, {tensor}; give that axis fewer devices"
            )
    if layout == "zigzag":
        devices = 1 if mesh is not None else shards.ring_size * shards.ulysses_size
        length, what = query.shape[1] * devices, "query.shape[1]"
        if devices > 1:
            what = "the length of all shards of query"
        check_length(length, layout, shards.ring_size, shards.ulysses_size, what)

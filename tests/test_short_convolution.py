"""The short convolution on split sequences equals one that walks token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.delta_cases import BATCH, LAYOUTS, MESHES, documents, poisoned, results
from tests.oracle import Order, assert_equal_to, normal
from tests.sampling import thinned
from usp_jax import make_mesh
from usp_jax.delta import short_convolution, short_convolution_per_shard

CHANNELS = 4


def inputs(length, taps):
    """Arguments by name, in natural order."""
    names = "x", "weight", "initial_tail"
    shapes = (BATCH, length, CHANNELS), (CHANNELS, taps), (BATCH, taps - 1, CHANNELS)
    return dict(zip(names, normal(0, *shapes, dtype="float64"), strict=True))


def cotangents(arrays):
    shapes = arrays["x"].shape, arrays["initial_tail"].shape
    return normal(1, *shapes, dtype="float64")


def windows(ids, taps):
    """Indices of what each token sees, and of what is left after the last one.

    They point into [tail, x, 0]. A window moves over the tokens; where a document
    starts, it is emptied.
    """
    nothing = taps - 1 + len(ids)
    window, before, seen, rows = list(range(taps - 1)), -1, False, []
    for t, own in enumerate(ids.tolist()):
        row = [nothing] * taps
        if own != -1:
            if seen and own != before:
                window = [nothing] * (taps - 1)
            row = [*window, taps - 1 + t]
            window, seen = row[1:], True
        rows.append(row)
        before = own
    return np.array(rows), np.array(window)


def by_definition(x, weight, initial_tail, ids):
    """The convolution, and the tail after the last token."""

    def row(x, tail, ids):
        seen, left = windows(ids, weight.shape[1])
        both = jnp.concatenate([tail, x, jnp.zeros_like(x[:1])])
        return jnp.einsum("TWD,DW->TD", both[seen], weight), both[left]

    rows = [row(*xs) for xs in zip(x, initial_tail, np.asarray(ids), strict=True)]
    return tuple(map(jnp.stack, zip(*rows, strict=True)))


@functools.cache
def expected(length, taps, packs):
    with jax.enable_x64(True):
        arrays = inputs(length, taps)
        ids = documents(length) if packs else np.zeros((BATCH, length), int)
        f = functools.partial(by_definition, ids=ids)
        run = jax.jit(functools.partial(results, f))
        return run(arrays, cotangents(arrays))


def check(sizes, layout, packs, length, taps=4, per_shard=False):
    with jax.enable_x64(True):
        mesh = make_mesh(**sizes)
        order = Order(layout, mesh, BATCH, length)
        arrays = inputs(length, taps)
        dy, dtail = cotangents(arrays)
        ids = documents(length) if packs else None
        if packs:
            # Nothing gets out of padding.
            arrays["x"], dy = poisoned(arrays["x"], ids), poisoned(dy, ids)
            ids = order.store(ids)
        arrays["x"] = order.store(arrays["x"])
        f = functools.partial(short_convolution, layout=layout, mesh=mesh)
        if per_shard:
            f = on_shards(mesh, layout)

        def run(arrays, ids, given):
            return results(functools.partial(f, segment_ids=ids), arrays, given)

        actual = jax.jit(run)(arrays, ids, (order.store(dy), dtail))
        actual |= {name: order.restore(actual[name]) for name in ("out", "x")}
        assert_equal_to(expected(length, taps, packs), actual, 1e-10)


def on_shards(mesh, layout):
    """The per-shard form, in a shard_map that checks what varies."""
    tokens = jax.P("data", ("ring", "ulysses"))
    specs = {"x": tokens, "weight": jax.P(), "initial_tail": jax.P("data")}

    def f(segment_ids, **arrays):
        return jax.shard_map(
            lambda arrays, ids: short_convolution_per_shard(
                **arrays, segment_ids=ids, layout=layout
            ),
            mesh=mesh,
            in_specs=(specs, tokens),
            out_specs=(tokens, jax.P("data")),
        )(arrays, segment_ids)

    return f


@pytest.mark.parametrize(
    ("degrees", "layout", "packs", "explicit"),
    thinned(MESHES, LAYOUTS, (False, True), (False, True), keep=23),
)
def test_equals_the_definition(degrees, layout, packs, explicit):
    ring, ulysses = degrees
    sizes = {"ring": ring, "ulysses": ulysses, "explicit": explicit}
    check(sizes, layout, packs, length=48)


def test_a_tail_reaches_over_several_shards():
    """Runs of 2 tokens and 4 before each: the halo comes from two runs."""
    check({"ring": 4, "ulysses": 2}, "zigzag", False, length=32, taps=5)


def test_shards_of_the_caller():
    sizes = {"ring": 2, "ulysses": 2, "data": 2}
    check(sizes, "zigzag", True, length=48, per_shard=True)


def test_any_length_on_a_mesh_with_tensor():
    check({"ring": 2, "ulysses": 2, "tensor": 2}, "contiguous", True, length=45)

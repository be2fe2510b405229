"""The gated delta rule on split sequences equals the token-by-token oracle.

Outputs, states and all gradients in float64; and mistakes raise.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.delta_cases import (
    BATCH,
    BY_TOKEN,
    LAYOUTS,
    MESHES,
    H,
    V,
    cotangents,
    documents,
    inputs,
    poisoned,
    results,
)
from tests.oracle import Order, assert_equal_to, normal
from tests.sampling import thinned
from usp_jax import gated_delta, gated_delta_per_shard, make_mesh
from usp_jax.delta.contract import DeltaTokens, Map, Tiles
from usp_jax.delta.documents import document_starts
from usp_jax.delta.maps import by_doubling, from_gathered, order_of
from usp_jax.delta.reference import reference_gated_delta
from usp_jax.delta.xla import XLA, unit_inverse


@functools.cache
def oracle(heads, length, packs):
    with jax.enable_x64(True):
        arrays = inputs(heads, length)
        ids = documents(length) if packs else None
        f = functools.partial(reference_gated_delta, segment_ids=ids)
        return jax.jit(functools.partial(results, f))(arrays, cotangents(arrays))


def check(sizes, layout, heads, *, packs, length, per_shard=False):
    """Results in float64 on a mesh, against the oracle's."""
    expected = oracle(heads, length, packs)
    with jax.enable_x64(True):
        mesh = make_mesh(**sizes)
        order = Order(layout, mesh, BATCH, length)
        arrays = inputs(heads, length)
        dout, dstate = cotangents(arrays)
        ids = documents(length) if packs else None
        if packs:
            # Nothing gets out of padding.
            arrays |= {name: poisoned(arrays[name], ids) for name in BY_TOKEN}
            dout, ids = poisoned(dout, ids), order.store(ids)
        arrays |= {name: order.store(arrays[name]) for name in BY_TOKEN}
        f = functools.partial(gated_delta, layout=layout, mesh=mesh)
        if per_shard:
            f = on_shards(mesh, layout)

        def run(arrays, ids, given):
            return results(functools.partial(f, segment_ids=ids), arrays, given)

        actual = jax.jit(run)(arrays, ids, (order.store(dout), dstate))
        restored = ("out", *BY_TOKEN)
        actual |= {name: order.restore(actual[name]) for name in restored}
        assert_equal_to(expected, actual, 1e-10)


def on_shards(mesh, layout):
    """The per-shard form, in a shard_map that checks what varies."""
    tokens, state = (
        jax.P("data", ("ring", "ulysses"), "tensor"),
        jax.P("data", "tensor"),
    )
    specs = dict.fromkeys(BY_TOKEN, tokens) | {"initial_state": state}

    def f(segment_ids, **arrays):
        ids = jax.P("data", ("ring", "ulysses"))
        return jax.shard_map(
            lambda arrays, ids: gated_delta_per_shard(
                **arrays, segment_ids=ids, layout=layout
            ),
            mesh=mesh,
            in_specs=(specs, ids),
            out_specs=(tokens, state),
        )(arrays, segment_ids)

    return f


# Ulysses divides both, none, or those of v only.
HEADS = ((8, 16), (3, 6), (2, 8))


@pytest.mark.parametrize(
    ("degrees", "layout", "packs", "explicit", "heads"),
    thinned(MESHES, LAYOUTS, (False, True), (False, True), HEADS, keep=46),
)
def test_equals_the_oracle(degrees, layout, packs, explicit, heads):
    ring, ulysses = degrees
    sizes = {"ring": ring, "ulysses": ulysses, "explicit": explicit}
    check(sizes, layout, heads, packs=packs, length=160)


def test_shards_of_the_caller():
    sizes = {"ring": 2, "ulysses": 2, "data": 2}
    check(sizes, "zigzag", (3, 6), packs=True, length=80, per_shard=True)


def test_any_length_on_a_mesh_with_tensor():
    sizes = {"ring": 2, "ulysses": 2, "tensor": 2}
    check(sizes, "contiguous", (2, 6), packs=True, length=75)


@pytest.mark.parametrize(("ring", "layout"), [(5, "contiguous"), (6, "zigzag")])
def test_states_by_doubling(ring, layout):
    """Both ways equal the maps one after the other, also in reverse."""
    order, mesh = order_of(layout, ring), make_mesh(ring=ring)
    shape = ring, BATCH, order.slots, 3
    a, b, start = normal(0, (*shape, H, H), (*shape, H, V), (BATCH, 3, H, V))
    a, of_shard = a / H, jax.P("ring")

    def on_device(a, b):
        index, ways = jax.lax.axis_index("ring"), (from_gathered, by_doubling)
        maps = Map(a[0], b[0])
        return [
            way(maps, start, one, "ring", index)[None]
            for one in (order, order.reversed)
            for way in ways
        ]

    run = jax.shard_map(on_device, mesh=mesh, in_specs=of_shard, out_specs=of_shard)
    actual = jax.jit(run)(a, b)
    for one, pair in ((order, actual[:2]), (order.reversed, actual[2:])):
        state, expected = start, np.empty(b.shape)
        for device, slot in one.chunks:
            expected[device, :, slot] = state
            state = a[device, :, slot] @ state + b[device, :, slot]
        for before in pair:
            np.testing.assert_allclose(before, expected, rtol=0, atol=1e-5)


TILES = Tiles(block=8, blocks=2)


def chunks(packs):
    """Two chunks of 45 tokens, 3 segments, with 2 heads of v for each of q and k."""
    arrays = inputs((2, 4), 45)
    ids = documents(45) if packs else jnp.zeros((BATCH, 45), jnp.int32)
    real = ids != -1
    q, k, v, decay, beta = (
        jnp.where(jnp.expand_dims(real, range(2, x.ndim)), x, 0)
        for x in (arrays[name] for name in BY_TOKEN)
    )
    starts = None
    if packs:
        starts = document_starts(ids[:, None], order_of("contiguous", 1), None, 0)[:, 0]
    v, decay, beta = (
        x.reshape(BATCH, 45, 2, 2, *x.shape[3:]) for x in (v, decay, beta)
    )
    tokens = DeltaTokens(q, k, v, decay, beta, starts)
    return arrays, tokens, arrays["initial_state"].reshape(BATCH, 2, 2, H, V), real


@pytest.mark.parametrize("packs", [pytest.param(False, marks=pytest.mark.long), True])
def test_a_chunk_of_several_segments(packs):
    with jax.enable_x64(True):
        arrays, tokens, state, real = chunks(packs)
        expected = oracle((2, 4), 45, packs)
        dout, dafter = cotangents(arrays)
        # The contract leaves padding to its caller.
        dout = jnp.where(real[..., None, None], dout, 0).reshape(tokens.v.shape)
        dafter = dafter.reshape(state.shape)

        @jax.jit
        def run():
            out, after, kept = XLA.run(tokens, state, TILES)
            grads, dstate = XLA.run_backward(tokens, kept, dout, dafter, TILES)
            maps = XLA.map_of(tokens, TILES)
            return out, after, grads, dstate, maps, XLA.adjoint(tokens, dout, TILES)

        out, after, grads, dstate, maps, adjoint = run()
        values = grads.q, grads.k, grads.v, grads.log_decay, grads.beta
        actual = dict(zip(BY_TOKEN, values, strict=True))
        actual |= {"out": out, "after": after, "initial_state": dstate}
        actual = {name: x.reshape(expected[name].shape) for name, x in actual.items()}
        for name in BY_TOKEN:
            x = actual[name]
            actual[name] = jnp.where(jnp.expand_dims(real, range(2, x.ndim)), x, 0)
        assert_equal_to(expected, actual, 1e-10)
        # The map and its transpose are those of the run.
        np.testing.assert_allclose(maps.a @ state + maps.b, after, atol=1e-10)
        transposed = maps.a.swapaxes(-1, -2) @ dafter + adjoint
        np.testing.assert_allclose(transposed, dstate, atol=1e-10)


def test_an_inverse_of_a_triangle():
    with jax.enable_x64(True):
        lower = jnp.tril(normal(0, (3, 64, 64), dtype="float64")[0], -1) / 8
        identity = jnp.broadcast_to(jnp.eye(64), lower.shape)
        product = (identity + lower) @ unit_inverse(lower)
        np.testing.assert_allclose(product, identity, rtol=0, atol=1e-10)


def test_second_derivatives_raise():
    arrays = inputs((1, 1), 8, "float32")

    def loss(key):
        return jnp.sum(gated_delta(**(arrays | {"key": key}))[0])

    with pytest.raises(ValueError, match="can be differentiated only once"):
        jax.grad(lambda key: jnp.sum(jax.grad(loss)(key)))(arrays["key"])


WRONG = {
    "key": ({"key": jnp.zeros((2, 8, 1, H))}, "key.shape=.* must be query.shape="),
    "dtype": ({"value": jnp.zeros((2, 8, 4, V), "bfloat16")}, "value.dtype=bfloat16"),
    "length": (
        {"value": jnp.zeros((2, 9, 4, V))},
        r"must start with \[B, T\] = \(2, 8",
    ),
    "heads": ({"value": jnp.zeros((2, 8, 3, V))}, "M=3, must be a multiple of .*, N=2"),
    "decay": ({"log_decay": jnp.zeros((2, 8, 2))}, r"log_decay is .* = \[2, 8, 4\]"),
    "beta": ({"beta": jnp.zeros((2, 8, 4), int)}, "beta is int32.* must be floating"),
    "state": (
        {"initial_state": jnp.zeros((2, 4, V, H))},
        r"\[B, M, H, V\] = \[2, 4, 5",
    ),
    "ids": ({"segment_ids": jnp.zeros((2, 7), int)}, "segment_ids .* has shape"),
    "pair": ({"segment_ids": (jnp.zeros((2, 8), int),) * 2}, "one array .*, not 2"),
    "striped": ({"layout": "striped"}, "layout='striped' must be one of .*'zigzag'"),
    "data": ({"layout": "data"}, "layout='data' must be one of"),
    "other": ({"layout": "zebra"}, "layout='zebra' must be one of .*'striped'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_raise(case, no_type_checks):
    arrays = inputs((2, 4), 8, "float32")
    wrong, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        gated_delta(**(arrays | wrong))


@pytest.mark.parametrize(
    ("sizes", "layout", "message"),
    [
        ({"data": 4}, "contiguous", r"B=2, must be a multiple of data·fsdp = 4"),
        ({"tensor": 8}, "contiguous", "N=2 must be a multiple of .* 'tensor', 8"),
        ({"ring": 8}, "zigzag", "T=8 must be a multiple of 16"),
    ],
)
def test_sizes_that_a_mesh_cannot_split_raise(sizes, layout, message):
    arrays = inputs((2, 4), 8, "float32")
    with pytest.raises(ValueError, match=message):
        gated_delta(**arrays, layout=layout, mesh=make_mesh(**sizes))


def test_tiles_that_cannot_be_raise():
    with pytest.raises(ValueError, match="block=48 must be a power of two"):
        Tiles(block=48)
    with pytest.raises(ValueError, match="blocks=0 must be a positive int"):
        Tiles(blocks=0)

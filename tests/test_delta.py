"""The gated delta rule on split sequences equals the token-by-token oracle.

Outputs, states and all gradients in float64; what is sent, computed and refused.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.delta_cases import BATCH, LAYOUTS, MESHES, documents, results
from tests.oracle import Order, assert_equal_to, normal
from tests.sampling import thinned
from usp_jax import gated_delta, gated_delta_per_shard, make_mesh
from usp_jax.delta.reference import reference_gated_delta

H, V = 5, 3
NAMES = ("query", "key", "value", "log_decay", "beta", "initial_state")
BY_TOKEN = NAMES[:5]


def inputs(heads, length, dtype="float64"):
    """Arguments by name, in natural order: decays from near 0 to near -20."""
    n, m = heads
    shapes = [(BATCH, length, n, H)] * 2 + [(BATCH, length, m, V)]
    shapes += [(BATCH, length, m)] * 2 + [(BATCH, m, H, V)]
    arrays = dict(zip(NAMES, normal(0, *shapes, dtype=dtype), strict=True))
    scale = np.random.default_rng(1).choice([1e-3, 0.5, 20.0], (BATCH, length, m))
    decay = -scale * (1 - 0.1 * np.abs(np.tanh(arrays["log_decay"])))
    # Keys of about length 1 keep the state bounded.
    arrays["key"] /= H**0.5
    arrays["log_decay"] = jnp.asarray(decay, dtype)
    arrays["beta"] = jax.nn.sigmoid(arrays["beta"])
    return arrays


def cotangents(arrays, seed=2):
    batch, length, m, _ = arrays["value"].shape
    dtype = arrays["initial_state"].dtype
    return normal(seed, (batch, length, m, V), (batch, m, H, V), dtype=dtype)


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
        arrays |= {name: order.store(arrays[name]) for name in BY_TOKEN}
        ids = order.store(documents(length)) if packs else None
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
    thinned(MESHES, LAYOUTS, (False, True), (False, True), HEADS, keep=1),
)
def test_equals_the_oracle(degrees, layout, packs, explicit, heads):
    ring, ulysses = degrees
    sizes = {"ring": ring, "ulysses": ulysses, "explicit": explicit}
    check(sizes, layout, heads, packs=packs, length=160)

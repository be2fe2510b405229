"""A call with a window sends a halo: the oracle's results, the bytes, and when.

Tokens are few, so that a window reaches past a device's own ones.
"""

import jax
import jax.numpy as jnp
import pytest

import usp_jax
from tests.oracle import Order, assert_equal_to, expected, normal, packed, results
from tests.sampling import thinned

BATCH, HEAD_SIZE, TOKENS = 2, 4, 4
MESHES = ((8, 1), (4, 2), (2, 4), (1, 8), (3, 1), (1, 3), (2, 3))
LAYOUTS = ("contiguous", "zigzag")
# Below a shard of 4 tokens, equal to it (with the query's own token), above it, and
# several pieces. The last ones look forward too.
WINDOWS = {
    "below": {"is_causal": True, "local_window_size": (2, 0)},
    "shard": {"is_causal": True, "local_window_size": (3, None)},
    "above": {"is_causal": True, "local_window_size": (6, 9)},
    "two sides": {"local_window_size": (3, 2)},
    "several": {"local_window_size": (1, 6)},
}
# Ulysses divides neither 3 nor, at 4 and 8, 2 key/value heads.
HEADS = ((6, 3), (4, 2))


@pytest.mark.parametrize(
    ("degrees", "layout", "packs", "window", "heads"),
    thinned(MESHES, LAYOUTS, (False, True), WINDOWS, HEADS, keep=41),
)
def test_equals_the_oracle(degrees, layout, packs, window, heads):
    check(degrees, layout, heads, packs=packs, explicit=packs, **WINDOWS[window])


def check(degrees, layout, heads, *, packs, explicit=False, **masks):
    ring, ulysses = degrees
    (n, k), h, length = heads, HEAD_SIZE, TOKENS * ring * ulysses
    with jax.enable_x64(True):
        mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses, explicit=explicit)
        order = Order(layout, mesh, BATCH, length)
        q, kv = (BATCH, length, n, h), (BATCH, length, k, h)
        *arrays, dout, dlse = normal(0, q, kv, kv, (n,), q, q[:3], dtype=jnp.float64)
        ids = packed(BATCH, length) if packs else None
        oracle = expected(
            arrays,
            (dout, dlse),
            segment_ids=None if ids is None else jnp.asarray(ids),
            **masks,
        )

        def attend(q, k, v, sinks):
            return usp_jax.usp_attention(
                q,
                k,
                v,
                sinks=sinks,
                segment_ids=None if ids is None else order.store(ids),
                layout=layout,
                mesh=mesh,
                return_residual=True,
                **masks,
            )

        stored = [*map(order.store, arrays[:3]), arrays[3]]
        cotangents = [order.store(x) for x in (dout, dlse)]
        found = jax.jit(lambda *args: results(attend, *args))(stored, cotangents)
        restored = {
            name: x if name == "dsinks" else order.restore(x)
            for name, x in found.items()
        }
        assert_equal_to(oracle, restored, 1e-10)

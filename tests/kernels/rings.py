"""A call on eight devices around an emulated package, compared with the oracle."""

import functools

import jax

import usp_jax
from tests.oracle import Order, assert_equal_to, expected, normal, results

T = 64
RINGS = [(2, 4), (4, 2), (8, 1)]
LAYOUTS = ("zigzag", "contiguous", "striped")
CAUSAL = {"is_causal": True}
# Below a chunk, between a chunk and a shard, and above a shard, of ring=4.
SHORT, LONG = CAUSAL | {"local_window_size": (5, 0)}, {"local_window_size": (22, 9)}
LONGER, LEFT = (
    CAUSAL | {"local_window_size": (37, 0)},
    {"local_window_size": (11, None)},
)


def check_ring(
    implementation,
    degrees,
    layout,
    mask,
    sizes=(16, 16),
    kv_heads=4,
    segment_ids=None,
):
    """Results and gradients on eight devices, in float64 within 1e-10."""
    mesh = usp_jax.make_mesh(ring=degrees[0], ulysses=degrees[1])
    q, k, v = (
        (2, T, 8, sizes[0]),
        (2, T, kv_heads, sizes[0]),
        (2, T, kv_heads, sizes[1]),
    )
    order = Order(layout, mesh, 2, T)
    attend = functools.partial(
        usp_jax.usp_attention,
        layout=layout,
        mesh=mesh,
        implementation=implementation,
        return_residual=True,
        segment_ids=None if segment_ids is None else order.store(segment_ids),
        **mask,
    )
    with jax.enable_x64(True):
        arrays = normal(5, q, k, v, dtype="float64")
        cotangents = normal(6, (*q[:3], sizes[1]), q[:3], dtype="float64")
        exact = expected(arrays, cotangents, segment_ids=segment_ids, **mask)
        stored = jax.tree.map(order.store, (arrays, cotangents))
        actual = jax.jit(lambda *args: results(attend, *args))(*stored)
        assert_equal_to(exact, jax.tree.map(order.restore, actual), 1e-10)

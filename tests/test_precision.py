"""16-bit errors: at most twice one device's, and flat in the length of the ring."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.oracle import expected, normal, results
from tests.sampling import thinned

B, T, N, K, H = 1, 512, 8, 8, 16
# Results that are rounded to 16 bits; lse is not.
ROUNDED = ("out", "dq", "dk", "dv")
DTYPES = ("bfloat16", "float16")
LONG = pytest.mark.long


def inputs(dtype):
    q, kv = (B, T, N, H), (B, T, K, H)
    *arrays, dout, dlse = normal(5, q, kv, kv, q, q[:3], dtype=dtype)
    # lse is compared as a result only: its cotangent would not be a bfloat16 number.
    return arrays, (dout, jnp.zeros_like(dlse))


@functools.cache
def errors(ring, ulysses, dtype):
    """Root mean square errors against float32 on the same rounded inputs, by name."""
    arrays, cotangents = inputs(dtype)
    options = {"is_causal": True, "return_residual": True}
    if ring * ulysses == 1:
        attend = functools.partial(usp_jax.flash_attention, **options)
    else:
        mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
        attend = functools.partial(usp_jax.usp_attention, mesh=mesh, **options)
    actual = jax.jit(lambda *args: results(attend, *args))(arrays, cotangents)
    return {
        name: float(np.sqrt(np.mean((np.float64(actual[name]) - exact) ** 2)))
        for name, exact in truth(dtype).items()
    }


@functools.cache
def truth(dtype):
    arrays, cotangents = jax.tree.map(jnp.float32, inputs(dtype))
    return jax.tree.map(np.float64, expected(arrays, cotangents, is_causal=True))


@pytest.mark.parametrize(
    ("degrees", "dtype"),
    thinned([(2, 4), (8, 1), (1, 8), (4, 2)], ["float16", "bfloat16"], keep=8),
)
def test_at_most_twice_the_error_of_one_device(degrees, dtype):
    one, here = errors(1, 1, dtype), errors(*degrees, dtype)
    for name in ROUNDED:
        assert here[name] <= 2 * one[name], name


@pytest.mark.parametrize(
    ("rings", "dtype"), thinned([(1, 8), (1, 2, 4, 8)], ["bfloat16", "float16"], keep=4)
)
def test_flat_from_one_ring_shard_to_eight(rings, dtype):
    by_ring = [errors(ring, 8 // ring, dtype) for ring in rings]
    for name in ROUNDED:
        row = [error[name] for error in by_ring]
        assert max(row) <= 1.2 * row[0], (name, row)


def test_the_error_is_about_that_of_one_rounding():
    """out of bfloat16 has about the error of rounding the exact result."""
    exact = truth("bfloat16")["out"]
    rounded = np.float64(jnp.asarray(exact, jnp.bfloat16))
    rounding = np.sqrt(np.mean((rounded - exact) ** 2))
    assert errors(8, 1, "bfloat16")["out"] <= 2.5 * rounding


@pytest.mark.parametrize(
    ("degrees", "dtype"),
    [
        *thinned([(1, 8), (8, 1)], ["bfloat16"], keep=1),
        *thinned([(2, 4)], ["float16", "bfloat16"], keep=2),
        *(pytest.param(d, "float16", marks=LONG) for d in [(1, 8), (8, 1)]),
        *(pytest.param(d, t, marks=LONG) for d in [(1, 1), (4, 2)] for t in DTYPES),
    ],
)
def test_lse_has_float32_precision(degrees, dtype):
    assert errors(*degrees, dtype)["lse"] <= 1e-6

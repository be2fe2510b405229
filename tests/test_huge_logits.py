"""Logits beyond 1e9, whose float32 neighbours are hundreds apart, give finite results.

They cannot be exact there, but the row maximum and the exponent have to agree.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.oracle import normal, results
from tests.sampling import thinned
from usp_jax.kernels.logits import lowered, raised

T, N, H = 64, 2, 8
# Those whose weights add up to 1 for any logits; the others may lose whole rows.
WHOLE = ("xla", "reference", "mosaic_tpu_interpret")
KERNELS = (*WHOLE, "triton_interpret", "mosaic_gpu_interpret")
SIZES = (3e4, 5e4, 1e6)


@pytest.mark.parametrize(
    ("implementation", "is_causal"), thinned(KERNELS, [True, False], keep=2)
)
def test_huge_logits_give_finite_results(implementation, is_causal):
    if "mosaic_gpu" in implementation and jax.__version_info__ < (0, 11):
        pytest.skip("NO INTERPRETER OF mosaic_gpu BEFORE jax 0.11")
    attend = functools.partial(
        usp_jax.flash_attention,
        implementation=implementation,
        is_causal=is_causal,
        return_residual=True,
    )
    run = jax.jit(lambda *args: results(attend, *args))
    dtype = jnp.bfloat16 if "mosaic_gpu" in implementation else jnp.float32
    shape = (1, T, N, H)
    q, k, v, dout, dlse = normal(0, *[shape] * 4, shape[:3], dtype=dtype)
    # Its first column adds up the weights.
    v = v.at[..., 0].set(1)
    for size in SIZES:
        actual = run((q * size, k * size, v), (dout, dlse))
        for name, x in actual.items():
            assert jnp.isfinite(x).all(), (name, size)
        weights = np.unique(np.asarray(actual["out"][..., 0], np.float32).round(2))
        assert set(weights) <= ({1} if implementation in WHOLE else {0, 1}), size


def test_usual_maxima_are_neither_raised_nor_lowered():
    m = jnp.asarray([-np.inf, -1e7, -1.5, 0, 1e-9, 7, 1e7, 3e8], jnp.float32)
    for error in (0.5, 2.5):
        np.testing.assert_array_equal(raised(m, error, jnp.bfloat16), m)
    huge = jnp.asarray([-1e12, 1e12], jnp.float32)
    assert (raised(huge, 2.5, jnp.float32) - huge >= 5e12 * 2**-24).all()
    np.testing.assert_array_equal(lowered(m[:-1]), m[:-1])
    assert (huge - lowered(huge) >= 1e12 * 2**-24).all()

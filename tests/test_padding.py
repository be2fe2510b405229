"""Whatever bits padded tokens hold, nothing else of a call depends on them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.oracle import normal, packed, results
from tests.sampling import thinned

B, T, N, K, H = 2, 32, 4, 2, 8
KERNELS = ("xla", "reference", "mosaic_tpu_interpret", "triton_interpret")
BITS = (np.nan, np.inf, -np.inf)


def ids():
    """Documents that differ between the rows; row 1 has more padding, some inside."""
    result = packed(B, T)
    result[1, 7:10] = -1
    return jnp.asarray(result)


def inputs(in_padding):
    """(arrays, cotangents) with a value in each padded token."""
    q, kv = (B, T, N, H), (B, T, K, H)
    arrays = normal(0, q, kv, kv, q, q[:3])
    padding = np.asarray(ids()) == -1

    def fill(x):
        return jnp.where(padding.reshape(B, T, *(1,) * (x.ndim - 2)), in_padding, x)

    *arrays, dout, dlse = map(fill, arrays)
    return arrays, (dout, dlse)


def compiled(**options):
    """A function from what is in padding to the results and gradients of a call."""
    attend = functools.partial(
        usp_jax.usp_attention,
        segment_ids=ids(),
        is_causal=True,
        return_residual=True,
        **options,
    )
    run = jax.jit(lambda *args: results(attend, *args))
    return lambda in_padding: run(*inputs(in_padding))


@pytest.mark.parametrize(
    ("degrees", "explicit"),
    thinned([(4, 2), (2, 4), (8, 1), (1, 8)], [True, False], keep=8),
)
def test_padding_may_hold_anything(degrees, explicit):
    ring, ulysses = degrees
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses, explicit=explicit)
    run = compiled(mesh=mesh)
    expected = run(0.0)
    for bits in BITS:
        chex.assert_trees_all_equal(run(bits), expected)
    padding = np.asarray(ids()) == -1
    for name in ("out", "dq", "dk", "dv"):
        assert not np.asarray(expected[name])[padding].any(), name
    assert (np.asarray(expected["lse"])[padding] == -np.inf).all()


@pytest.mark.parametrize("implementation", KERNELS[1:])
def test_padding_may_hold_anything_in_each_kernel(implementation):
    run = compiled(mesh=usp_jax.make_mesh(ring=2), implementation=implementation)
    chex.assert_trees_all_equal(run(np.nan), run(0.0))


@pytest.mark.parametrize(
    "options", thinned([{"ring_schedule": "pass_q"}, {"ulysses_chunks": 2}], keep=2)
)
def test_padding_may_hold_anything_in_other_schedules(options):
    run = compiled(mesh=usp_jax.make_mesh(ring=2), **options)
    chex.assert_trees_all_equal(run(np.nan), run(0.0))


def test_padding_of_a_cache_may_hold_anything():
    mesh = usp_jax.make_mesh(ring=2, ulysses=2)
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))

    def decode(in_padding):
        (q, k, v), _ = inputs(in_padding)
        half = T // 2
        cache = usp_jax.KVCache.of(
            k[:, :half], v[:, :half], segment_ids=ids()[:, :half], mesh=mesh
        )
        cache = cache.append(
            k[:, half:],
            v[:, half:],
            positions=positions[:, half:],
            segment_ids=ids()[:, half:],
        )
        return usp_jax.decode_attention(
            q, cache, positions=positions, segment_ids=ids(), return_residual=True
        )

    expected = decode(0.0)
    for bits in BITS:
        chex.assert_trees_all_equal(decode(bits), expected)


def test_padding_of_joint_tokens_may_hold_anything():
    mesh = usp_jax.make_mesh(ring=2, ulysses=2)
    (q, k, v), _ = inputs(np.nan)
    cleaned, _ = inputs(0.0)
    joint = normal(1, (B, 5, N, H), (B, 5, K, H), (B, 5, K, H))
    own = jnp.asarray([[0] * 5, [0, 0, 0, -1, -1]], jnp.int32)
    hidden = [jnp.where((own == -1)[..., None, None], jnp.nan, x) for x in joint]
    attend = functools.partial(
        usp_jax.usp_joint_attention, segment_ids=ids(), joint_segment_ids=own, mesh=mesh
    )
    chex.assert_trees_all_equal(attend(q, k, v, *hidden), attend(*cleaned, *joint))

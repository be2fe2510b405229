"""Laws of the op: its special cases, causality, padding, linearity, determinism."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import usp_jax
from tests.oracle import Order, assert_equal_to, expected, normal, packed, results
from tests.sampling import thinned

B, T, N, K, H = 2, 16, 4, 2, 4
DEGREES = ((1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (2, 4), (8, 1), (1, 8))


def inputs(dtype=jnp.float32):
    q, kv = (B, T, N, H), (B, T, K, H)
    *arrays, dout, dlse = normal(0, q, kv, kv, q, q[:3], dtype=dtype)
    return arrays, (dout, dlse)


def attend_on(ring, ulysses, **options):
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
    return functools.partial(
        usp_jax.usp_attention, mesh=mesh, return_residual=True, **options
    )


def run(attend, arrays, cotangents):
    return jax.jit(lambda *args: results(attend, *args))(arrays, cotangents)


def test_no_ring_and_no_ulysses_is_flash_attention_bit_for_bit():
    flash = functools.partial(
        usp_jax.flash_attention, is_causal=True, return_residual=True
    )
    one = run(flash, *inputs())
    chex.assert_trees_all_equal(run(attend_on(1, 1, is_causal=True), *inputs()), one)


def test_ulysses_alone_is_flash_attention_to_2e_6():
    """R = 1: every device has all tokens of its heads, so nothing is merged."""
    flash = functools.partial(
        usp_jax.flash_attention, is_causal=True, return_residual=True
    )
    actual = run(attend_on(1, 2, is_causal=True), *inputs())
    expected = run(flash, *inputs())
    chex.assert_trees_all_close(actual, expected, atol=2e-6)


def collectives_of(attend):
    text = str(jax.make_jaxpr(attend)(*inputs()[0]))
    return {name for name in ("ppermute", "all_to_all") if f"{name}[" in text}


@pytest.mark.parametrize(
    ("degrees", "names"),
    [
        ((1, 1), ()),
        ((2, 1), ("ppermute",)),
        ((1, 2), ("all_to_all",)),
        ((2, 2), ("all_to_all", "ppermute")),
    ],
    ids=str,
)
def test_ring_alone_exchanges_no_heads_and_ulysses_alone_rotates_nothing(
    degrees, names
):
    assert collectives_of(attend_on(*degrees)) == set(names)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(x, marks=() if x == "zigzag" else pytest.mark.long)
        for x in usp_jax.layout.LAYOUTS
    ],
)
def test_causality(layout):
    """Tokens after position t do not affect output t: their gradient is exactly 0."""
    t, mesh = 6, usp_jax.make_mesh(ring=4, ulysses=2)
    order = Order(layout, mesh, B, T)
    (q, k, v), _ = inputs()
    # The first t + 1 outputs, in whatever order they are stored.
    first = order.store(np.broadcast_to(np.arange(T) <= t, (B, T)))

    def loss(q, k, v):
        out, lse = usp_jax.usp_attention(
            q,
            k,
            v,
            is_causal=True,
            positions=order.positions,
            layout=layout,
            mesh=mesh,
            return_residual=True,
        )
        weight = first.astype(out.dtype)[..., None]
        return jnp.sum(out * weight[..., None]) + jnp.sum(lse * weight)

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*map(order.store, (q, k, v)))
    for grad in map(order.restore, grads):
        assert not grad[:, t + 1 :].any()
        assert grad[:, : t + 1].any((2, 3)).all()


@pytest.mark.parametrize(
    ("degrees", "explicit"), thinned(DEGREES[-4:], [False, True], keep=8)
)
def test_a_shard_of_padding_is_zero_and_nowhere_nan(degrees, explicit):
    ring, ulysses = degrees
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses, explicit=explicit)
    ids = np.zeros((B, T), np.int32)
    # The last two devices of row 0 hold only padding, and so do all of row 1's.
    ids[0, -T // 4 :], ids[1] = -1, -1
    ids = jnp.asarray(ids)
    attend = functools.partial(
        usp_jax.usp_attention,
        is_causal=True,
        segment_ids=ids,
        mesh=mesh,
        return_residual=True,
    )
    actual = run(attend, *inputs())
    lse = np.asarray(actual["lse"])
    assert (lse[np.asarray(ids) == -1] == -np.inf).all()
    for name in ("out", "dq", "dk", "dv"):
        x = np.asarray(actual[name])
        assert np.isfinite(x).all(), name
        assert not x[np.asarray(ids) == -1].any(), name
    oracle = expected(*inputs(), is_causal=True, segment_ids=ids)
    assert_equal_to(oracle, actual, 2e-5)


def test_documents_do_not_see_each_other():
    """A packed row gives the results of its documents one by one."""
    ids = packed(1, T, padding=False)
    (q, k, v), _ = inputs()
    q, k, v = q[:1], k[:1], v[:1]
    attend = attend_on(2, 2, is_causal=True)
    out, lse = attend(q, k, v, segment_ids=jnp.asarray(ids))
    for document in np.unique(ids):
        own = ids[0] == document
        alone = usp_jax.flash_attention(
            q[:, own], k[:, own], v[:, own], is_causal=True, return_residual=True
        )
        chex.assert_trees_all_close((out[:, own], lse[:, own]), alone, atol=2e-6)


@pytest.mark.parametrize("degrees", thinned([(4, 2), (1, 8), (8, 1)], keep=3))
def test_is_a_linear_function_of_the_values(degrees):
    (q, k, v), _ = inputs()
    attend = jax.jit(lambda v: attend_on(*degrees)(q, k, v)[0])
    chex.assert_trees_all_close(attend(3 * v), 3 * attend(v), atol=1e-5)
    chex.assert_trees_all_close(attend(jnp.ones_like(v)), jnp.ones_like(q), atol=1e-6)


@pytest.mark.parametrize("degrees", thinned([(2, 2), (1, 1), (4, 2)], keep=3))
def test_equal_values_leave_queries_and_keys_no_gradient(degrees):
    """Any weights give the same output; in 16 bits too, up to float32 rounding."""
    (q, k, v), (dout, dlse) = inputs(jnp.bfloat16)
    v = jnp.broadcast_to(v[:, :1], v.shape)
    attend = attend_on(*degrees, is_causal=True)
    actual = run(attend, (q, k, v), (dout, jnp.zeros_like(dlse)))
    for name in ("dq", "dk"):
        assert jnp.max(jnp.abs(actual[name])) < 1e-5, name
    assert jnp.max(jnp.abs(actual["dv"])) > 1


@pytest.mark.long
def test_lse_does_not_depend_on_how_the_keys_are_split():
    (q, k, v), _ = inputs()
    lse = [np.asarray(jax.jit(attend_on(*d))(q, k, v)[1]) for d in DEGREES]
    for other in lse[1:]:
        np.testing.assert_allclose(other, lse[0], atol=2e-6)


@pytest.mark.long
@pytest.mark.parametrize("degrees", [(4, 2), (8, 1)], ids=str)
def test_runs_the_same_bits_twice(degrees):
    program = jax.jit(lambda *args: results(attend_on(*degrees, is_causal=True), *args))
    chex.assert_trees_all_equal(program(*inputs()), program(*inputs()))


@pytest.mark.parametrize("implementation", thinned(["reference", "xla"], keep=2))
def test_implementations_agree_in_the_ring(implementation):
    options = {"is_causal": True, "local_window_size": (9, 3)}
    attend = attend_on(2, 2, implementation=implementation, **options)
    assert_equal_to(expected(*inputs(), **options), run(attend, *inputs()), 2e-5)


def test_sinks_have_a_gradient_on_every_axis():
    """Gradients are summed over batch, ring and ulysses from each device's part."""
    mesh = usp_jax.make_mesh(ring=2, ulysses=2, data=2)
    arrays, cotangents = inputs()
    (sinks,) = normal(4, (N,))
    ids = jnp.asarray(packed(B, T))

    def attend(q, k, v, sinks):
        return usp_jax.usp_attention(
            q,
            k,
            v,
            sinks=sinks,
            segment_ids=ids,
            is_causal=True,
            mesh=mesh,
            return_residual=True,
        )

    arrays = [*arrays, sinks]
    oracle = expected(arrays, cotangents, is_causal=True, segment_ids=ids)
    assert_equal_to(oracle, run(attend, arrays, cotangents), 2e-5)

"""The flax layer of the gated delta rule equals a plain one, split or in steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.delta_cases import BATCH, documents
from tests.oracle import Order, normal
from tests.test_short_convolution import by_definition
from usp_jax import make_mesh
from usp_jax.delta.reference import reference_gated_delta
from usp_jax.nn import USPGatedDelta

D, N, M, H, V, LENGTH = 6, 2, 4, 4, 3, 24


def layer(**options):
    return USPGatedDelta(
        D,
        N,
        num_v_heads=M,
        head_size=H,
        value_size=V,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
        **options,
    )


def plain(params, x, ids):
    """The layer as its docstring describes it, without usp_jax's functions."""
    qkv = jnp.einsum("BTD,DNC->BTNC", x, params["qkv"]["kernel"])
    taps = params["conv"].shape[1]
    tail = jnp.zeros((BATCH, taps - 1, qkv[0, 0].size))
    flat = qkv.reshape(BATCH, LENGTH, -1)
    mixed = nnx.silu(by_definition(flat, params["conv"], tail, ids)[0])
    q, k, v = jnp.split(mixed.reshape(qkv.shape), (H, 2 * H), -1)
    q, k = (y / jnp.sqrt(jnp.sum(y**2, -1, keepdims=True) + 1e-6) for y in (q, k))
    step, beta = jnp.moveaxis(
        jnp.einsum("BTD,DMG->BTMG", x, params["gates"]["kernel"]), -1, 0
    )
    step = nnx.softplus(step + params["time_bias"][None, None])
    out, _ = reference_gated_delta(
        q / H**0.5,
        k,
        v.reshape(BATCH, LENGTH, M, V),
        log_decay=-jnp.exp(params["log_rate"])[None, None] * step,
        beta=nnx.sigmoid(beta),
        segment_ids=ids,
    )
    out = out / jnp.sqrt(jnp.mean(out**2, -1, keepdims=True) + 1e-6)
    gate = jnp.einsum("BTD,DMV->BTMV", x, params["gate"]["kernel"])
    out = out * params["norm"][None, None, None] * nnx.silu(gate)
    return jnp.einsum("BTMV,MVD->BTD", out, params["o"]["kernel"])


def with_gradients(f, params, x, weights):
    """The output, and the gradients of the parameters and of x."""
    out, pull = jax.vjp(f, params, x)
    return out, pull(weights)


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        ({"ring": 2, "ulysses": 2, "tensor": 2}, "zigzag"),
        pytest.param(
            {"ring": 2, "explicit": True}, "contiguous", marks=pytest.mark.long
        ),
    ],
)
def test_equals_a_plain_layer(sizes, layout):
    with jax.enable_x64(True):
        mesh = make_mesh(**sizes)
        order, ids = Order(layout, mesh, BATCH, LENGTH), documents(LENGTH)
        x, weights = normal(0, *[(BATCH, LENGTH, D)] * 2, dtype="float64")
        # The plain layer's norm has an output for padding, which is nobody's.
        weights = jnp.where((ids == -1)[..., None], 0, weights)
        graph, state = nnx.split(layer(layout=layout, mesh=mesh))

        @jax.jit
        def run(params, x, ids, weights):
            def f(params, x):
                return nnx.merge(graph, params)(x, segment_ids=ids)

            return with_gradients(f, params, x, weights)

        @jax.jit
        def expect(params, x, weights):
            return with_gradients(
                lambda params, x: plain(params, x, ids), params, x, weights
            )

        expected, grads = expect(nnx.to_pure_dict(state), x, weights)
        out, (dparams, dx) = run(state, *map(order.store, (x, ids, weights)))
        actual = order.restore(out), (nnx.to_pure_dict(dparams), order.restore(dx))
        real = (ids != -1)[..., None]
        expected = jnp.where(real, expected, 0)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10),
            actual,
            (expected, grads),
        )


def test_steps_equal_the_whole():
    """A prompt, then tokens one at a time."""
    with jax.enable_x64(True):
        model = layer()
        (x,) = normal(0, (BATCH, LENGTH, D), dtype="float64")
        run = nnx.jit(lambda model, x, state: model.continued(x, state))
        expected, after = run(model, x, None)
        parts, state = [], None
        for start, stop in ((0, 21), (21, 22), (22, 23), (23, 24)):
            part, state = run(model, x[:, start:stop], state)
            parts.append(part)
        actual = jnp.concatenate(parts, 1), state
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10),
            actual,
            (expected, after),
        )


def test_sizes_that_cannot_be_raise():
    sizes = {"head_size": 4, "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match="num_v_heads=3 must be a multiple of num_h"):
        USPGatedDelta(6, 2, num_v_heads=3, **sizes)
    with pytest.raises(ValueError, match="conv_size=1 must be an int, 2 or greater"):
        USPGatedDelta(6, 2, conv_size=1, **sizes)
    with pytest.raises(ValueError, match="in_features=0 must be a positive int"):
        USPGatedDelta(0, 2, **sizes)

"""The feed-forward network in tiles of tokens against the whole."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from usp_jax.models.feed_forward import feed_forward

B, T, D, F = 2, 15, 8, 24


def arrays(dtype=jnp.float64, length=T):
    """x, the matrices and a cotangent."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (B, length, D), (D, F), (D, F), (F, D), (B, length, D)
    x, *matrices, dout = (
        jax.random.normal(key, shape, dtype) / shape[-2] ** 0.5
        for key, shape in zip(keys, shapes, strict=True)
    )
    return x, tuple(matrices), dout


def out_and_gradients(x, matrices, dout, tile):
    out, pull = jax.vjp(lambda x, w: feed_forward(x, w, tile), x, matrices)
    return out, pull(dout)


# For 30 tokens: tiles that divide them, tiles that do not, one token, and more than 30.
@pytest.mark.parametrize("tile", [10, 7, 1, 31])
def test_tiles_change_nothing(tile):
    with jax.enable_x64(True):
        x, matrices, dout = arrays()
        gate, up, down = matrices
        expected = (jax.nn.silu(x @ gate) * (x @ up)) @ down
        whole = out_and_gradients(x, matrices, dout, None)
        actual = out_and_gradients(x, matrices, dout, tile)
        chex.assert_trees_all_close(whole[0], expected, atol=1e-14)
        chex.assert_trees_all_close(actual, whole, atol=1e-13)
        chex.assert_trees_all_equal_dtypes(actual, whole)


def test_many_tiles_add_gradients_up_in_float32():
    """In bfloat16 a sum of 1024 terms would stop growing long before its end."""
    x, matrices, dout = arrays(jnp.bfloat16, 512)
    # One token many times: terms of different signs would not grow that large.
    x, dout = (jnp.broadcast_to(a[:1, :1], a.shape) for a in (x, dout))
    exact = jax.tree.map(lambda a: a.astype(jnp.float32), (x, matrices, dout))
    with jax.default_matmul_precision("highest"):
        _, (_, expected) = out_and_gradients(*exact, None)
    _, (_, whole) = out_and_gradients(x, matrices, dout, None)
    _, (_, actual) = out_and_gradients(x, matrices, dout, 1)

    def errors(found):
        return [
            float(np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b))
            for a, b in zip(found, expected, strict=True)
        ]

    for error, least in zip(errors(actual), errors(whole), strict=True):
        assert error < 1.5 * least


def test_memory_is_that_of_a_tile():
    """Memory of the hidden activations, forward and backward, as compiled."""
    wide, length = 1024, 512
    struct = jax.ShapeDtypeStruct
    x = struct((1, length, 16), jnp.float32)
    matrices = tuple(
        struct(s, jnp.float32) for s in ((16, wide), (16, wide), (wide, 16))
    )

    def temporaries(tile):
        f = jax.jit(lambda *a: out_and_gradients(*a, tile))
        return f.lower(x, matrices, x).compile().memory_analysis().temp_size_in_bytes

    hidden = 4 * length * wide
    assert temporaries(None) > 2 * hidden
    assert temporaries(32) < hidden / 2

"""Merging partial results: its laws, and that it is attention over the union."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracle import normal
from usp_jax.merge import finite, merge, normalize

B, T, N, H = 2, 5, 3, 4


def parts(count, *, dead=False, dtype="float64"):
    """Partial results; with `dead`, some rows of each have seen nothing."""
    result = []
    for i in range(count):
        out, lse = normal(i, (B, T, N, H), (B, T, N), dtype=dtype)
        if dead:
            unseen = jnp.arange(T)[None, :, None] % (i + 2) == 0
            unseen = jnp.broadcast_to(unseen, lse.shape)
            lse = jnp.where(unseen, -jnp.inf, lse)
            out = jnp.where(unseen[..., None], 0, out)
        result.append((out, lse))
    return result


@pytest.mark.parametrize("dead", [False, True])
def test_is_associative_and_commutative(dead):
    with jax.enable_x64(True):
        a, b, c = parts(3, dead=dead)
        left = merge(*merge(*a, *b), *c)
        chex.assert_trees_all_close(left, merge(*a, *merge(*b, *c)), atol=1e-14)
        chex.assert_trees_all_close(left, merge(*c, *merge(*b, *a)), atol=1e-14)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_has_seen_nothing_is_the_identity(side):
    with jax.enable_x64(True):
        (a,) = parts(1, dead=True)
        nothing = jnp.zeros_like(a[0]), jnp.full_like(a[1], -jnp.inf)
        pair = (*nothing, *a) if side == "left" else (*a, *nothing)
        chex.assert_trees_all_equal(merge(*pair), a)


def test_is_the_softmax_over_the_union():
    rng = np.random.default_rng(0)
    logits, values = rng.standard_normal((B, T, N, 7)), rng.standard_normal((7, H))

    def partial(keys):
        weights = np.exp(logits[..., keys])
        total = weights.sum(-1)
        return weights @ values[keys] / total[..., None], np.log(total)

    with jax.enable_x64(True):
        both = merge(*map(jnp.asarray, (*partial(slice(3)), *partial(slice(3, 7)))))
        chex.assert_trees_all_close(both, partial(slice(7)), atol=1e-14)


def test_large_logits_do_not_overflow():
    out, lse = normal(0, (1, 1, 1, 2), (1, 1, 1))
    merged = merge(out, lse + 1e4, 3 * out, lse - 1e4)
    chex.assert_trees_all_close(merged, (out, lse + 1e4))


def test_keeps_the_dtype_and_differentiates_dead_rows_without_nan():
    a, b = parts(2, dead=True, dtype="float32")

    def f(a, b):
        out, lse = merge(*a, *b)
        assert out.dtype == lse.dtype == jnp.float32
        return out.sum() + jnp.where(lse == -jnp.inf, 0, lse).sum()

    chex.assert_tree_all_finite(jax.grad(lambda x: f((x, a[1]), b))(a[0]))


def test_normalize_gives_zero_and_minus_infinity_where_nothing_was_seen():
    acc = jnp.array([[2.0, 4.0], [0.0, 0.0]])
    out, lse = normalize(acc, jnp.array([1.0, -jnp.inf]), jnp.array([2.0, 0.0]))
    chex.assert_trees_all_close(out, jnp.array([[1.0, 2.0], [0.0, 0.0]]))
    chex.assert_trees_all_close(lse, jnp.array([1 + np.log(2), -np.inf], "float32"))


def test_finite_replaces_minus_infinity_only():
    x = jnp.array([-jnp.inf, 3.0, -4.0])
    chex.assert_trees_all_equal(finite(x), jnp.array([0.0, 3.0, -4.0]))

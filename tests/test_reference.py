"""The oracle against attention written with loops in numpy."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracle import normal
from usp_jax.masking import Mask, MaskRule, Tokens
from usp_jax.reference import reference_attention

B, T, S, N, K, H = 2, 5, 6, 4, 2, 3


def by_loops(q, k, v, sees, scale, cap, sinks):
    out, lse = np.zeros((B, T, N, H)), np.full((B, T, N), -np.inf)
    for b, t, n in itertools.product(range(B), range(T), range(N)):
        logits, values = [], []
        for s in range(S):
            if sees(b, t, s):
                x = scale * float(q[b, t, n] @ k[b, s, n // (N // K)])
                logits.append(x if cap is None else cap * math.tanh(x / cap))
                values.append(v[b, s, n // (N // K)])
        if sinks is not None:
            logits.append(float(sinks[n]))
            values.append(np.zeros(H))
        if logits:
            total = sum(math.exp(x) for x in logits)
            lse[b, t, n] = math.log(total)
            out[b, t, n] = sum(
                math.exp(x) / total * value
                for x, value in zip(logits, values, strict=True)
            )
    return out, lse


@pytest.mark.parametrize("cap", [None, 0.8])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(
    ("rule", "sees"),
    [
        (MaskRule(), lambda b, t, s: True),
        # Query t is at position t + 1: some keys are after all queries.
        (MaskRule(True), lambda b, t, s: s <= t + 1),
        (MaskRule(False, 2, 0), lambda b, t, s: t - 1 <= s <= t + 1),
        # Nothing is visible for the last queries.
        (MaskRule(False, None, -4), lambda b, t, s: s <= t - 3),
    ],
    ids=["full", "causal", "window", "rows-without-keys"],
)
def test_equals_the_definition(rule, sees, cap, has_sinks):
    with jax.enable_x64(True):
        q, k, v, sinks = normal(
            0, (B, T, N, H), (B, S, K, H), (B, S, K, H), (N,), dtype="float64"
        )
        sinks = sinks if has_sinks else None
        q_order = jnp.broadcast_to(jnp.arange(1, T + 1, dtype=jnp.int32), (B, T))
        kv_order = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32), (B, S))
        mask = Mask(rule, Tokens(q_order), Tokens(kv_order))
        actual = reference_attention(
            q, k, v, mask, scale=0.7, logits_soft_cap=cap, sinks=sinks
        )
        arrays = (None if x is None else np.asarray(x) for x in (q, k, v))
        loops = by_loops(*arrays, sees, 0.7, cap, sinks)
        chex.assert_trees_all_close(actual, loops, atol=1e-12)


def test_documents_and_padding():
    q, k, v = normal(0, (1, 4, 1, 2), (1, 4, 1, 2), (1, 4, 1, 2))
    ids = jnp.array([[0, 0, 1, -1]], jnp.int32)
    tokens = Tokens(jnp.arange(4, dtype=jnp.int32)[None], ids)
    mask = Mask(MaskRule(), tokens, tokens)
    out, lse = reference_attention(q, k, v, mask, scale=1.0)
    # The third token is alone, the fourth is padding.
    chex.assert_trees_all_close(out[:, 2], v[:, 2])
    assert not out[:, 3].any() and lse[0, 3, 0] == -jnp.inf
    sinks = jnp.array([0.5])
    out, lse = reference_attention(q, k, v, mask, scale=1.0, sinks=sinks)
    assert not out[:, 3].any() and lse[0, 3, 0] == -jnp.inf

    def loss(q, k, v):
        out, lse = reference_attention(q, k, v, mask, scale=1.0)
        return out.sum() + jnp.where(lse == -jnp.inf, 0, lse).sum()

    grads = jax.grad(loss, (0, 1, 2))(q, k, v)
    chex.assert_tree_all_finite(grads)
    assert all(not g[:, 3].any() for g in grads)


def test_computes_in_the_accumulation_dtype():
    q, k, v = normal(0, (1, 4, 2, 2), (1, 4, 1, 2), (1, 4, 1, 2), dtype=jnp.bfloat16)
    tokens = Tokens(jnp.arange(4, dtype=jnp.int32)[None])
    out, lse = reference_attention(q, k, v, Mask(MaskRule(), tokens, tokens), scale=1.0)
    assert out.dtype == lse.dtype == jnp.float32

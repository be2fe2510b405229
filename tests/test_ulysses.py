"""Ulysses: the heads of each device, and all-to-alls that undo each other."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, strategies as st

from tests.oracle import normal
from tests.sampling import thinned
from usp_jax import kernels
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask, MaskRule, Tokens
from usp_jax.ulysses import (
    Heads,
    kv_to_heads,
    kv_to_seq,
    pad_heads,
    to_heads,
    to_seq,
    with_groups,
)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 8))
def test_every_query_head_finds_its_key_head(num_kv_heads, group, ulysses_size):
    heads = Heads(num_kv_heads * group, num_kv_heads, ulysses_size)
    assert heads.padded % ulysses_size == 0
    assert heads.padded - heads.num_heads < ulysses_size
    n = heads.padded // ulysses_size
    for device in range(ulysses_size):
        of_group = heads.sent[device][heads.groups[device]]
        own = np.repeat(of_group, n // len(of_group))
        for local, kv_head in enumerate(own):
            head = device * n + local
            if head < heads.num_heads:
                assert kv_head == head // group
    # As few as any one device needs, and none twice where they divide.
    assert heads.sent.shape[1] == max(len(np.unique(row)) for row in heads.needs)
    if num_kv_heads % ulysses_size == 0:
        assert not heads.replicated
        assert heads.sent.reshape(-1).tolist() == list(range(num_kv_heads))


@pytest.mark.parametrize(
    ("heads", "sent"),
    [
        (Heads(8, 2, 4), [[0], [0], [1], [1]]),
        (Heads(12, 3, 4), [[0, 0], [0, 1], [1, 2], [2, 2]]),
        (Heads(12, 3, 2), [[0, 1], [1, 2]]),
        (Heads(6, 3, 4), [[0], [1], [2], [2]]),
    ],
    ids=str,
)
def test_key_heads_that_travel(heads, sent):
    assert heads.sent.tolist() == sent


def per_rank(f):
    return jax.jit(jax.vmap(f, axis_name="ulysses"))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_to_heads_splits_heads_and_gathers_the_sequence(size):
    (x,) = normal(0, (2, 8, 4, 3))
    shards = jnp.stack(jnp.split(x, size, axis=1))
    by_heads = per_rank(lambda x: to_heads(x, "ulysses"))(shards)
    chex.assert_trees_all_equal(by_heads, jnp.stack(jnp.split(x, size, axis=2)))
    back = per_rank(lambda x: to_seq(x, "ulysses"))(by_heads)
    chex.assert_trees_all_equal(back, shards)


def test_without_an_axis_nothing_moves():
    (x,) = normal(0, (2, 8, 4, 3))
    assert to_heads(x, None) is x and to_seq(x, None) is x


def test_pad_heads():
    (x,) = normal(0, (1, 2, 6, 3))
    padded = pad_heads(x, Heads(6, 3, 4))
    assert padded.shape == (1, 2, 8, 3)
    chex.assert_trees_all_equal(padded[:, :, :6], x)
    assert not padded[:, :, 6:].any()
    assert pad_heads(x, Heads(6, 3, 2)) is x


@pytest.mark.parametrize("heads", [(8, 4), (8, 2), (12, 3), (6, 2), (5, 5)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_kv_to_seq_is_the_transpose_of_kv_to_heads(heads, dtype):
    """<A x, y> = <x, Aᵀ y>: parts of one head on several devices are summed."""
    size = 4
    heads = Heads(*heads, size)
    x, y = normal(
        1,
        (size, 1, 2, heads.num_kv_heads, 3),
        (size, 1, 2 * size, heads.sent.shape[1], 3),
    )
    ax = per_rank(lambda x: kv_to_heads(x, heads, "ulysses"))(x)
    aty = per_rank(lambda y: kv_to_seq(y, heads, "ulysses", dtype))(y)
    assert aty.dtype == dtype and aty.shape == x.shape
    _, pull = jax.vjp(per_rank(lambda x: kv_to_heads(x, heads, "ulysses")), x)
    # One rounding at the end at most, whatever was summed.
    (expected,) = pull(y)
    chex.assert_trees_all_close(
        aty.astype(jnp.float32),
        expected.astype(dtype).astype(jnp.float32),
        rtol=1e-2 if dtype == jnp.bfloat16 else 1e-6,
    )
    assert ax.shape == y.shape


@pytest.mark.parametrize("index", thinned([0, 1], keep=2))
def test_uneven_groups_equal_a_repeated_key_head(index):
    """Five query heads per device over 2 and 3 key heads: unequal groups."""
    heads = Heads(6, 2, 4) if index else Heads(12, 3, 2)
    device = index
    m, n = heads.sent.shape[1], heads.padded // heads.ulysses_size
    q, k, v, dout = normal(2, (1, 5, n, 4), (1, 5, m, 4), (1, 5, m, 4), (1, 5, n, 4))
    tokens = Tokens(jnp.arange(5, dtype=jnp.int32)[None])
    args = Mask(MaskRule(True), tokens, tokens), Logits(0.5)
    chunk = kernels.chunk("reference")
    grouped = with_groups(chunk, heads, device)
    # The key head of each query head, among those that this device received.
    own = np.searchsorted(heads.sent[device], heads.needs[device])

    def repeated(q, k, v):
        return chunk.forward(q, k[:, :, own], v[:, :, own], args[0], None, args[1])

    out, lse = grouped.forward(q, k, v, args[0], None, args[1])
    (expected_out, expected_lse), pull = jax.vjp(repeated, q, k, v)
    chex.assert_trees_all_close((out, lse), (expected_out, expected_lse), atol=1e-5)
    delta = jnp.sum(out * dout, -1)
    grads = grouped.backward(q, k, v, dout, lse, delta, *args)
    chex.assert_trees_all_close(grads, pull((dout, jnp.zeros_like(lse))), atol=1e-5)

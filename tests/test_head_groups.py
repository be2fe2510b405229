"""Ulysses in head groups: the oracle's results, and the predicted traffic."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

import usp_jax
from tests import programs
from tests.oracle import normal
from tests.sampling import thinned
from tests.test_variants import check
from usp_jax.compiled import by_kind
from usp_jax.ulysses import Heads

CASES = [
    # Heads that do not divide: padded queries, replicated keys.
    ((2, 4), (6, 2), 2),
    # Two parts of the keys for four head groups; keys cut like queries.
    ((4, 2), (16, 4), 4),
    ((4, 2), (8, 4), 2),
    ((2, 4), (8, 4), 2),
    ((1, 8), (16, 2), 2),
    ((8, 1), (4, 2), 4),
]


@pytest.mark.parametrize(("case", "explicit"), thinned(CASES, [True, False], keep=12))
def test_equals_the_oracle(case, explicit):
    degrees, heads, chunks = case
    check(
        degrees,
        explicit,
        ("zigzag", "zigzag"),
        {"is_causal": True, "ulysses_chunks": chunks},
        {"is_causal": True},
        segments=True,
        heads=heads,
    )


def test_gradients_of_shared_keys_are_rounded_once():
    """Four groups see the same keys: their parts are added up in float32."""
    mesh = usp_jax.make_mesh(ulysses=2)
    q, kv = (1, 64, 8, 4), (1, 64, 2, 4)
    *arrays, dout = normal(0, q, kv, kv, q, dtype=jnp.bfloat16)

    def gradients(chunks):
        attend = functools.partial(
            usp_jax.usp_attention, mesh=mesh, ulysses_chunks=chunks
        )
        return jax.vjp(attend, *arrays)[1](dout)

    whole, groups = (jax.jit(functools.partial(gradients, n))() for n in (1, 4))
    for one, other in zip(whole, groups, strict=True):
        assert jnp.mean(one != other) < 0.01


@pytest.mark.parametrize("chunks", thinned([4, 2], keep=2))
def test_keys_travel_once(chunks):
    """Heads travel once, and once more in the backward; the ring repeats per group."""
    (ring, ulysses), (n, k), size, length = (2, 4), (16, 8), 4, 64
    mesh = usp_jax.make_mesh(ring=ring, ulysses=ulysses)
    sharding = NamedSharding(mesh, jax.P(None, ("ring", "ulysses")))
    shapes = [
        jax.ShapeDtypeStruct((1, length, heads, size), jnp.float32, sharding=sharding)
        for heads in (n, k, k)
    ]
    attend = functools.partial(
        usp_jax.usp_attention, mesh=mesh, layout="zigzag", ulysses_chunks=chunks
    )
    forward, backward = map(by_kind, programs.passes(attend, shapes))
    share = 4 * length // (ring * ulysses) * size * (ulysses - 1) // ulysses
    kv_parts = Heads(n, k, ulysses, 0, chunks).kv_parts
    assert kv_parts == 2
    assert forward["all-to-all"].wire_bytes == (2 * n + 2 * k) * share
    assert forward["all-to-all"].executions == 2 * chunks + kv_parts
    assert backward["all-to-all"].wire_bytes == (3 * n + 4 * k) * share
    assert backward["all-to-all"].executions == 3 * chunks + 2 * kv_parts
    # A part of the keys goes around once for each head group that it serves. XLA of jax
    # 0.10 merges equal first hops, and this ring has no second.
    turns = chunks // kv_parts
    sent = 1 if jax.__version_info__ < (0, 11) else turns
    hop = 4 * 2 * k // ulysses * length // ring * size
    assert forward["collective-permute"].wire_bytes == sent * hop
    assert backward["collective-permute"].wire_bytes == (sent + turns) * hop


@pytest.mark.parametrize("chunks", [0, True, 1.0, 3])
def test_wrong_chunks(chunks, no_type_checks):
    mesh = usp_jax.make_mesh(ring=4, ulysses=2)
    x = jnp.ones((1, 16, 4, 4))
    message = (
        "ulysses_chunks=3 must divide the query heads of a device, 2"
        if chunks == 3
        else f"ulysses_chunks={chunks!r} must be a positive int"
    )
    with pytest.raises(ValueError, match=message):
        usp_jax.usp_attention(x, x, x, mesh=mesh, ulysses_chunks=chunks)

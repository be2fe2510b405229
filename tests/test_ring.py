"""The ring on virtual devices: R hops add up to one chunk over all keys."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import pytest
from jax import lax

import usp_jax
from tests.oracle import normal
from tests.sampling import thinned
from usp_jax import kernels
from usp_jax.kernels.logits import Logits
from usp_jax.masking import Mask, MaskRule, Tokens
from usp_jax.ring import (
    AllGather,
    Bidirectional,
    Double,
    Ring,
    SideBySide,
    Unidirectional,
    apart,
    schedule_backward,
    schedule_forward,
    side_by_side,
)
from usp_jax.ring.ring import Turn
from usp_jax.ring.steps import ring_backward, ring_forward
from usp_jax.ring.tokens import RingTokens

B, T, N, K, H, V = 1, 3, 4, 2, 4, 5
RULES = {"window": MaskRule(False, 3, 1), "full": MaskRule(), "causal": MaskRule(True)}


def tokens(shard, length):
    return Tokens((shard * length + jnp.arange(length, dtype=jnp.int32))[None])


def ring_of(size, rule):
    """The ring from the calling device's point of view."""
    tokens = RingTokens(None, None, "contiguous", size, T)
    return Ring(
        axis_name="ring" if size > 1 else None,
        index=lax.axis_index("ring") if size > 1 else 0,
        chunk=kernels.chunk("xla"),
        keys=SideBySide(H, V),
        rule=rule,
        logits=Logits(0.5),
        q_tokens=tokens,
        kv_tokens=tokens,
    )


def joined(x, axis):
    """[R, ...] -> all shards one after the other along a dim."""
    return jnp.concatenate(list(x), axis)


def check(size, rule, schedule):
    q, kv, dout, delta = normal(
        0,
        (size, B, T, N, H),
        (size, B, T, K, H + V),
        (size, B, T, N, V),
        (size, B, T, N),
    )

    def shard(q, kv, dout, delta):
        ring = ring_of(size, rule)
        turns = schedule.turns(size)
        out, lse = ring_forward(ring, turns, q, kv)
        (dq, _), dkv = ring_backward(ring, turns, q, kv, dout, lse, delta)
        return out, lse, dq, dkv

    run = jax.jit(jax.vmap(shard, axis_name="ring"))
    out, lse, dq, dkv = run(q, kv, dout, delta)
    whole = tokens(0, size * T)
    mask = Mask(rule, whole, whole)
    chunk = kernels.chunk("reference")
    q, dout, delta = (joined(x, 1) for x in (q, dout, delta))
    k, v = apart(joined(kv, 1), H)
    expected = chunk.forward(q, k, v, mask, None, Logits(0.5))
    actual = joined(out, 1), joined(lse, 1)
    chex.assert_trees_all_close(actual, expected, atol=1e-5)
    expected = chunk.backward(q, k, v, dout, expected[1], delta, mask, Logits(0.5))
    actual = joined(dq, 1), *apart(joined(dkv, 1), H)
    chex.assert_trees_all_close(actual, expected, atol=1e-5)


@pytest.mark.parametrize(("size", "rule"), thinned([3, 1, 2, 5], RULES, keep=12))
def test_equals_one_chunk(size, rule):
    check(size, RULES[rule], Unidirectional())


def test_halves_of_an_odd_shard_travel_each_way():
    assert T % 2
    check(3, RULES["causal"], Bidirectional())


def test_the_ring_adds_to_an_earlier_carry():
    q, kv, out, lse = normal(
        1, (2, B, T, N, H), (2, B, T, K, H + V), (2, B, T, N, V), (2, B, T, N)
    )

    def shard(carry_is_used, q, kv, out, lse):
        ring = ring_of(2, RULES["full"])
        if carry_is_used:
            return ring_forward(ring, (Turn(2),), q, kv, (out, lse))
        return ring_forward(ring, (Turn(2),), q, kv)

    with_carry, without = (
        jax.jit(jax.vmap(functools.partial(shard, used), axis_name="ring"))(
            q, kv, out, lse
        )
        for used in (True, False)
    )
    total = jnp.logaddexp(without[1], lse)
    chex.assert_trees_all_close(with_carry[1], total, atol=1e-5)
    parts = [x * jnp.exp(y - total)[..., None] for x, y in (without, (out, lse))]
    chex.assert_trees_all_close(with_carry[0], sum(parts), atol=1e-5)


def test_turns_visit_every_device_of_their_ring():
    """Two rings of three neighbours, and three rings of two that are three apart."""
    inner, outer = Turn(3), Turn(2, stride=3)
    assert [inner.moved(device, 1) for device in range(6)] == [1, 2, 0, 4, 5, 3]
    assert [outer.moved(device, 1) for device in range(6)] == [3, 4, 5, 0, 1, 2]
    assert [inner.moved(4, -step) for step in range(4)] == [4, 3, 5, 4]
    assert inner.pairs(6, -1) == [(0, 2), (1, 0), (2, 1), (3, 5), (4, 3), (5, 4)]


def recording(of_forward, of_backward):
    """A kernel that rounds itself, and appends the dtypes it is called with."""
    chunk = kernels.chunk("xla")

    def forward(q, k, v, *facts, dtype=None):
        of_forward.append(dtype)
        k, v = apart(k, H) if v is None else (k, v)
        out, lse = chunk.forward(q, k, v, *facts)
        return out.astype(dtype or out.dtype), lse

    def backward(q, k, v, *facts, dtypes):
        of_backward.append(dtypes)
        arrays = apart(k, H) if v is None else (k, v)
        dq, dk, dv = chunk.backward(q, *arrays, *facts)
        dq_dtype, dtype = (x or dq.dtype for x in dtypes)
        if v is not None:
            return dq.astype(dq_dtype), dk.astype(dtype), dv.astype(dtype)
        return dq.astype(dq_dtype), side_by_side(dk, dv).astype(dtype), None

    return dataclasses.replace(chunk, direct=kernels.Direct(forward, backward))


BF16 = jnp.dtype("bfloat16")
ROUNDED = {
    "one device": (1, Unidirectional(), [BF16], {(BF16, BF16)}),
    "ring": (3, Unidirectional(), [None, None, BF16], {(None, None)}),
    "two rings": (4, Double(2), [None, None, None, BF16], {(None, None)}),
    "groups": (8, Unidirectional(4), [None, None, None, BF16], {(None, None)}),
    "gathered": (3, AllGather(), [BF16], {(BF16, None)}),
}


@pytest.mark.parametrize("name", ROUNDED)
def test_only_what_nothing_is_added_to_is_rounded(name):
    size, schedule, forward, backward = ROUNDED[name]
    of_forward, of_backward = [], []

    def shard(q, kv, out, lse):
        chunk = recording(of_forward, of_backward)
        ring = dataclasses.replace(
            ring_of(size, RULES["full"]), chunk=chunk, rounds_dkv=True
        )
        schedule_forward(schedule, ring, q, kv, None)
        return schedule_backward(schedule, ring, q, kv, out, lse, lse)

    shapes = (B, T, N, H), (B, T, K, H + V), (B, T, N, V)
    structs = [jax.ShapeDtypeStruct((size, *shape), BF16) for shape in shapes]
    lse = jax.ShapeDtypeStruct((size, B, T, N), jnp.float32)
    jax.eval_shape(jax.vmap(shard, axis_name="ring"), *structs, lse)
    assert of_forward == forward
    assert set(of_backward) == backward


@pytest.mark.parametrize(
    ("size", "shards"),
    [
        # The own shard, one, two, a loop of two groups, and one that remains.
        pytest.param(9, 2, id="loop"),
        pytest.param(8, 3, id="remainder", marks=pytest.mark.long),
        pytest.param(8, 4, id="whole", marks=pytest.mark.long),
        pytest.param(3, 4, id="few", marks=pytest.mark.long),
        pytest.param(2, 2, id="two", marks=pytest.mark.long),
    ],
)
def test_groups_of_shards_are_one_chunk(size, shards):
    q, kv = normal(0, (size, B, T, N, H), (size, B, T, K, H + V))

    def shard(schedule, q, kv):
        return schedule_forward(schedule, ring_of(size, RULES["window"]), q, kv, None)

    whole = tokens(0, size * T)
    mask = Mask(RULES["window"], whole, whole)
    k, v = apart(joined(kv, 1), H)
    with jax.enable_x64(True):
        exact = [x.astype("float64") for x in (joined(q, 1), k, v)]
        expected = kernels.chunk("reference").forward(*exact, mask, None, Logits(0.5))
    errors = []
    for schedule in (Unidirectional(shards), Unidirectional()):
        run = jax.vmap(functools.partial(shard, schedule), axis_name="ring")
        actual = [joined(x, 1) for x in jax.jit(run)(q, kv)]
        chex.assert_trees_all_close(actual, [*expected], atol=1e-5)
        errors.append(jnp.linalg.norm(actual[0] - expected[0].astype("float32")))
    assert errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize(
    ("heads", "groups", "dkv"),
    [((4, 2), 1, BF16), ((4, 1), 1, None), ((4, 2), 2, None)],
    ids=["own heads", "a head on two devices", "head groups"],
)
def test_dk_and_dv_are_rounded_after_the_last_sum(heads, groups, dkv, monkeypatch):
    of_backward = []
    chunk = recording([], of_backward)
    monkeypatch.setattr(kernels, "chunk", lambda *_: chunk)
    mesh = usp_jax.make_mesh(ulysses=2)
    q, kv = (jax.ShapeDtypeStruct((1, 8, n, H), BF16) for n in heads)
    attend = functools.partial(usp_jax.usp_attention, mesh=mesh, ulysses_chunks=groups)

    def loss(q, k, v):
        return attend(q, k, v).sum()

    jax.eval_shape(jax.grad(loss, argnums=(0, 1, 2)), q, kv, kv)
    assert of_backward == [(BF16, dkv)] * groups


def test_the_one_chunk_of_a_window_is_rounded(monkeypatch):
    of_forward, of_backward = [], []
    chunk = recording(of_forward, of_backward)
    monkeypatch.setattr(kernels, "chunk", lambda *_: chunk)
    window = {"is_causal": True, "local_window_size": (3, 0)}
    attend = functools.partial(
        usp_jax.usp_attention, mesh=usp_jax.make_mesh(ring=4), **window
    )
    q, kv = (jax.ShapeDtypeStruct((1, 64, n, H), BF16) for n in (N, K))
    jax.eval_shape(jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2)), q, kv, kv)
    # dk and dv of the halo are still added up.
    assert (set(of_forward), of_backward) == ({BF16}, [(BF16, None)])
